"""Quantised weights: what they are, what computes with them, what they cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevlm.adapters.attach import attach, detach
from sparsevlm.adapters.names import is_adapter_parameter, without_wrappers
from sparsevlm.adapters.quantise import (
    Settings,
    packed_bytes,
    quantise,
    quantised_bytes,
    replayed,
    settings_of,
    weights_to_quantise,
)
from sparsevlm.adapters.quantised_stack import QuantisedStack, frozen_linear
from sparsevlm.moe.experts import Experts, MoeConfig, experts_class
from sparsevlm.recipe.adapter import Lora, QLora
from sparsevlm.train.parts import count_parameters, select_trainable
from tests.adapters.specs import stir
from tests.adapters.test_every_type import batch_of, build, logits, loss_and_gradients

bnb = pytest.importorskip("bitsandbytes")
KINDS = pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])


def alone(matrix: Tensor, kind: str, double: bool) -> Tensor:
    """What bitsandbytes itself makes of one matrix, in 4 bits laid out as one row (see `_dequantise4`)."""
    if kind == "int8":
        numbers, scales, _ = bnb.functional.int8_vectorwise_quant(matrix.half())
        return bnb.functional.int8_vectorwise_dequant(numbers, scales)
    numbers, state = bnb.functional.quantize_4bit(matrix.reshape(1, -1), compress_statistics=double, quant_type=kind)
    return bnb.functional.dequantize_4bit(numbers, state).reshape(matrix.shape)


def stack_of(experts: Experts, name: str, settings: Settings) -> tuple[QuantisedStack, Tensor]:
    """Quantise one stack in place; return it and its weights."""
    from sparsevlm.adapters.quantise import _replace

    _replace(experts, name, settings)
    stack = experts.get_parameter(name)
    assert isinstance(stack, QuantisedStack)
    return stack, stack.dequantise()


def small_experts(**shape: Any) -> Experts:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2} | shape
    return experts_class(True, False)(None, MoeConfig(**sizes, initializer_range=0.3))  # pyright: ignore


@KINDS
@pytest.mark.parametrize("double", [False, True])
def test_each_expert_is_what_bitsandbytes_makes_of_it_alone(kind: Any, double: bool) -> None:
    experts = small_experts(intermediate_size=20)  # 40 x 16: no multiple of 64 would be shared by two experts
    before = {name: weight.detach().clone() for name, weight in experts.named_parameters()}
    for name, weights in before.items():
        stack, whole = stack_of(experts, name, Settings(kind, double))
        for i, expert in enumerate(weights):
            assert torch.equal(whole[i], alone(expert, kind, double).float())
            assert torch.equal(stack[i].dequantise(), whole[i])
            error = (whole[i] - expert).abs().max() / expert.abs().max()
            # half a step: of 127; of 16, where the widest is from 0.7 to 1 (nf4) or from 2/3 to 1 (fp4), and a little
            # more where the constants are rounded
            assert 0 < error < (0.005 if kind == "int8" else 0.2)
        settings = Settings(kind, double, weights=(name,))
        assert torch.equal(replayed(name, weights, settings), whole)
        assert torch.equal(replayed("other", weights, settings), weights)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(16, 20), (40, 16), (48, 32), (3, 96), (5, 64), (7, 3)])
def test_four_bits_are_a_value_of_the_table_times_the_constant_of_the_block(kind: str, shape: tuple[int, int]) -> None:
    """Also where a block ends inside a row."""
    from sparsevlm.adapters.quantised_matrix import Packed4, quantise_matrix

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = quantise_matrix(weight, kind, False)
    assert isinstance(packed, Packed4)
    table = bnb.functional.get_4bit_type(kind, device="cpu")
    bits = packed.numbers.reshape(-1)
    values = table[torch.stack([bits >> 4, bits & 15], dim=1).reshape(-1).long()][: weight.numel()]
    largest = torch.stack([block.abs().max() for block in weight.reshape(-1).split(64)])
    want = (values * largest.repeat_interleave(64)[: weight.numel()]).reshape(shape)
    torch.testing.assert_close(packed.dequantise(torch.float32), want, atol=0, rtol=1e-6)
    steps = table.sort().values.diff().max() / 2 * largest.repeat_interleave(64)[: weight.numel()].reshape(shape)
    assert bool(((want - weight).abs() <= steps + 1e-6).all())


@pytest.mark.parametrize("kernel", ["eager", "sorted_mm", "batched_mm", "grouped_mm", "auto"])
@pytest.mark.parametrize("compute", ["auto", "bfloat16"])
def test_every_kernel_computes_with_the_dequantised_weights(kernel: str, compute: str) -> None:
    experts = small_experts()
    experts.config = MoeConfig(16, 24, 3, 2, experts_implementation=kernel)  # pyright: ignore
    reference = copy.deepcopy(experts)
    settings = Settings("nf4", compute_dtype=compute)
    for name, weight in list(reference.named_parameters()):
        _, whole = stack_of(experts, name, settings)
        weight.data = whole
    reference.config = MoeConfig(16, 24, 3, 2, experts_implementation="eager")  # pyright: ignore
    x = torch.randn(7, 16)
    index, weights = torch.randint(0, 3, (7, 2)), torch.rand(7, 2)
    outputs, gradients = [], []
    for model in (experts, reference):
        inputs = x.clone().requires_grad_()
        output = model(inputs, index, weights)
        (output * torch.arange(16.0)).sum().backward()
        outputs.append(output.detach())
        gradients.append(inputs.grad)
    # float32: sums in another order; bfloat16 has 8 bits, on values of about 1 (gradients: 15 times that and sums)
    assert outputs[0].dtype == torch.float32
    loose = compute == "bfloat16"
    torch.testing.assert_close(outputs[0], outputs[1], atol=0.05 if loose else 1e-5, rtol=0.02 if loose else 1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=2.0 if loose else 1e-4, rtol=0.05 if loose else 1e-5)


@KINDS
def test_gradients_are_those_of_a_model_with_the_dequantised_weights(tiny_parts: dict[str, str], kind: Any) -> None:
    """The reference is plain LoRA in float32 on weights that were quantised and dequantised before."""
    targets = ["language", "vision", "moe.experts", "moe.router"]
    model, processor = build(tiny_parts, upcycled=True)
    reference = copy.deepcopy(model)
    section = QLora(type="qlora", r=4, targets=targets, quantisation=kind, quantise=["language", "vision"])
    attach(model, section)
    settings = settings_of(model)
    assert settings is not None
    for name, weight in reference.named_parameters():
        weight.data = replayed(name, weight.data, settings)
    attach(reference, Lora(type="lora", r=4, targets=targets))
    batch = batch_of(processor, packed=False)
    found = []
    for each in (model, reference):
        select_trainable(each, ["adapter", "connector"])
        stir(each)
        found.append(loss_and_gradients(each.train(), batch))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():  # float32: the same products, sums in another order at most
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-4, msg=f"{name} differs")


def test_backward_keeps_no_dequantised_weight() -> None:
    kept: list[Tensor] = []
    experts = small_experts()
    for name, _ in list(experts.named_parameters()):
        stack_of(experts, name, Settings())
    x = torch.randn(5, 16, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for kernel in ("eager", "sorted_mm", "grouped_mm"):
        kept.clear()
        experts.config = MoeConfig(16, 24, 3, 2, experts_implementation=kernel)  # pyright: ignore
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            experts(x, torch.randint(0, 3, (5, 2)), torch.rand(5, 2))
        plain = [t for t in kept if not isinstance(t, QuantisedStack)]
        assert plain and all(t.numel() < 48 * 16 for t in plain), kernel


@pytest.mark.parametrize("upcycled", [False, True])
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)])
def test_nothing_is_left_out_and_bytes_are_counted_truly(
    tiny_parts: dict[str, str], upcycled: bool, kind: Any, double: bool
) -> None:
    model, _ = build(tiny_parts, upcycled)
    before = dict(model.named_parameters())
    counted = count_parameters(model.requires_grad_(False))
    parts = ["language", "vision", "connector"]
    settings = Settings(kind, double, weights=weights_to_quantise(model, parts))
    report = quantise(model, settings)
    layers = ("language_model.layers.", "connector.", "vision_tower.encoder.layers.0.")  # layer 1 is not used
    expected = {
        name
        for name, weight in before.items()
        if weight.ndim > 1 and ".gate.weight" not in name and any(part in name for part in layers)
    }
    assert set(settings.weights) == expected and report.left == ()
    assert report.layers + report.stacks == len(expected) and report.stacks == (2 if upcycled else 0)
    assert count_parameters(model) == counted
    real = 0
    for name, parameter in model.named_parameters():
        size = quantised_bytes(parameter)
        assert (size is not None) == (name in expected), name
        if size is not None:
            assert size == packed_bytes(before[name].shape, settings)
            real += size
        else:
            assert torch.equal(parameter, before[name])
    assert report.after == real and report.before == sum(before[name].nbytes for name in expected)
    assert report.parameters == sum(before[name].numel() for name in expected)


def test_what_stays_is_named(tiny_parts: dict[str, str]) -> None:
    model, _ = build(tiny_parts, upcycled=False)
    names = weights_to_quantise(model, ["language"])
    report = quantise(model, Settings(weights=names[1:]))
    assert report.left == names[:1] and names[0] in report.describe()


def test_other_types_and_a_copy_leave_the_bits_alone(tiny_parts: dict[str, str]) -> None:
    model, processor = build(tiny_parts, upcycled=True)
    quantise(model, Settings(weights=weights_to_quantise(model, ["language"])))
    batch = batch_of(processor, packed=False)
    want = logits(model, batch)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again, batch), want)
    again.to(torch.bfloat16).to(torch.float32)  # rounds what is not quantised, and nothing else
    for (name, weight), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        if quantised_bytes(weight) is None:
            continue
        if isinstance(weight, QuantisedStack):
            assert isinstance(other, QuantisedStack) and other.dtype == torch.float32
            assert torch.equal(weight.dequantise(), other.dequantise()), name
        else:
            assert weight.dtype == torch.uint8 and torch.equal(weight.data, other.data), name


def test_autocast_computes_in_its_type(tiny_parts: dict[str, str]) -> None:
    model, processor = build(tiny_parts, upcycled=True)
    quantise(model, Settings(weights=weights_to_quantise(model, ["language"])))
    layer: Any = model.model.language_model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = layer(x), F.linear(x, layer.dequantise(torch.float32))
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want)
    batch = batch_of(processor, packed=False)
    exact = logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model, batch).float(), exact, atol=0.02, rtol=0)  # 8 bits, on logits of 0.4


def test_frozen_linear_is_linear() -> None:
    weight, bias = torch.randn(5, 4), torch.randn(5, requires_grad=True)
    x = torch.randn(2, 3, 4, requires_grad=True)
    found = []
    for run in (lambda: frozen_linear(x, weight.to, bias), lambda: F.linear(x, weight, bias)):
        output = run()
        found.append((output, *torch.autograd.grad(output.pow(2).sum(), (x, bias))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_quantised_models_are_not_saved_or_merged_into(tiny_parts: dict[str, str], tmp_path: Any) -> None:
    model, _ = build(tiny_parts, upcycled=False)
    attach(model, QLora(type="qlora", r=2))
    with pytest.raises(ValueError, match="are quantised for an adapter"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not merged into quantised"):
        detach(model, merge=True)
    assert not any(".absmax" in key or "quant_state" in key for key in model.state_dict())
    detach(model, merge=False)
    assert settings_of(model) is not None and not any(
        is_adapter_parameter(name) for name, _ in model.named_parameters()
    )
    assert {without_wrappers(name) for name, _ in model.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_what_cannot_be_quantised_is_refused(tiny_parts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build(tiny_parts, upcycled=False)
    with pytest.raises(ValueError, match="no multiple of 64 wide"):
        attach(model, QLora(type="qlora", dora=True))
    with pytest.raises(ValueError, match="no weight lost"):
        quantise(model, Settings(weights=("lost",)))
    model.model.connector = nn.ModuleList([nn.Identity()])
    with pytest.raises(ValueError, match="no linear layers"):
        weights_to_quantise(model, ["connector"])
    monkeypatch.setattr("sparsevlm.adapters.quantise.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'sparsevlm\[quant\]'"):
        attach(model, QLora(type="qlora", r=2))
