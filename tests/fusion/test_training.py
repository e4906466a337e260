"""A fusion around the model: parts, plans, adapters, upcycling, export, a whole stage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from sparsevlm.adapters.attach import attach, detach
from sparsevlm.adapters.targets import resolve_targets
from sparsevlm.export.families import NoHomeError
from sparsevlm.export.native import place
from sparsevlm.model.build import build_model, load_model
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.adapter.lora import Lora
from sparsevlm.recipe.load import RecipeError
from sparsevlm.recipe.moe import Upcycle
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train.launch import train
from sparsevlm.train.parts import count_parameters, parts_of, select_trainable
from sparsevlm.train.plan import plan
from tests.fusion.common import build, disturb, padded, pictures
from tests.train.planned import recipe_of
from tests.train.runs import write_data

CROSS: dict[str, Any] = {"type": "gated_cross_attention", "every": 2, "heads": 2, "head_dim": 8}
EXPERT: dict[str, Any] = {"type": "visual_expert"}
FUSIONS = {"cross": CROSS, "expert": EXPERT}
PARTED = ("_gate", "visual_expert")
"""Names of what computes nothing new at the start."""
DOCUMENTS = [[2, 11, 6, 12, 13, 6, 14, 15], [2, 16, 17, 18], [6, 19, 20, 21, 22]]


def batch_for(fusion: dict[str, Any]) -> dict[str, Any]:
    """Padded rows of three pictures."""
    wide = 1 if fusion["type"] == "gated_cross_attention" else 4
    rows = [[token for token in row for _ in range(wide if token == 6 else 1)] for row in DOCUMENTS]
    return {**padded(rows), **pictures(3)}


@pytest.fixture(params=FUSIONS, scope="module")
def fusion(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FUSIONS[request.param]


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_fusion_is_a_part_of_its_own(fusion: dict[str, Any]) -> None:
    model = build(fusion)
    plain = {name for name, _ in build(None).named_parameters()}
    renamed = {name.replace(".text_expert", "") for name, _ in model.named_parameters()}
    assert plain < renamed
    ours = [name for name, _ in model.named_parameters() if parts_of(name) == ("fusion",)]
    assert ours and not plain & set(ours)
    select_trainable(model, ["connector", "fusion"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*ours, *(n for n in plain if n.startswith("model.connector."))}
    counts = count_parameters(model)
    assert counts["language_model"] == count_parameters(build(None))["language_model"]


def test_lora_finds_its_layers(fusion: dict[str, Any]) -> None:
    model = build(fusion)
    language = resolve_targets(model, ["language"]).modules
    added = resolve_targets(model, ["fusion"]).modules
    assert len(language) == 4 * 7 and added and not set(language) & set(added)
    batch = batch_for(fusion)
    for name in PARTED:
        disturb(model, name, 0.1)
    before = logits(model, batch)
    attach(model, Lora(type="lora", targets=["language", "fusion"]))
    assert torch.equal(logits(model, batch), before)
    disturb(model, "lora_B", 0.1)
    adapted = logits(model, batch)
    assert not torch.allclose(adapted, before, atol=1e-3)
    select_trainable(model.train(), ["adapter"])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_lora_on_a_layer_of_a_name_is_on_its_twin_too() -> None:
    model, batch = build(EXPERT), batch_for(EXPERT)
    twins = {
        f"model.language_model.layers.{i}.self_attn.q_proj.{t}_expert" for i in range(4) for t in ("text", "visual")
    }
    named = resolve_targets(model, ["language_model.*.q_proj"]).modules
    assert set(named) == twins and twins < set(resolve_targets(model, ["q_proj"]).modules)
    assert len(resolve_targets(model, ["*.visual_expert", "gate_proj"]).modules) == 4 * 4 + 4 * 2
    disturb(model, "visual_expert", 0.1)
    attach(model, Lora(type="lora", targets=["q_proj", "down_proj"]))
    disturb(model, "lora_B", 0.1)
    adapted = logits(model, batch)
    detach(model, merge=True)
    torch.testing.assert_close(logits(model, batch), adapted, atol=1e-5, rtol=1e-4)


def test_native_export_refuses_with_the_reason(fusion: dict[str, Any]) -> None:
    with pytest.raises(NoHomeError, match=f"fusion '{fusion['type']}'"):
        place(build(fusion).config)


def test_upcycled_beside_cross_attention(tmp_path: Path) -> None:
    model = build(CROSS)
    disturb(model, "_gate")
    batch = batch_for(CROSS)
    before = logits(model, batch)
    upcycle_model(model, Upcycle(layers="all", experts=4, top_k=2))
    read = batch["attention_mask"].bool()  # padding is not routed
    # float32: measured 1e-7 of values up to 0.5
    torch.testing.assert_close(logits(model, batch)[read], before[read], atol=2e-6, rtol=0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))


def section(fusion: dict[str, Any]) -> dict[str, Any]:
    """Recipe's `model` entries."""
    width = {"dim": 24} if fusion["type"] == "gated_cross_attention" else {}
    return {"fusion": fusion, "connector": [{"type": "mlp", **width}], "vision": {"layer": -1}}


