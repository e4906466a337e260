"""The MoE block with shared experts and padding; alone and inside a decoder."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevlm.moe.block import SparseMoeBlock, install_moe, moe_config
from sparsevlm.moe.experts import MoeConfig
from sparsevlm.moe.ffn import read_layout
from sparsevlm.moe.padding import leave_out_padding, padding_mask
from sparsevlm.moe.router import collect_routing
from tests.moe.common import CONFIGS, build
from tests.moe.test_rebuild import Outer, OuterConfig, moe_blocks

SHAPE = MoeConfig(16, 24, 4, 2, router_init_std=0.5, initializer_range=0.3)
MOE = {"layers": [0, 2], "num_experts": 4, "num_experts_per_tok": 2, "router_init_std": 0.5}
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1]])


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def shared(kind: str) -> SparseMoeBlock:
    return SparseMoeBlock(replace(SHAPE, shared_expert=kind), shared_expert=Ffn())


def outer(**changes: Any) -> Any:
    """A whole model with fresh, unequal experts."""
    torch.manual_seed(0)
    return Outer(OuterConfig(CONFIGS["llama"](), MOE | changes))


# ---- shared experts ----------------------------------------------------------------------------------------------


def test_gated_shared_expert_equals_its_formula() -> None:
    block, hidden = shared("gated"), torch.randn(2, 5, 16)
    plain = SparseMoeBlock(SHAPE)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if k.startswith(("gate.", "experts."))})
    for b, t in ((0, 0), (1, 4)):
        x = hidden[b, t]
        gate = 1 / (1 + torch.exp(-(block.shared_expert_gate.weight[0] @ x)))
        torch.testing.assert_close(block(hidden)[b, t], plain(hidden)[b, t] + gate * block.shared_expert(x))


def test_residual_shared_expert_equals_its_formula() -> None:
    block, hidden = shared("residual"), torch.randn(2, 5, 16)
    with torch.no_grad():
        block.coefficient.bias.copy_(torch.tensor([0.7, -0.4]))
    plain = SparseMoeBlock(SHAPE)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if k.startswith(("gate.", "experts."))})
    for b, t in ((0, 0), (1, 4)):
        x = hidden[b, t]
        a, c = torch.exp(block.coefficient.weight @ x + block.coefficient.bias)
        expected = (a * plain(hidden)[b, t] + c * block.shared_expert(x)) / (a + c)
        torch.testing.assert_close(block(hidden)[b, t], expected)


def test_config_and_ffn_must_agree() -> None:
    with pytest.raises(ValueError, match="shared_expert='gated', but it was given no FFN"):
        SparseMoeBlock(replace(SHAPE, shared_expert="gated"))
    with pytest.raises(ValueError, match="shared_expert='none', but it was given Ffn"):
        SparseMoeBlock(SHAPE, shared_expert=Ffn())
    with pytest.raises(ValueError, match="one of none, residual, gated"):
        replace(SHAPE, shared_expert="both")
    with pytest.raises(ValueError, match="one of softmax, topk_softmax, sigmoid"):
        replace(SHAPE, scoring_func="relu")
    with pytest.raises(ValueError, match="needs 'sigmoid'"):
        replace(SHAPE, bias_update_rate=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gated", "residual", "bias"])
def test_save_and_load_is_exact(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """The balance bias also stays float32 in a model of bfloat16."""
    extra = {"scoring_func": "sigmoid", "bias_update_rate": 0.1} if kind == "bias" else {"shared_expert": kind}
    model = outer(**extra).to(dtype)
    for block in moe_blocks(model):
        if kind == "bias":
            block.gate.e_score_correction_bias.normal_()
    model.save_pretrained(tmp_path)
    loaded, info = Outer.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    want, got = model.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    names = {"gated": "shared_expert_gate.weight", "residual": "coefficient.bias", "bias": "e_score_correction_bias"}
    assert any(name.endswith(names[kind]) for name in want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    if dtype == torch.float32:
        ids = torch.randint(0, 50, (2, 9))
        outputs = [m.eval().model.language_model(ids).last_hidden_state for m in (model, loaded)]
        assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("extra", "lost"),
    [
        ({"shared_expert": "gated"}, ["shared_expert_gate.weight", "shared_expert.up_proj.weight"]),
        ({"shared_expert": "residual"}, ["coefficient.weight", "coefficient.bias", "shared_expert.down_proj.weight"]),
        ({"scoring_func": "sigmoid", "bias_update_rate": 0.1}, ["gate.e_score_correction_bias"]),
    ],
)
def test_what_a_checkpoint_lacks_is_drawn_not_garbage(tmp_path: Path, extra: Any, lost: list[str]) -> None:
    outer(**extra).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    names = [f"model.language_model.layers.2.mlp.{name}" for name in lost]
    save_file({name: value for name, value in weights.items() if name not in names}, path, {"format": "pt"})
    loaded, info = Outer.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(names)
    for name in names:
        tensor = loaded.state_dict()[name]
        if name.endswith("bias"):
            assert not tensor.any()
        else:  # the decoder's standard deviation is 0.2, the router's 0.5
            std = 0.2 if "shared_expert." in name else 0.5
            assert float(tensor.std()) == pytest.approx(std, rel=0.4), name
    kept = "model.language_model.layers.0.mlp.gate.weight"
    assert torch.equal(loaded.state_dict()[kept], weights[kept])


@pytest.mark.parametrize("name", ["llama", "llama_bias", "phi", "gpt2"])
@pytest.mark.parametrize("kind", ["gated", "residual"])
def test_any_ffn_becomes_the_shared_expert(name: str, kind: str) -> None:
    model = build(name)
    ffn = next(module.mlp for module in model.modules() if hasattr(module, "mlp"))
    weight = next(ffn.parameters()).detach().clone()
    install_moe(model, model.config, MOE | {"layers": [0], "shared_expert": kind})
    (block,) = moe_blocks(model)
    assert block.shared_expert is ffn
    assert torch.equal(next(block.shared_expert.parameters()), weight)
    assert model(torch.randint(0, 50, (2, 9))).last_hidden_state.isfinite().all()


def test_narrow_experts_follow_the_config() -> None:
    model = build("llama")
    layout = read_layout(model.layers[0].mlp, model.config)
    config = moe_config(layout, model.config, MOE | {"moe_intermediate_size": 16, "num_experts": 12})
    assert (config.intermediate_size, layout.intermediate_size) == (16, 48)
    old = moe_config(layout, model.config, {"num_experts": 4, "num_experts_per_tok": 2})
    assert (old.intermediate_size, old.scoring_func, old.capacity_factor, old.shared_expert) == (
        48, "softmax", None, "none",
    )  # fmt: skip


def test_shared_expert_on_the_meta_device() -> None:
    want = {name: value.shape for name, value in outer(shared_expert="gated").state_dict().items()}
    with torch.device("meta"):
        empty = Outer(OuterConfig(CONFIGS["llama"](), MOE | {"shared_expert": "gated"}))
    assert {name: value.shape for name, value in empty.state_dict().items()} == want


# ---- padding -----------------------------------------------------------------------------------------------------


def run(model: Any, ids: Tensor, mask: Tensor | None, told: bool = True) -> tuple[Tensor, list[Any]]:
    """Hidden states of a decoder and what its routers did; `told`: the blocks know the padding."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with leave_out_padding(model, mask if told else None), collect_routing() as collected:
        options = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        return model(ids, **options).last_hidden_state, collected


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(
    "extra", [{}, {"shared_expert": "residual"}, {"eval_capacity_factor": 0.75, "min_capacity": 0}]
)
def test_padded_rows_are_routed_as_they_are_alone(extra: dict[str, Any], kernel: str) -> None:
    """With a capacity, a row alone is compared with the same row behind padding: others would compete for places."""
    model = outer(experts_implementation=kernel, **extra).eval().model.language_model
    ids = torch.randint(3, 50, MASK.shape)
    rows = [[0], [1], [2]] if "eval_capacity_factor" in extra else [[0, 1, 2]]
    for group in rows:
        together, collected = run(model, ids[group], MASK[group])
        for place, row in enumerate(group):
            keep = MASK[row].bool()
            alone, single = run(model, ids[row][keep][None], None)
            torch.testing.assert_close(together[place][keep], alone[0], atol=2e-6, rtol=1e-5)
            for layer, other in zip(collected, single, strict=True):
                assert torch.equal(layer.index.view(len(group), 7, 2)[place][keep], other.index)
                assert bool((layer.index.view(len(group), 7, 2)[place][~keep] == -1).all())
    if "eval_capacity_factor" in extra:
        assert bool((other.index == -1).any())  # something was dropped, or this shows nothing


