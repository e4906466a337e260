"""Experts: the eager body against a loop over tokens, every kernel against the eager body."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevlm.moe.block import SparseMoeBlock
from sparsevlm.moe.experts import MoeConfig, choose_implementation, experts_class

KINDS = [(True, False), (True, True), (False, False), (False, True)]
KERNELS = ["batched_mm", "grouped_mm"]


def shape(gated: bool, bias: bool, **changes: object) -> MoeConfig:
    base = MoeConfig(
        hidden_size=16,
        intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        hidden_act="silu" if gated else "gelu_new",
        gated=gated,
        bias=bias,
        initializer_range=0.3,
        router_init_std=0.5,
    )
    return replace(base, **changes)


def block(config: MoeConfig) -> SparseMoeBlock:
    torch.manual_seed(3)
    module = SparseMoeBlock(config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_()
    return module


def naive(module: SparseMoeBlock, hidden: Tensor) -> Tensor:
    """One token, one expert at a time."""
    experts = module.experts
    rows = []
    for token in hidden.reshape(-1, hidden.shape[-1]):
        _, weights, index = module.gate(token[None])
        total = torch.zeros_like(token)
        for weight, e in zip(weights[0], index[0].tolist()):
            x = getattr(experts, experts.up_name)[e] @ token
            if experts.has_bias:
                x = x + getattr(experts, f"{experts.up_name}_bias")[e]
            if experts.has_gate:
                x = F.silu(x[:24]) * x[24:]
            else:
                x = F.gelu(x, approximate="tanh")
            x = experts.down_proj[e] @ x
            if experts.has_bias:
                x = x + experts.down_proj_bias[e]
            total = total + weight * x
        rows.append(total)
    return torch.stack(rows).view_as(hidden)


def run(module: SparseMoeBlock, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and the gradients of input and all parameters."""
    hidden = hidden.clone().requires_grad_()
    output = module(hidden)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    return output.detach(), list(torch.autograd.grad((output.float() * weight).sum(), [hidden, *module.parameters()]))


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_eager_equals_naive(gated: bool, bias: bool, top_k: int) -> None:
    module = block(shape(gated, bias, num_experts_per_tok=top_k))
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    torch.testing.assert_close(module(hidden), naive(module, hidden), rtol=1e-5, atol=1e-5)
    inputs = [hidden, *module.parameters()]
    got = torch.autograd.grad(module(hidden).square().sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(naive(module, hidden).square().sum(), inputs, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_kernels_equal_eager(gated: bool, bias: bool, kernel: str) -> None:
    config = shape(gated, bias)
    hidden = torch.randn(3, 7, 16)
    output, gradients = run(block(config), hidden)
    other, other_gradients = run(block(replace(config, experts_implementation=kernel)), hidden)
    torch.testing.assert_close(other, output, rtol=1e-5, atol=1e-5)
    for got, expected in zip(other_gradients, gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expert_without_tokens_gets_zero_gradient(kernel: str) -> None:
    """Every kernel must still touch its parameters, or ranks of a sharded run disagree."""
    module = block(shape(True, False, experts_implementation=kernel, num_experts_per_tok=1))
    with torch.no_grad():
        module.gate.weight.zero_()  # all ties: everything goes to expert 0
    _, gradients = run(module, torch.randn(1, 4, 16))
    for gradient in gradients[2:]:
        assert gradient[0].abs().sum() > 0
        assert (gradient[1:] == 0).all()


@pytest.mark.parametrize("kernel", ["eager", *KERNELS])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_within_its_rounding(kernel: str, autocast: bool) -> None:
    """Measured over 20 seeds: at most 0.012 of the largest output, bfloat16 weights and autocast alike."""
    config = shape(True, True)
    hidden = torch.randn(2, 9, 16)
    module = block(config)
    if not autocast:  # the same rounded numbers on both sides: what is left is the kernel's own rounding
        module, hidden = module.bfloat16(), hidden.bfloat16()
    reference = block(config)
    reference.load_state_dict({name: value.float() for name, value in module.state_dict().items()})
    expected = reference(hidden.float())
    module.experts.config = replace(config, experts_implementation=kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = module(hidden)
    assert (output.float() - expected).abs().max() <= 0.02 * expected.abs().max()


def test_grouped_mm_follows_autocast() -> None:
    """transformers' kernel would compute in the weights' float32; ours hands it weights in the autocast type."""
    module = block(shape(True, True, experts_implementation="grouped_mm"))
    hidden = torch.randn(1, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(hidden)
    assert output.dtype == torch.bfloat16  # as `linear` would return
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_the_kernel_is_read_at_every_call() -> None:
    class Config:
        _experts_implementation = "eager"

    config = Config()
    module = SparseMoeBlock(shape(True, False), config)
    module(torch.randn(1, 2, 16))
    config._experts_implementation = "no_such_kernel"
    with pytest.raises(KeyError, match="no_such_kernel"):
        module(torch.randn(1, 2, 16))


def test_choose_implementation() -> None:
    assert choose_implementation("grouped_mm", 16, 24) == "grouped_mm"
    assert choose_implementation("grouped_mm", 12, 24) == "eager"  # rows of grouped_mm are aligned to 16 bytes
    assert choose_implementation("batched_mm", 12, 7) == "batched_mm"
    with pytest.raises(ValueError, match="grouped"):
        choose_implementation("grouped", 16, 16)


def test_parameter_names_and_shapes_are_transformers() -> None:
    gated = {name: tuple(p.shape) for name, p in block(shape(True, True)).named_parameters()}
    assert gated == {
        "gate.weight": (4, 16),
        "experts.gate_up_proj": (4, 48, 16),
        "experts.down_proj": (4, 16, 24),
        "experts.gate_up_proj_bias": (4, 48),
        "experts.down_proj_bias": (4, 16),
    }
    plain = {name for name, _ in block(shape(False, False)).named_parameters()}
    assert plain == {"gate.weight", "experts.up_proj", "experts.down_proj"}
    assert experts_class(True, False) is experts_class(True, False)


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = SparseMoeBlock(shape(True, False, experts_implementation="batched_mm"))
        assert module(torch.randn(2, 3, 16)).shape == (2, 3, 16)


def test_more_experts_a_token_than_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and the 4 experts"):
        shape(True, False, num_experts_per_tok=5)


def test_dropout_of_the_dense_ffn_is_kept() -> None:
    module = block(shape(True, False, dropout=0.5))
    hidden = torch.randn(1, 200, 16)
    assert 0.4 < (module.train()(hidden) == 0).float().mean() < 0.6
    assert (module.eval()(hidden) != 0).all()
