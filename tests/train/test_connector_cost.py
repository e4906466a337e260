"""What connector blocks cost, against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration
from sparsevlm.train.check import ModelCheck
from sparsevlm.train.connector_cost import GUIDE_TOKENS, measure_connector
from sparsevlm.train.plan import plan
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind
from tests.connectors.test_common import SMALL_QFORMER
from tests.train.planned import recipe_of, stage_of

PICTURE = [ItemShape(Grid(1, 4, 4), MediaKind.IMAGE)]


def measured(parts: dict[str, str], connector: list[dict[str, Any]]) -> Any:
    config = ModelCheck(recipe_of(parts, model={"connector": connector})).config()
    with torch.device("meta"):
        model = SparseVLMForConditionalGeneration(config)
    return measure_connector(model, PICTURE)


def test_a_projector_is_its_matrices_times_its_tokens(tiny_parts: dict[str, str]) -> None:
    [cost] = measured(tiny_parts, [{"type": "mlp", "depth": 2}])
    assert sum(matrix.flops for matrix in cost.matrices) == 2 * 16 * (32 * 32 + 32 * 32)
    assert sum(matrix.activations for matrix in cost.matrices) == 16 * 4 * 32
    assert cost.products == 0


def test_a_resampler_reads_all_tokens_and_its_queries_meet_the_rest(tiny_parts: dict[str, str]) -> None:
    options = {"latents": 3, "depth": 1, "heads": 2, "head_dim": 4, "ff_mult": 2}
    resampler, _ = measured(tiny_parts, [{"type": "perceiver_resampler", **options}, {"type": "linear"}])
    inner, width, seen = 8, 32, 16 + 3  # keys and values are of the tokens and the queries
    by_hand = 2 * (3 * width * inner + seen * width * 2 * inner + 3 * inner * width + 3 * 2 * width * 2 * width)
    assert sum(matrix.flops for matrix in resampler.matrices) == by_hand
    assert resampler.products == 2 * 2 * 3 * seen * inner  # scores, and their use


def test_a_q_former_is_counted_with_its_question(tiny_parts: dict[str, str]) -> None:
    plain, _ = measured(tiny_parts, [{"type": "qformer", **SMALL_QFORMER}, {"type": "linear"}])
    guided, _ = measured(tiny_parts, [{"type": "qformer", **SMALL_QFORMER, "instruction": True, "vocab_size": 99},
                                      {"type": "linear"}])  # fmt: skip
    dim, ff = SMALL_QFORMER["dim"], SMALL_QFORMER["ff_dim"]
    # A token of text passes self-attention (query, key, value, output) in both layers, the FFN of texts in the first:
    # nothing reads it after the last, which has none.
    text = 2 * GUIDE_TOKENS * (2 * 4 * dim * dim + 2 * dim * ff)
    assert sum(m.flops for m in guided.matrices) - sum(m.flops for m in plain.matrices) == text
    assert guided.products > plain.products > 0


def test_clustering_which_needs_values_is_left_out(tiny_parts: dict[str, str]) -> None:
    clusters, linear = measured(tiny_parts, [{"type": "dpc_knn", "clusters": [4]}, {"type": "linear"}])
    assert clusters.matrices == () and clusters.products == 0
    assert [matrix.tokens for matrix in linear.matrices] == [4]


@pytest.mark.parametrize("trains", [["connector"], ["connector", "language"]])
def test_a_plan_counts_them_for_every_medium_of_a_row(tiny_parts: dict[str, str], trains: list[str]) -> None:
    small, large = (
        {"type": "perceiver_resampler", "latents": 3, "depth": depth, "heads": 2, "head_dim": 4} for depth in (1, 2)
    )
    costs, flops = [], []
    for block in (small, large):
        connector = [block, {"type": "linear"}]
        recipe = recipe_of(tiny_parts, model={"connector": connector})
        recipe.stages = {"s": recipe.stages["align"].model_copy(update={"trains": trains})}
        costs.append(measured(tiny_parts, connector)[0])
        flops.append(stage_of(plan(recipe, ["32x32"]), "s")["flops_per_step"])
    rows = 4  # of one picture each: packing is off
    [added] = [3 * (sum(m.flops for m in b.matrices) - sum(m.flops for m in a.matrices)) for a, b in [costs]]
    products = 3 * (costs[1].products - costs[0].products)
    assert flops[1] - flops[0] == rows * (added + products)
