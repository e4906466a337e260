"""LoRA on chosen experts of a stack: they learn, the others have no adapter and keep every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sparsevlm.adapters.attach import attach, detach, load_adapter, save_adapter
from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.adapter import Lora
from sparsevlm.recipe.moe import Upcycle
from sparsevlm.recipe.schema import Optim
from sparsevlm.train.parts import parameter_groups, select_trainable
from tests.adapters.test_every_type import batch_of, build, logits, loss_and_gradients

STACK = "model.language_model.layers.1.mlp.experts"
CHOSEN = Lora(type="lora", r=4, alpha=8, targets=["language.attention", "moe.experts"], experts=[2, 0])


def train(model: Any, batch: dict[str, Any], steps: int = 3) -> None:
    """Take some steps of AdamW with weight decay, as a stage does."""
    select_trainable(model, ["adapter", "connector"])
    optimizer = torch.optim.AdamW(parameter_groups(model, Optim(lr=1e-2, weight_decay=0.1)))
    for _ in range(steps):
        loss_and_gradients(model.train(), batch)
        optimizer.step()
    model.eval()


def stacks(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", "").removeprefix(f"{STACK}."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.startswith(f"{STACK}.") and not is_adapter_parameter(name)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_experts_change_and_the_others_keep_every_bit(
    tiny_parts: dict[str, str], tmp_path: Path, dtype: torch.dtype
) -> None:
    model, processor = build(tiny_parts, upcycled=True)
    model.to(dtype)
    model.save_pretrained(tmp_path / "parent")
    parent = stacks(model)
    attach(model, CHOSEN)
    train(model, batch_of(processor, packed=True))
    save_adapter(model, tmp_path / "adapter", tmp_path / "parent")
    again: Any = SparseVLMForConditionalGeneration.from_pretrained(tmp_path / "parent", dtype=dtype)
    load_adapter(again, tmp_path / "adapter")
    for merged in (model, again):
        detach(merged, merge=True)
        for name, weight in stacks(merged).items():
            for expert in range(4):
                same = torch.equal(weight[expert], parent[name][expert])
                assert same == (expert not in (0, 2)), (name, expert)
    for name, weight in model.state_dict().items():
        # the same products, by einsum in PEFT's layer and by matmul in ours: float32 rounding before the weight's own
        tolerance = 1e-7 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(weight, again.state_dict()[name], atol=tolerance, rtol=0)


def test_only_chosen_experts_have_parameters_and_count(tiny_parts: dict[str, str]) -> None:
    counts = {}
    for experts in ("all", [0], [0, 2]):
        model, _ = build(tiny_parts, upcycled=True)
        report = attach(model, Lora(type="lora", r=4, targets=["moe.experts"], experts=experts))
        trained = select_trainable(model, ["adapter"]).trainable
        assert report.trainable == trained
        with torch.device("meta"):
            meta = SparseVLMForConditionalGeneration(model.config)
        assert attach(meta, Lora(type="lora", r=4, targets=["moe.experts"], experts=experts)) == report
        counts[len(experts) if experts != "all" else 4] = trained
    # an expert: r (in + out) of both projections, Llama of width 32 with an FFN of 48
    assert counts == {n: n * 4 * ((32 + 96) + (48 + 32)) for n in (1, 2, 4)}


def test_it_computes_what_an_adapter_on_all_experts_computes_whose_others_are_zero(tiny_parts: dict[str, str]) -> None:
    some, processor = build(tiny_parts, upcycled=True)
    whole, _ = build(tiny_parts, upcycled=True)
    batch = batch_of(processor, packed=False)
    before = logits(some, batch)
    attach(some, CHOSEN)
    attach(whole, CHOSEN.model_copy(update={"experts": "all"}))
    assert torch.equal(logits(some, batch), before)
    train(some, batch)
    there = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in some.named_parameters():
            if not is_adapter_parameter(name) or ".experts." not in name:
                there[name].copy_(parameter)
                continue
            there[name].zero_()
            for place, expert in enumerate((0, 2)):
                if "lora_A" in name:  # an expert's rows are together
                    there[name][4 * expert : 4 * expert + 4] = parameter[4 * place : 4 * place + 4]
                else:  # an expert's columns are spread
                    there[name][:, expert::4] = parameter[:, place::2]
    assert torch.equal(logits(some, batch), logits(whole, batch))
    assert not torch.allclose(logits(some, batch), before, atol=1e-3)


def test_peft_gets_zeros_for_the_others(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    model, processor = build(tiny_parts, upcycled=True)
    model.save_pretrained(tmp_path / "parent")
    batch = batch_of(processor, packed=False)
    attach(model, CHOSEN)
    train(model, batch)
    want = logits(model, batch)
    save_adapter(model, tmp_path / "adapter", tmp_path / "parent")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in held.items() if ".experts." in key}
    assert len(kept) == 4
    for key, tensor in kept.items():
        experts = tensor.reshape(4, 4, -1) if "lora_A" in key else tensor.reshape(len(tensor), 4, 4).permute(2, 0, 1)
        assert [bool(expert.any()) for expert in experts] == [True, False, True, False]
    base: Any = SparseVLMForConditionalGeneration.from_pretrained(tmp_path / "parent")
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval(), batch), want)


def test_the_shared_expert_is_left_out_of_a_choice_unless_it_is_named(tiny_parts: dict[str, str]) -> None:
    for targets, shared in ((["moe.experts"], 0), (["moe.experts", "shared_expert.*"], 3)):
        model, _ = build(tiny_parts, upcycled=False)
        upcycle_model(model, Upcycle(layers=[1], shared_expert="gated"))
        report = attach(model, Lora(type="lora", targets=targets, experts=[1]))
        assert len([name for name in report.modules if "shared_expert" in name]) == shared


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"targets": ["moe.experts"], "experts": [4]}, "the stacks have 4: 0 to 3"),
        ({"targets": ["layers.0.*"], "experts": [1]}, "add 'moe.experts'"),
    ],
)
def test_experts_that_are_not_there_are_refused(
    tiny_parts: dict[str, str], section: dict[str, Any], message: str
) -> None:
    model, _ = build(tiny_parts, upcycled=True)
    with pytest.raises(ValueError, match=message):
        attach(model, Lora(type="lora", **section))