def test_the_output_at_padding_is_zero() -> None:
    block, hidden = SparseMoeBlock(SHAPE), torch.randn(3, 7, 16)
    with leave_out_padding(block, MASK):
        output = block(hidden)
    assert not output[~MASK.bool()].any()
    torch.testing.assert_close(output[MASK.bool()], block(hidden)[MASK.bool()])
    hidden[~MASK.bool()] = float("nan")  # whatever stands there
    with leave_out_padding(block, MASK):
        assert torch.equal(block(hidden)[MASK.bool()], output[MASK.bool()])


@pytest.mark.parametrize("enable_on", ["decoder", "outer"])
def test_recomputation_knows_the_padding(enable_on: str) -> None:
    """Padding would compete for places, and only in the recomputed pass: gradients would be of another function."""
    whole = outer(capacity_factor=0.6, min_capacity=0, router_jitter_noise=0.1).train()
    model = whole.model.language_model
    ids = torch.randint(3, 50, MASK.shape)

    def gradients(told: bool = True) -> dict[str, Tensor]:
        torch.manual_seed(5)
        output, collected = run(model, ids, MASK, told)
        loss = output[MASK.bool()].square().mean() + sum(
            item.logits[MASK.flatten().bool()].mean() for item in collected
        )
        names = dict(model.named_parameters())
        return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))

    plain, ignorant = gradients(), gradients(told=False)
    gate = "layers.2.mlp.gate.weight"
    assert float((plain[gate] - ignorant[gate]).abs().max()) > 1e-3  # the mask matters here
    (model if enable_on == "decoder" else whole).gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):  # the second pass must not wrap again
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[name], rtol=0, atol=0, msg=name)
    assert not hasattr(model.layers[0]._gradient_checkpointing_func.checkpoint, "checkpoint")
    # A pass without padding through the same layers sees none.
    again, _ = run(model, ids, torch.ones_like(MASK))
    fresh, _ = run(model, ids, None)
    assert again.shape == fresh.shape
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        gradients()


