"""What holds for every type of adapter, on a dense and on an upcycled model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsevlm.adapters import qlora
from sparsevlm.adapters.attach import attach, detach, load_adapter, save_adapter
from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.adapters.quantise import Settings, quantise
from sparsevlm.adapters.saved import QUANTISATION, read_parent
from sparsevlm.data.collate import Collator
from sparsevlm.model.build import build_model
from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.adapter import ADAPTERS
from sparsevlm.recipe.moe import Upcycle
from sparsevlm.train.parts import count_parameters, select_trainable
from tests import tiny
from tests.adapters.specs import SPECS, Case, stir
from tests.train.toy import toy_sample

EVERY = pytest.mark.parametrize("case", SPECS, ids=lambda case: case.name)


@pytest.fixture(params=[False, True], ids=["dense", "upcycled"])
def upcycled(request: pytest.FixtureRequest) -> bool:
    return request.param


def build(parts: dict[str, str], upcycled: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = build_model(tiny.recipe_model(parts))
    if upcycled:
        upcycle_model(model, Upcycle(layers=[1], experts=4, top_k=2))
    return model.eval(), processor


def batch_of(processor: Any, packed: bool) -> dict[str, Any]:
    """Four samples, the first and last text only: two rows of two when packed, else four padded rows."""
    samples = [processor.encode(toy_sample(i)) for i in range(4)]
    rows = [samples[:2], samples[2:]] if packed else [[sample] for sample in samples]
    batches = Collator(processor.tokenizer.pad_token_id, packed=packed)(rows)
    return {key: value for key, value in batches.items() if key not in ("sample_ids", "rows")}


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, aux_loss_scale=0.0).loss  # auxiliary losses are means over rows: packing changes them
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def test_every_type_of_the_recipe_is_tested() -> None:
    assert {case.type for case in SPECS} == set(ADAPTERS)


@EVERY
def test_the_start_is_the_parent(tiny_parts: dict[str, str], case: Case, upcycled: bool) -> None:
    model, processor = build(tiny_parts, upcycled)
    batch = batch_of(processor, packed=False)
    parent = model
    if case.type == "qlora":  # what the adapter is put on is the quantised parent
        parent = copy.deepcopy(model)
        qlora.prepare(parent, case.on(upcycled))
        assert 1e-4 < (logits(parent, batch) - logits(model, batch)).abs().max() < 0.5
    want = logits(parent, batch)
    attach(model, case.on(upcycled))
    # float32; adding exact zeros changes nothing, DoRA divides by a norm and multiplies with it
    torch.testing.assert_close(logits(model, batch), want, atol=1e-6, rtol=0)


@EVERY
def test_gradients_reach_every_adapter_parameter_and_no_frozen_one(
    tiny_parts: dict[str, str], case: Case, upcycled: bool
) -> None:
    model, processor = build(tiny_parts, upcycled)
    attach(model, case.on(upcycled))
    select_trainable(model, ["adapter", "connector"])
    stir(model)
    _, gradients = loss_and_gradients(model.train(), batch_of(processor, packed=False))
    for name, parameter in model.named_parameters():
        trains = is_adapter_parameter(name) or name.startswith("model.connector.")
        assert parameter.requires_grad == trains, name
        if any(mark in name for mark, _ in case.unreached):
            continue
        assert (name in gradients and bool(gradients[name].any())) == trains, name


@EVERY
def test_packed_rows_give_the_same_loss_and_gradients(tiny_parts: dict[str, str], case: Case, upcycled: bool) -> None:
    model, processor = build(tiny_parts, upcycled)
    attach(model, case.on(upcycled))
    select_trainable(model, ["adapter", "connector"])
    stir(model)
    model.train()
    want, padded = loss_and_gradients(model, batch_of(processor, packed=False))
    got, packed = loss_and_gradients(model, batch_of(processor, packed=True))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)  # float32, sums in another order
    assert packed.keys() == padded.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, padded[name], atol=1e-5, rtol=1e-3, msg=f"{name} differs")


@EVERY
def test_recomputation_gives_the_same_gradients(tiny_parts: dict[str, str], case: Case, upcycled: bool) -> None:
    model, processor = build(tiny_parts, upcycled)
    attach(model, case.on(upcycled))
    select_trainable(model, ["adapter", "connector"])
    stir(model)
    model.train()
    batch = batch_of(processor, packed=True)
    want, plain = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got, recomputed = loss_and_gradients(model, batch)
    assert torch.equal(got, want)
    assert recomputed.keys() == plain.keys()
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5, msg=f"{name} differs")


@EVERY
def test_what_is_saved_comes_back_to_the_bit(
    tiny_parts: dict[str, str], case: Case, upcycled: bool, tmp_path: Path
) -> None:
    model, processor = build(tiny_parts, upcycled)
    parent = tmp_path / "parent"
    model.save_pretrained(parent)
    batch = batch_of(processor, packed=False)
    before = logits(model, batch)
    attach(model, case.on(upcycled))
    select_trainable(model, ["adapter", "connector"])
    stir(model)
    for parameter in model.model.connector.parameters():
        parameter.data += 0.01
    want = logits(model, batch)
    assert not torch.allclose(want, before, atol=1e-3)
    save_adapter(model, tmp_path / "adapter", parent)
    again: Any = SparseVLMForConditionalGeneration.from_pretrained(parent)
    if QUANTISATION in read_parent(tmp_path / "adapter"):
        quantise(again, Settings.from_dict(read_parent(tmp_path / "adapter")[QUANTISATION]))
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), batch), want)


@EVERY
def test_the_meta_device_counts_the_same(tiny_parts: dict[str, str], case: Case, upcycled: bool) -> None:
    model, _ = build(tiny_parts, upcycled)
    with torch.device("meta"):
        meta = SparseVLMForConditionalGeneration(model.config)
    want, got = attach(model, case.on(upcycled), seed=1), attach(meta, case.on(upcycled))
    assert got == want
    assert count_parameters(meta) == count_parameters(model) | {"trainable": 0}
    assert all(parameter.is_meta for parameter in meta.parameters())
    names = {name.replace(".base_layer", "") for name, _ in model.named_parameters() if not is_adapter_parameter(name)}
    detach(meta, merge=False)
    assert {name for name, _ in meta.named_parameters()} == names
