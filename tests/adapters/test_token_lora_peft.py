"""LoRA sets chosen per token under PEFT and in a recipe: saving, switching, 16 bits, recomputation, what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from sparsevlm.adapters.attach import attach, detach
from sparsevlm.adapters.targets import TargetError
from sparsevlm.adapters.token_lora import TokenLoraConfig, use_sets
from sparsevlm.adapters.token_lora.layer import TokenLoraLayer
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.adapter import Adapter, PartialLora, SliceLora
from sparsevlm.recipe.schema import Upcycle
from sparsevlm.train.flops import matrices, measure_tower
from tests import tiny
from tests.adapters.mma_common import SAMPLES, collate, llama
from tests.adapters.specs import stir
from tests.adapters.test_token_lora import adapted, backward, config, model_logits, slices

IDS = torch.arange(3, 17).view(2, 7)
SETS = torch.tensor([[-1, 0, 0, 0, -1, -1, -1], [-1] * 7])


@pytest.mark.parametrize("settings", [config(), slices()], ids=["partial", "slice"])
def test_saved_and_loaded_by_peft_alone(tmp_path: Path, tiny_model: Any, settings: TokenLoraConfig) -> None:
    base, processor = tiny_model
    clean = copy.deepcopy(base).double().eval()
    model = adapted(base, settings)
    batch = collate(processor, SAMPLES, packed=False)
    want = model_logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(clean, str(tmp_path)).eval()
    loaded.double()
    saved, again = model.state_dict(), loaded.state_dict()
    # PEFT reads weights into float32 layers: equal as such
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name].float(), again[name].float()) for name in saved)
    torch.testing.assert_close(model_logits(loaded, batch), want, rtol=0, atol=1e-6)
    assert loaded.peft_config["default"].peft_type == ("PARTIAL_LORA" if settings.choose == "visual" else "SLICE_LORA")


def test_importing_the_package_is_enough_to_load(tmp_path: Path) -> None:
    """In a process that imports `sparsevlm` and nothing below it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny.text_config()).eval()
    base.save_pretrained(tmp_path / "base")
    model: Any = get_peft_model(base, config()).eval()
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    with use_sets(tokens=SETS):
        torch.save(model(IDS).logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch, sparsevlm\n"
        "assert 'peft' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        "from peft import PeftModel\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r}).eval()\n"
        "from sparsevlm.adapters.token_lora import use_sets\n"
        f"with use_sets(tokens=torch.tensor({SETS.tolist()})):\n"
        "    logits = model(torch.arange(3, 17).view(2, 7)).logits\n"
        f"assert torch.equal(logits, torch.load({str(tmp_path / 'logits.pt')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_several_adapters_switch_and_go() -> None:
    base = llama()
    plain = base(IDS).logits
    model: Any = get_peft_model(base, config())
    model.add_adapter("other", config(r=2, target_modules=["q_proj"]))
    stir(model.double())
    model.eval()
    with use_sets(tokens=SETS):
        first = model(IDS).logits
        model.set_adapter("other")
        second = model(IDS).logits
        assert (first - second)[0].abs().max() > 1e-3 and torch.equal(first[1], plain[1])
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains and all(".other." in name and ".q_proj." in name for name in trains)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain)
        model.set_adapter("default")
        model.delete_adapter("other")
        assert torch.equal(model(IDS).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain), "nothing needs to be known where no adapter runs"
    bare = model.unload()
    assert not any(isinstance(module, TokenLoraLayer) for module in bare.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in bare.modules())
    assert torch.equal(bare(IDS).logits, plain)


def test_merging_is_refused_with_the_reason() -> None:
    model = adapted(llama(), config())
    for merge in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(ValueError, match="depends on the token"):
            merge()


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_stay_float32_beside_a_16_bit_model(tiny_model: Any, autocast: bool) -> None:
    base, processor = tiny_model
    batch = collate(processor, SAMPLES, packed=True)
    kind = torch.float32 if autocast else torch.bfloat16
    base.to(kind).eval()
    batch["pixel_values"] = batch["pixel_values"].to(kind)
    model: Any
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = base(**batch).logits
        model = get_peft_model(base, config())
        assert {p.dtype for n, p in model.named_parameters() if "loras_" in n} == {torch.float32}
        assert torch.equal(model.eval()(**batch).logits, before)
        stir(model)
        loss = model.train()(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    assert any(bool(g.any()) for g in gradients.values() if g is not None)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_nothing(tiny_model: Any, moe: bool, reentrant: bool) -> None:
    """With dropout, too. MoE layers carry the padding of the same rows beside it."""
    base, processor = tiny_model
    if moe:
        upcycle_model(base, Upcycle(layers=[1], experts=4, top_k=2))
    if moe and reentrant:
        pytest.skip("MoE layers refuse reentrant checkpointing")
    targets = ["q_proj", "o_proj"] if moe else ["q_proj", "o_proj", "down_proj"]
    model = adapted(base, config(dropout=0.3, target_modules=targets)).train()
    batch = collate(processor, SAMPLES, packed=False)
    torch.manual_seed(3)
    plain = backward(model, batch)
    assert any(bool(gradient.any()) for gradient in plain.values())
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for _ in range(2):
        torch.manual_seed(3)
        again = backward(model, batch)
        assert again.keys() == plain.keys()
        for name, gradient in again.items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6)