def test_two_passes_before_one_backward_keep_their_own_masks() -> None:
    model = outer(capacity_factor=0.6, min_capacity=0).train().model.language_model
    ids, other = torch.randint(3, 50, MASK.shape), torch.ones_like(MASK)
    other[:, :2] = 0
    weights = [model.layers[0].mlp.gate.weight, model.layers[2].mlp.experts.down_proj]

    def both() -> list[Tensor]:
        loss = sum(run(model, ids, mask)[0][mask.bool()].square().mean() for mask in (MASK, other))
        return list(torch.autograd.grad(loss, weights))  # pyright: ignore

    plain = both()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for got, want in zip(both(), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_decoders_that_cannot_be_told_are_refused() -> None:
    class Foreign(nn.Module):
        is_gradient_checkpointing = True

    refused = pytest.raises(ValueError, match=r"Foreign are no GradientCheckpointingLayer.*pack the rows")
    with refused, leave_out_padding(Foreign().train(), MASK):
        pass
    with leave_out_padding(Foreign().train(), torch.ones_like(MASK)):  # nothing to tell
        pass


def test_masks_of_pairs_are_refused_where_places_are_few() -> None:
    pairs = torch.ones(2, 1, 5, 5)
    assert padding_mask(pairs, {"moe": MOE}, True, 7) is None
    assert torch.equal(padding_mask(MASK, {"moe": MOE | {"capacity_factor": 1.0}}, True, 7), MASK)
    assert torch.equal(padding_mask(MASK, {"moe": MOE}, True, 3), MASK[:, -3:])  # the others are in the cache
    assert padding_mask({"full": pairs}, {"moe": MOE | {"capacity_factor": 1.0}}, False, 7) is None
    with pytest.raises(ValueError, match=r"capacity_factor is 1.0.*got \(2, 1, 5, 5\)"):
        padding_mask(pairs, {"moe": MOE | {"capacity_factor": 1.0}}, True, 7)


def test_masked_tokens_give_no_gradient() -> None:
    block = copy.deepcopy(SparseMoeBlock(SHAPE)).train()
    hidden = torch.randn(3, 7, 16, requires_grad=True)
    with leave_out_padding(block, MASK):
        F.mse_loss(block(hidden), torch.ones(3, 7, 16)).backward()
    assert hidden.grad is not None
    assert not hidden.grad[~MASK.bool()].any()
    assert hidden.grad[MASK.bool()].any()
