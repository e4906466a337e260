"""Arithmetic and memory of stages that train an adapter, against torch's own counter and simple sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsevlm.adapters.attach import attach
from sparsevlm.recipe.adapter import Mma
from sparsevlm.train.parts import select_trainable
from sparsevlm.train.plan import plan
from tests.train.planned import recipe_of, stage_of

ROWS, LENGTH, WIDTH, LAYERS = 4, 64, 32, 2


def counted(recipe: Any, spec: Mma, trains: list[str]) -> int:
    """Operations of a forward and a backward pass over four rows with a picture each, as torch counts them."""
    from sparsevlm.model.build import build_model

    model: Any = build_model(recipe.model)[0]
    attach(model, spec)
    select_trainable(model, trains)
    model.train().set_attn_implementation("eager")  # torch has no formula for its fused kernel on the CPU
    ids = torch.full((ROWS, LENGTH), 10)
    ids[:, :16] = model.config.image_token_id
    pixels, grid = torch.randn(ROWS, 3, 32, 32), torch.tensor([[1, 4, 4]] * ROWS)
    with FlopCounterMode(display=False) as counter:
        batch = {"input_ids": ids, "labels": ids.clone(), "pixel_values": pixels, "image_grid_thw": grid}
        model(**batch, use_cache=False).loss.backward()
    # Where the formula knowingly differs: eager attention computes the masked half of the scores too, and the head is
    # not run at the last position.
    masked = 3 * 2 * ROWS * LENGTH * LENGTH * WIDTH * LAYERS
    head = 2 * 2 * ROWS * WIDTH * model.lm_head.weight.shape[0]
    return counter.get_total_flops() - masked + head


@pytest.mark.parametrize("routing", ["sample", "token"])
@pytest.mark.parametrize("trains", [["adapter", "connector"], ["adapter"]])
@pytest.mark.parametrize("vision_layers", [None, "all"])
def test_flops_of_mma_are_those_that_torch_counts(
    tiny_parts: dict[str, str], routing: Any, trains: list[str], vision_layers: Any
) -> None:
    spec = Mma(type="mma", routing=routing, vision_layers=vision_layers)
    recipe = recipe_of(tiny_parts, model={"vision": {"layer": -1}})
    stage = recipe.stages["align"].model_copy(update={"adapter": spec, "trains": trains})
    recipe.stages = {"s": stage}
    estimate = plan(recipe, ["32x32"])["stages"][0]["flops_per_step"]
    got = counted(recipe, spec, trains)
    if vision_layers is None and routing == "token" and "connector" in trains:
        assert estimate == got
    # Left out: the pass of the two modalities through the decoder, two tokens beside 256, and the gradients of the
    # tower's adapters. Counted, though nobody takes it: the gradient of the pixels.
    assert estimate == pytest.approx(got, rel=0.02)


def test_upcycling_changes_nothing_about_them(tiny_parts: dict[str, str]) -> None:
    """The stacked paths are no experts: all of them are used, whatever top_k is."""

    def more(name: str) -> int:
        adapted = recipe_of(tiny_parts)
        plain = recipe_of(tiny_parts)
        for recipe, spec in ((adapted, Mma(type="mma", vision_layers=None)), (plain, None)):
            recipe.stages = {n: stage for n, stage in recipe.stages.items() if n in ("align", name)}
            trains = ["connector", "adapter"] if spec else ["connector"]
            recipe.stages[name] = recipe.stages[name].model_copy(update={"adapter": spec, "trains": trains})
        one, two = (stage_of(plan(recipe), name)["flops_per_step"] for recipe in (adapted, plain))
        return one - two

    down, up = WIDTH * 8, 2 * (4 + 1) * WIDTH
    assert more("instruct") == more("moe") == 3 * 2 * (down + up) * LAYERS * ROWS * LENGTH


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_float32_whatever_the_model_is(tiny_parts: dict[str, str], dtype: str) -> None:
    recipe = recipe_of(tiny_parts, model={"dtype": dtype})
    update = {"adapter": Mma(type="mma"), "trains": ["adapter"]}
    recipe.stages = {"s": recipe.stages["align"].model_copy(update=update)}
    entry = stage_of(plan(recipe), "s")
    trained, total = entry["parameters"]["trainable"], entry["parameters"]["total"]
    each = 4 if dtype == "float32" else 2
    assert entry["memory"]["weights"] == each * (total - trained) + 4 * trained
    assert entry["memory"]["gradients"] == 4 * trained
    assert entry["memory"]["optimizer"] == 8 * trained