def test_a_native_llava() -> None:
    """CLIP and Llama in a class of transformers: its config names the placeholder, too."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    fields: dict[str, Any] = {"vision_config": tiny.vision_config(), "text_config": tiny.text_config()}
    fields |= {"image_token_id": 6, "vision_feature_layer": -2}
    native = LlavaConfig(**fields)
    base = LlavaForConditionalGeneration(native).double().eval()
    ids = torch.randint(10, 60, (2, 20))
    ids[1, 2:18] = 6
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = base(input_ids=ids, pixel_values=pixels).logits
    model = adapted(base, config())  # q_proj is in the tower, too, and stays as it is
    assert not any("loras_" in name and "vision" in name for name, _ in model.named_parameters())
    after = model(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(after[0], before[0]) and torch.equal(after[1, :2], before[1, :2])
    assert (after - before)[1, 2:].abs().max() > 1e-3
    with use_sets(tokens=torch.full((2, 20), -1)):
        assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, before)


def test_what_a_plan_counts(tiny_model: Any) -> None:
    """All tokens and all frames: which of them pass is known with the data."""
    with torch.device("meta"):
        model = type(tiny_model[0])(tiny_model[0].config)
    before, tower = matrices(model), measure_tower(model, 32)
    attach(model, SliceLora(type="slice_lora", r=4, whole="none"))
    layers = sum(isinstance(module, TokenLoraLayer) for module in model.modules())
    assert layers == 6  # q, k, v, out, fc1, fc2 of the one layer that is read
    attention, ffn = 4 * 2 * 32, 2 * (32 + 48)
    assert measure_tower(model, 32).flops == tower.flops + 2 * 17 * 4 * (attention + ffn)  # 16 patches and the class
    detach(model, merge=False)
    attach(model, PartialLora(type="partial_lora", r=4))
    added = sum(matrix.flops for matrix in matrices(model)) - sum(matrix.flops for matrix in before)
    assert added == 2 * sum(p.numel() for n, p in model.named_parameters() if "loras_" in n)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r is 0, expected 1 or more"),
        ({"choose": "text"}, "visual, image, video or slice"),
        ({"sets": 2}, "choose='slice' has more"),
        ({"choose": "slice", "whole": "maybe"}, "own or none"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLoraConfig(target_modules=["q_proj"], **fields)


def test_what_cannot_be_known_is_asked_for(tiny_model: Any) -> None:
    model = adapted(llama(), config())
    with pytest.raises(ValueError, match="config that names no image_token_id"):
        model(IDS)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="outside a forward pass"):
        layer(torch.zeros(1, 7, 32, dtype=torch.float64))
    with use_sets(tokens=SETS), pytest.raises(ValueError, match="but the sets were given for"):
        model(IDS[:, :5])
    with use_sets(tokens=SETS + 1), pytest.raises(ValueError, match=r"got sets \[0, 1\]; the adapter has 1"):
        model(IDS)
    base, _ = tiny_model
    tower: Any = adapted(base, slices()).get_base_model().model.vision_tower
    with pytest.raises(ValueError, match="where they are in their pictures is unknown"):
        tower(torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="has none"):
        get_peft_model(llama(), slices())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (PartialLora(type="partial_lora", targets=["q_proj"]), "not below model.language_model; write a pattern"),
        (PartialLora(type="partial_lora", targets=["embed_tokens"]), "only linear layers"),
        (PartialLora(type="partial_lora", targets=["experts.down_proj"]), "is in an MoE layer"),
        (SliceLora(type="slice_lora", targets=["patch_embedding"]), "only linear layers"),
        (SliceLora(type="slice_lora", targets=["q_porj"]), "did you mean"),
    ],
)
def test_wrong_targets(tiny_model: Any, section: Any, message: str) -> None:
    model, _ = tiny_model
    upcycle_model(model, Upcycle(layers=[1], experts=4, top_k=2))
    with pytest.raises(TargetError, match=message) as caught:
        attach(model, section)
    assert caught.value.target == section.targets[0]
    assert not any(isinstance(module, TokenLoraLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "partial_lora", "targets": ["language", "vision"]}, "'vision' cannot be a target"),
        ({"type": "partial_lora", "targets": ["moe.experts"]}, "is for the language model's linear layers"),
        ({"type": "slice_lora", "targets": ["connector"]}, "is for the tower's linear layers"),
        ({"type": "slice_lora", "targets": ["vision", "vision"]}, "named twice"),
    ],
)
def test_wrong_sections(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TypeAdapter(Adapter).validate_python(section)
