"""Arithmetic and memory against torch's own counter, simple sums and the literature."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsevlm.model.backbones import backbone_config
from sparsevlm.recipe.load import load_recipe
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train.flops import matrices, measure_tower
from sparsevlm.train.plan import plan
from tests import tiny
from tests.train.planned import recipe_of, stage_of

ROOT = Path(__file__).resolve().parents[2]


def built(recipe: Recipe, trains: list[str]):
    from sparsevlm.model.build import build_model
    from sparsevlm.train.parts import select_trainable

    model, _ = build_model(recipe.model)
    select_trainable(model, trains)
    return model


@pytest.mark.parametrize("trains", [["connector"], ["connector", "language"], ["vision", "connector", "language"]])
def test_flops_are_those_that_torch_counts(tiny_parts, trains):
    """One picture a row, no MoE: the formula against torch's counter over a real forward and backward pass."""
    recipe = recipe_of(tiny_parts, model={"vision": {"layer": -1}})
    recipe.stages = {"s": recipe.stages["align"].model_copy(update={"trains": trains})}
    model = built(recipe, trains).train()
    model.set_attn_implementation("eager")  # torch has no formula for its fused kernel on the CPU
    rows, length, width = 4, 64, 32
    ids = torch.full((rows, length), 10)
    ids[:, :16] = model.config.image_token_id
    batch = {
        "input_ids": ids,
        "labels": ids.clone(),
        "pixel_values": torch.randn(rows, 3, 32, 32),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
    }
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    estimate = plan(recipe, ["32x32"])["stages"][0]["flops_per_step"]
    # Where the formula knowingly differs: eager attention computes the masked half of the scores too, the head is not
    # run at the last position, and pixels get no gradient.
    masked = 3 * 2 * rows * length * length * width * 2
    head = (2 + ("language" in trains)) * 2 * rows * width * model.lm_head.weight.shape[0]
    pixels = ("vision" in trains) * 2 * rows * 16 * (3 * 8 * 8) * width
    assert estimate + masked - head - pixels == counter.get_total_flops()


def test_experts_cost_top_k_times(tiny_parts):
    recipe = recipe_of(tiny_parts)
    recipe.stages["moe"].trains = ["connector", "moe"]
    document = plan(recipe)
    model = built(recipe, ["connector"])
    language = matrices(model)
    assert (
        sum(m.inputs * m.outputs for m in language)
        == sum(
            w.numel() for n, w in model.named_parameters() if w.ndim == 2 and "language_model" in n and "embed" not in n
        )
        + model.lm_head.weight.numel()
    )
    ffn, hidden, tokens = 3 * 32 * 48, 32, 4 * 64
    more = stage_of(document, "moe")["flops_per_step"] - stage_of(document, "align")["flops_per_step"]
    # one of two layers: a second expert forward and for its input's gradient, both experts' own gradients, the router
    assert more == 2 * tokens * (ffn * (4 - 2) + 2 * ffn + 3 * 4 * hidden)