def test_flops_are_those_that_torch_counts(tiny_parts: dict[str, str]) -> None:
    """The formula against torch's counter over a real forward and backward pass, as tests/train/test_flops.py does."""
    recipe = recipe_of(tiny_parts, model=section({**CROSS, "every": 1}))
    recipe.stages = {"s": recipe.stages["align"].model_copy(update={"trains": ["connector", "fusion"]})}
    model: Any = build_model(recipe.model)[0].train()
    select_trainable(model, ["connector", "fusion"])
    model.set_attn_implementation("eager")  # torch has no formula for its fused kernel on the CPU
    rows, length, width, layers = 4, 64, 32, 2
    ids = torch.full((rows, length), 10)
    ids[:, 0] = model.config.image_token_id
    media = pictures(rows)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(input_ids=ids, labels=ids.clone(), **media, use_cache=False).loss.backward()
    estimate = plan(recipe, ["32x32"])["stages"][0]["flops_per_step"]
    # Where the formula knowingly differs, as there: the masked half of the scores, the head at the last position.
    masked = 3 * 2 * rows * length * length * width * layers
    head = 2 * 2 * rows * width * model.lm_head.weight.shape[0]
    assert estimate + masked - head == counter.get_total_flops()


@pytest.mark.parametrize("sparse", [False, True])
def test_the_visual_expert_costs_memory_and_no_arithmetic(tiny_parts: dict[str, str], sparse: bool) -> None:
    """With everything trained, a step costs what it does without twins: a token passes one of the two."""
    plain = recipe_of(tiny_parts, model={"connector": [{"type": "mlp"}], "vision": {"layer": -1}})
    ours = recipe_of(tiny_parts, model=section({**EXPERT, "ffn": not sparse}))
    documents = []
    for recipe in (plain, ours):
        changes: dict[str, Any] = {"trains": ["connector", "language"]}
        if recipe is ours:
            changes["trains"] = ["connector", "language", "fusion"]
            if sparse:
                moe = {"layers": "all", "experts": 2, "top_k": 1, "aux_loss_coef": 0, "router": {"scoring": "modality"}}
                changes["upcycle"] = Upcycle.model_validate(moe)
        recipe.stages = {"s": recipe.stages["align"].model_copy(update=changes)}
        documents.append(plan(recipe, ["32x32"])["stages"][0])
    before, after = documents
    assert after["flops_per_step"] == before["flops_per_step"]
    if not sparse:  # a stack of gate and up is one matrix there, whose input counts once
        assert after["memory"]["activations"] == before["memory"]["activations"]
    d, inner, layers = 32, 48, 2
    twins = layers * (2 * d * d + 2 * d * d // 2 + 3 * d * inner)  # q and o, k and v of half the heads, the FFN
    first, second = before["parameters"], after["parameters"]
    assert second["total"] - first["total"] == second["trainable"] - first["trainable"] == twins
    assert second["activated"] == first["activated"]
    assert after["memory"]["weights"] - before["memory"]["weights"] == 4 * twins
    assert after["memory"]["optimizer"] - before["memory"]["optimizer"] == 8 * twins


def test_flops_of_twins_are_those_that_torch_counts(tiny_parts: dict[str, str]) -> None:
    recipe = recipe_of(tiny_parts, model=section(EXPERT))
    recipe.stages = {"s": recipe.stages["align"].model_copy(update={"trains": ["connector", "fusion"]})}
    model: Any = build_model(recipe.model)[0].train()
    select_trainable(model, ["connector", "fusion"])
    model.set_attn_implementation("eager")
    rows, length, width, layers, visual = 4, 64, 32, 2, 16
    ids = torch.full((rows, length), 10)
    ids[:, :visual] = model.config.image_token_id
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(input_ids=ids, labels=ids.clone(), **pictures(rows), use_cache=False).loss.backward()
    estimate = plan(recipe, ["32x32"])["stages"][0]["flops_per_step"]
    masked = 3 * 2 * rows * length * length * width * layers
    heads = 2 * 2 * rows * width * model.lm_head.weight.shape[0]
    # the last position has no target, and those of pictures have no label here
    assert estimate + masked - heads == counter.get_total_flops()


def test_a_recipe_trains_saves_and_reloads(fusion: dict[str, Any], tiny_parts: dict[str, str], tmp_path: Path) -> None:
    recipe: Recipe = recipe_of(tiny_parts, model=section(fusion))
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    records = write_data(tmp_path / "data", rows=8)
    raw |= {"output": str(tmp_path / "run"), "report_to": [], "evals": {}}
    raw["data"] = {name: {"path": str(records), "format": "llava"} for name in raw["data"]}
    raw["stages"] = {
        "fuse": {
            "trains": ["connector", "fusion"],
            "data": list(raw["data"])[:1],
            "steps": 2,
            "gradient_checkpointing": True,
            "batch": {"rows": 2, "max_length": 128, "workers": 0},
        }
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(raw))
    (row,) = train(file)
    assert set(row.trains) == {"connector", "fusion"} and 0 < row.loss_last < 10
    start: Any = build_model(recipe.model)[0]
    model, _ = load_model(tmp_path / "run" / "fuse")
    assert model.config.fusion is not None
    frozen = {name: p for name, p in start.named_parameters() if not {"connector", "fusion"} & set(parts_of(name))}
    now = dict(model.named_parameters())
    assert not [name for name, p in frozen.items() if not torch.equal(now[name], p)]
    begun = dict(start.named_parameters())
    ours = {name for name in now if parts_of(name)[0] == "fusion" and any(part in name for part in PARTED)}
    # Visual tokens have no targets: of the last layer, text sees their keys and values alone.
    last = re.compile(r"layers\.1\.(mlp|self_attn\.[qo]_proj)\.visual_expert")
    ours = {name for name in ours if not last.search(name)}
    assert ours and not any(torch.equal(now[name], begun[name]) for name in ours)


def faults(tiny_parts: dict[str, str], **changes: Any) -> list[str]:
    """Options that a recipe is refused for when it is planned."""
    try:
        plan(recipe_of(tiny_parts, **changes))
    except RecipeError as error:
        return [fault.path for fault in error.faults]
    except ValidationError as error:
        nested = [(fault["loc"], fault.get("ctx", {}).get("errors", [{"loc": ()}])) for fault in error.errors()]
        return [".".join(map(str, (*at, *inner["loc"]))) for at, errors in nested for inner in errors]
    return []


def test_what_cannot_be_is_refused_at_its_line(tiny_parts: dict[str, str]) -> None:
    stage = {"data": ["a"], "steps": 3, "batch": {"rows": 4, "max_length": 64}}
    cross = section(CROSS)
    assert faults(tiny_parts, model=cross) == []
    assert faults(tiny_parts, model={"fusion": {**CROSS, "every": 3}}) == ["model.fusion"]
    assert faults(tiny_parts, stages={"s": {**stage, "trains": ["fusion"]}}) == ["stages.s.trains.0"]
    lora = {"type": "lora", "targets": ["fusion"]}
    assert faults(tiny_parts, stages={"s": {**stage, "adapter": lora}}) == ["stages.s.adapter.targets.0"]
    both = {**stage, "trains": ["adapter", "fusion"], "adapter": lora}
    assert faults(tiny_parts, model=cross, stages={"s": both}) == ["stages.s.trains.1"]
    partial = {"type": "partial_lora", "targets": ["to_kv"]}
    assert faults(tiny_parts, model=cross, stages={"s": {**stage, "adapter": partial}}) == [
        "stages.s.adapter.targets.0"
    ]
    few = {**stage, "trains": ["fusion"], "batch": {**stage["batch"], "max_visual_tokens": 15}}  # a picture has 16
    assert faults(tiny_parts, model=cross, stages={"s": few}) == ["stages.s.batch.max_visual_tokens"]
    for name, value in (("frame_text", "{time}"), ("subtitles", {"text": "{text}"})):
        assert faults(tiny_parts, model={**cross, "video": {name: value}})


def test_plan_tells_tokens_beside_the_text(tiny_parts: dict[str, str]) -> None:
    document = plan(recipe_of(tiny_parts, model=section(CROSS)), ["32x32", "4f@32x32"])
    assert document["stages"][0]["visual_tokens"] == {"32x32": 1, "4f@32x32": 1}
    notes = " ".join(document["notes"])
    assert "32x32: 16, 4f@32x32: 64" in notes and "set max_visual_tokens" not in notes
    packed = recipe_of(tiny_parts, model=section(CROSS))
    for stage in packed.stages.values():
        stage.batch.packing = True
    assert "set max_visual_tokens" in " ".join(plan(packed)["notes"])