def test_nothing_flows_back_below_what_trains(tiny_parts):
    recipe = recipe_of(tiny_parts)
    recipe.stages["moe"].upcycle.layers = [1]
    flops = {}
    for trains in (["moe"], ["connector", "moe"]):
        recipe.stages["moe"].trains = trains
        flops[len(trains)] = stage_of(plan(recipe, ["32x32"]), "moe")["flops_per_step"]
    rows, tokens, width = 4, 4 * 64, 32
    connector = rows * 16 * 3 * width * width  # own gradients of two matrices, the input's of the second
    layer = tokens * (
        2 * width * width + 2 * width * width // 2 + 3 * width * 48
    )  # q, o; k, v with half the heads; FFN
    attention_projections = tokens * (2 * width * width + 2 * width * width // 2)  # of the layer with the experts
    router, scores = 4 * tokens * width, 2 * tokens * 64 * width
    assert flops[2] - flops[1] == 2 * (connector + layer + attention_projections + router + 2 * scores)


def test_tower_counts_of_clip():
    """CLIP-L/14 at 336 px: 577 tokens, 24 layers of width 1024, and the patch embedding."""
    from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig
    from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration

    tower = backbone_config("openai/clip-vit-large-patch14-336")
    config = SparseVLMConfig(vision_config=tower, text_config=tiny.text_config())
    with torch.device("meta"):
        measured = measure_tower(SparseVLMForConditionalGeneration(config), 336)
    matrix = 24 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 576 * 3 * 14 * 14 * 1024
    attention = 24 * 2 * 577**2 * 1024
    assert measured.flops == 2 * (matrix + attention)
    assert measured.activations == pytest.approx(24 * 577 * (4 * 2 + 2 * 5) * 1024, rel=0.03)
    assert measured.checkpointed < measured.activations / 10


def test_activations_agree_with_the_literature():
    """Korthikanti et al. (arXiv:2205.05198): 34 s b h bytes a layer in 16 bits without attention scores, GPT shape."""
    document = plan(load_recipe(ROOT / "recipes/moe_llava/phi2.yaml", ["stages.instruct.gradient_checkpointing=false"]))
    memory = stage_of(document, "instruct")["memory"]
    assert memory["activations"] == pytest.approx(34 * (8 * 2048) * 2560 * 32, rel=0.1)


def test_memory_of_weights_and_states(tiny_parts):
    recipe = recipe_of(tiny_parts)
    stage = stage_of(plan(recipe), "instruct")
    parameters, memory = stage["parameters"], stage["memory"]
    assert memory["weights"] == 4 * parameters["total"]
    assert memory["gradients"] == 4 * parameters["trainable"]
    assert memory["optimizer"] == 8 * parameters["trainable"]
    assert stage["memory_per_rank_bytes"] == sum(memory.values()) and memory["host"] == 0


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_sharding_divides_what_it_shards(tiny_parts, zero):
    recipe = recipe_of(tiny_parts, sharding={"zero": zero})
    memory = stage_of(plan(recipe, world=2), "instruct")["memory"]
    alone = stage_of(plan(recipe), "instruct")["memory"]
    assert memory["weights"] == alone["weights"] // (2 if zero == 3 else 1)
    assert memory["gradients"] == alone["gradients"] // (2 if zero >= 2 else 1)
    assert memory["optimizer"] == alone["optimizer"] * 12 // 8 // 2 if zero else alone["optimizer"]
    assert memory["activations"] == alone["activations"]


@pytest.mark.parametrize("zero", [1, 2])
def test_expert_parallelism_leaves_half_of_the_experts_on_each_of_two_ranks(tiny_parts, zero):
    def memory(**sharding):
        return stage_of(plan(recipe_of(tiny_parts, sharding={"zero": zero, **sharding}), world=2), "moe")["memory"]

    alone, spread = memory(), memory(expert_parallel=2)
    experts = 4 * 3 * 32 * 48  # 4 experts in layer 0: gate, up and down of 32 x 48
    assert alone["weights"] - spread["weights"] == 4 * experts // 2
    # From ZeRO-2 on, gradients are halved anyway; the optimizer's states are from ZeRO-1 on.
    assert alone["gradients"] - spread["gradients"] == (4 * experts // 2 if zero == 1 else 0)
    assert alone["optimizer"] == spread["optimizer"]


def test_experts_that_are_not_spread_are_held_whole(tiny_parts):
    """Frozen experts stay on every rank, whatever the recipe says of those that train."""

    def memory(**sharding):
        recipe = recipe_of(tiny_parts, sharding={"zero": 2, **sharding})
        recipe.stages["moe"] = recipe.stages["moe"].model_copy(update={"trains": ("moe.router",)})
        return stage_of(plan(recipe, world=2), "moe")["memory"]

    assert memory(expert_parallel=2) == memory()


def test_offload_moves_to_the_host_and_bf16_halves(tiny_parts):
    recipe = recipe_of(tiny_parts, sharding={"zero": 3, "offload": "all"})
    stage = stage_of(plan(recipe), "instruct")
    assert stage["memory"]["optimizer"] == stage["memory"]["weights"] == 0
    assert stage["memory"]["host"] == (4 * stage["parameters"]["total"] + 12 * stage["parameters"]["trainable"])
    assert stage["memory_per_rank_bytes"] == sum(stage["memory"].values()) - stage["memory"]["host"]

    full = stage_of(plan(recipe_of(tiny_parts)), "instruct")["memory"]
    half = stage_of(plan(recipe_of(tiny_parts, model={"dtype": "bfloat16"})), "instruct")["memory"]
    assert {what: full[what] for what in ("weights", "optimizer", "activations")} == {
        what: 2 * half[what] for what in ("weights", "optimizer", "activations")
    }


def test_checkpointing_trades_memory_for_arithmetic(tiny_parts):
    recipe = recipe_of(tiny_parts)
    before = stage_of(plan(recipe), "instruct")
    recipe.stages["instruct"].gradient_checkpointing = True
    after = stage_of(plan(recipe), "instruct")
    assert after["memory"]["activations"] < before["memory"]["activations"]
    assert after["flops_per_step"] > before["flops_per_step"]
