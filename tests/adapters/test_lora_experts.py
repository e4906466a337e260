"""Mixture of LoRA experts: a loop over tokens and experts, its losses by hand, its counts, and PEFT's verbs.

Models are float64; routers compute in float32 whatever surrounds them, so a token's weights carry errors of 1e-7.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config

from sparsevlm.adapters.attach import attach, detach
from sparsevlm.adapters.lora_experts import LoraExpertsConfig
from sparsevlm.adapters.lora_experts.layer import LoraExpertsFfn, LoraExpertsLinear
from sparsevlm.model.configuration_text import SparseVLMTextConfig
from sparsevlm.model.modeling_text import SparseVLMTextForCausalLM
from sparsevlm.moe.padding import leave_out_padding
from sparsevlm.moe.router import TopKRouter, collect_routing
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.adapter import LoraExperts
from sparsevlm.recipe.moe import Router, Upcycle
from sparsevlm.train.balance import balance_callbacks
from sparsevlm.train.flops import matrices
from sparsevlm.train.parts import count_parameters, select_trainable
from tests import tiny
from tests.adapters.specs import stir
from tests.adapters.test_every_type import batch_of

IDS = torch.arange(3, 17).view(2, 7)


def llama() -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny.text_config(attn_implementation="eager"))
    return made.double().eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return AutoModelForCausalLM.from_config(config).double().eval()


def settings(**fields: Any) -> LoraExpertsConfig:
    """Four experts whose router is sure of itself."""
    return LoraExpertsConfig(**{"r": 3, "lora_alpha": 6, "router_init_std": 1.0, **fields})


def adapted(model: Any, **fields: Any) -> Any:
    """The model with an adapter that does something, in float64 throughout."""
    made: Any = get_peft_model(model, settings(**fields)).double().eval()
    stir(made)
    return made


def ffns(model: Any) -> list[LoraExpertsFfn]:
    return [module for module in model.modules() if isinstance(module, LoraExpertsFfn)]


def token_weights(router: TopKRouter, x: Tensor) -> list[tuple[int, float]]:
    """Experts and weights of one token ``(H,)``, from the definition of each scoring."""
    logits = router.weight.detach().float() @ x.float()
    chosen = sorted(range(router.num_experts), key=lambda e: -float(logits[e]))[: router.top_k]
    if router.scoring_func == "sigmoid":
        scores = logits.sigmoid()
    elif router.scoring_func == "softmax":
        scores = logits.softmax(0)
    else:
        scores = torch.zeros_like(logits)
        scores[chosen] = logits[chosen].softmax(0)
    total = float(scores[chosen].sum()) if router.norm_topk_prob else 1.0
    return [(e, float(scores[e]) / total) for e in chosen]


def naive_linear(layer: Any, x: Tensor, experts: list[tuple[int, float]], scaling: float) -> Tensor:
    """One token through a linear layer and its experts."""
    out = layer.base_layer(x[None])[0]
    for e, weight in experts:
        out = out + scaling * weight * (layer.mole_B["default"].weight[e].T @ (layer.mole_A["default"].weight[e] @ x))
    return out


def naive_ffn(ffn: LoraExpertsFfn, x: Tensor) -> Tensor:
    """Tokens ``(S, H)`` one by one."""
    config, router, inner = ffn.mole_settings["default"], ffn.mole_router["default"], ffn.base_layer
    assert isinstance(router, TopKRouter)
    rows = []
    for token in x:
        experts = token_weights(router, token)

        def run(name: str, value: Tensor, experts: Any = experts) -> Tensor:
            return naive_linear(inner.get_submodule(name), value, experts, config.scaling)

        if hasattr(inner, "gate_proj"):
            rows.append(run("down_proj", F.silu(run("gate_proj", token)) * run("up_proj", token)))
        else:
            rows.append(run("c_proj", inner.act(run("c_fc", token))))  # pyright: ignore
    return torch.stack(rows)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one of three": {"num_experts": 3, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "all": {"num_experts_per_tok": 4},
    "rslora": {"use_rslora": True},
    "topk_softmax": {"scoring_func": "topk_softmax", "norm_topk_prob": False},
    "sigmoid": {"scoring_func": "sigmoid"},
}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_an_ffn_equals_a_loop_over_tokens_and_experts(make: Any, fields: dict[str, Any]) -> None:
    model = adapted(make(), **fields)
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ffn in ffns(model):
        got = ffn(x)
        torch.testing.assert_close(got, naive_ffn(ffn, x.flatten(0, 1)).view(2, 5, 32), atol=1e-6, rtol=0)
        with model.disable_adapter():
            assert not torch.allclose(got, ffn(x), atol=1e-3)


@torch.no_grad()
def test_the_addition_has_the_rank_of_the_chosen_experts() -> None:
    """A token's addition to a linear layer lies in the span of its experts' B alone."""
    model = adapted(llama(), num_experts_per_tok=1)
    (ffn, *_) = ffns(model)
    x = torch.randn(6, 32, dtype=torch.float64)
    up: Any = ffn.base_layer.up_proj
    seen: list[Tensor] = []
    handle = up.register_forward_hook(lambda module, args, output: seen.append(output - module.base_layer(args[0])))
    ffn(x)
    handle.remove()
    for token, added in zip(x, seen[0], strict=True):
        ((expert, _),) = token_weights(ffn.mole_router["default"], token)  # pyright: ignore
        basis = up.mole_B["default"].weight[expert].T  # (O, r)
        rest = added - basis @ torch.linalg.lstsq(basis, added[:, None]).solution[:, 0]
        assert float(rest.norm()) < 1e-9 < float(added.norm())


@torch.no_grad()
def test_padding_and_dropped_tokens_get_nothing() -> None:
    model = adapted(llama(), eval_capacity_factor=0.5, min_capacity=0, num_experts_per_tok=1)
    (ffn, *_) = ffns(model)
    x = torch.randn(1, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(1, 12)
    mask[0, :4] = 0
    with leave_out_padding(model, mask), collect_routing() as records:
        got = ffn(x)
    plain = ffn.base_layer(x)
    (record,) = records
    assert record.group == "lora_experts"
    taken = record.index[:, 0] >= 0  # (S,); one token an expert: 8 tokens, 4 experts, half of the fair share
    assert not taken[:4].any() and 1 <= int(taken.sum()) <= 4
    assert torch.equal(got[0, ~taken], plain[0, ~taken])
    assert (got[0, taken] - plain[0, taken]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_cosines_are_those_of_the_products() -> None:
    (ffn, *_) = ffns(adapted(llama()))
    parts: list[Any] = [ffn.base_layer.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
    flat = torch.cat(
        [
            torch.einsum("erI,erO->eOI", p.mole_A["default"].weight, p.mole_B["default"].weight).flatten(1)
            for p in parts
        ],
        1,
    )
    want = F.cosine_similarity(flat[:, None], flat[None], dim=-1)
    found = ffn.expert_cosines()
    assert found is not None and found[0] == "lora_experts"
    torch.testing.assert_close(found[1], want, atol=1e-12, rtol=0)
    (fresh, *_) = ffns(get_peft_model(llama(), settings()))
    assert not fresh.expert_cosines()[1].any()  # pyright: ignore  # B is zero


def vlm(parts: dict[str, str], upcycled: bool = False, **fields: Any) -> tuple[Any, Any]:
    """A tiny model with an adapter, through the recipe's section."""
    from tests.adapters.test_every_type import build

    model, processor = build(parts, upcycled)
    fields = {"r": 3, "router": Router(init_std=1.0), **fields}
    attach(model, LoraExperts(type="lora_experts", **fields))
    select_trainable(model, ["adapter"])
    return model.double(), processor


def router_losses(logits: list[Tensor], top_k: int, real: Tensor) -> tuple[float, float]:
    """Load-balancing and z-loss of some layers, token by token."""
    balance, z = [], []
    for layer in logits:
        experts = layer.shape[1]
        rows = [row for row, counts in zip(layer.tolist(), real.tolist(), strict=True) if counts]
        chosen = [sorted(range(experts), key=lambda e: -row[e])[:top_k] for row in rows]
        shares = [sum(e in c for c in chosen) / len(rows) for e in range(experts)]
        chances = torch.tensor(rows).softmax(-1).mean(0).tolist()
        balance.append(experts * sum(f * p for f, p in zip(shares, chances, strict=True)))
        z.append(float(torch.tensor(rows).logsumexp(-1).square().mean()))
    return sum(balance) / len(balance), sum(z) / len(z)


@pytest.mark.parametrize("upcycled", [False, True], ids=["dense", "upcycled"])
def test_losses_are_those_of_each_group_alone(tiny_parts: dict[str, str], upcycled: bool) -> None:
    """An upcycled model has 4 experts and other coefficients than its 3 LoRA experts; nothing is mixed."""
    model, processor = vlm(tiny_parts, upcycled, experts=3, top_k=1, aux_loss_coef=0.3, z_loss_coef=0.05)
    if upcycled:
        model.config.moe = model.config.moe | {"router_aux_loss_coef": 0.07, "router_z_loss_coef": 0.0}
    batch = batch_of(processor, packed=False)
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        plain = model(**batch, aux_loss_scale=0.0)
        got = model(**batch, aux_loss_scale=0.5, output_router_logits=True)
    groups = list(got.router_groups)
    assert groups == (["lora_experts", "moe"] if upcycled else ["lora_experts", "lora_experts"])
    assert [layer.shape[1] for layer in got.router_logits] == ([3, 4] if upcycled else [3, 3])
    real = batch["attention_mask"].flatten()
    mine = [layer for layer, name in zip(got.router_logits, groups, strict=True) if name == "lora_experts"]
    aux, z = router_losses(mine, 1, real)
    added, shown = 0.3 * aux + 0.05 * z, aux
    if upcycled:
        theirs, _ = router_losses([got.router_logits[1]], 2, real)
        added, shown = added + 0.07 * theirs, shown + theirs
    # float32 sums of some 40 tokens
    assert float(got.loss - plain.loss) == pytest.approx(0.5 * added, abs=2e-6)
    assert float(got.aux_loss) == pytest.approx(shown, abs=2e-6)
    assert float(got.z_loss) == pytest.approx(z, abs=2e-6)


def test_what_reaches_the_router(tiny_parts: dict[str, str]) -> None:
    """At the start only the balancing loss does, since B is zero; then the task's loss too."""
    model, processor = vlm(tiny_parts)
    batch = batch_of(processor, packed=True)
    batch["pixel_values"] = batch["pixel_values"].double()
    routers = {name: p for name, p in model.named_parameters() if "mole_router" in name}

    def gradients(scale: float) -> list[float]:
        model.zero_grad()
        model.train()(**batch, aux_loss_scale=scale).loss.backward()
        return [float(p.grad.abs().max()) for p in routers.values()]

    assert len(routers) == 2 and gradients(0.0) == [0.0, 0.0] and min(gradients(1.0)) > 1e-6
    stir(model)
    assert min(gradients(0.0)) > 1e-6


def test_routing_is_recorded_once_under_recomputation(tiny_parts: dict[str, str]) -> None:
    model, processor = vlm(tiny_parts)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(processor, packed=True)
    batch["pixel_values"] = batch["pixel_values"].double()
    with collect_routing() as outside:
        output = model.train()(**batch, output_router_logits=True)
        output.loss.backward()
    assert outside == []  # the model's own collector had them
    assert len(output.router_logits) == len(output.router_indices) == 2


def test_text_models_add_the_losses_too() -> None:
    torch.manual_seed(0)
    config = SparseVLMTextConfig(text_config=tiny.text_config(attn_implementation="eager"))
    model = SparseVLMTextForCausalLM(config).double().eval()
    made: Any = get_peft_model(model, settings(router_aux_loss_coef=0.2))
    with torch.no_grad():
        plain = made(input_ids=IDS, labels=IDS, aux_loss_scale=0.0)
        got = made(input_ids=IDS, labels=IDS, output_router_logits=True)
    aux, _ = router_losses(list(got.router_logits), 2, torch.ones(14))
    assert float(got.loss - plain.loss) == pytest.approx(0.2 * aux, abs=2e-6)


def test_an_adapter_on_a_part_of_our_model_is_refused_where_its_losses_would_get_lost(
    tiny_parts: dict[str, str],
) -> None:
    from tests.adapters.test_every_type import build

    model, processor = build(tiny_parts, upcycled=True)
    get_peft_model(model.model.language_model, settings())
    with pytest.raises(ValueError, match="put the adapter on the whole model"):
        model(**batch_of(processor, packed=False))


def test_counts_and_arithmetic(tiny_parts: dict[str, str]) -> None:
    """r (in + out) of each linear layer and expert, a row of the router an expert; a token uses 2 of 5 experts."""
    from tests.adapters.test_every_type import build

    plain, _ = build(tiny_parts, upcycled=False)
    before = count_parameters(plain)
    model, _ = vlm(tiny_parts, experts=5, r=3)
    each, router = 3 * 3 * (32 + 48), 5 * 32  # Llama of width 32, FFN of 48, two layers
    after = count_parameters(model)
    assert after["trainable"] == 2 * (5 * each + router)
    assert after["total"] - before["total"] == 2 * (5 * each + router)
    assert after["activated"] - before["activated"] == 2 * (2 * each + router)
    flops = sum(matrix.flops for matrix in matrices(model)) - sum(matrix.flops for matrix in matrices(plain))
    assert flops == 2 * 2 * (5 * each + router)  # all experts are multiplied


def test_where_it_goes(tiny_parts: dict[str, str]) -> None:
    from tests.adapters.test_every_type import build

    def section(layers: Any) -> LoraExperts:
        return LoraExperts(type="lora_experts", layers=layers)

    model, _ = build(tiny_parts, upcycled=True)  # layer 1 is MoE
    report = attach(model, section("all"))
    assert report.modules == ("model.language_model.layers.0.mlp",) and report.counts == {"language.ffn": 1}
    assert model.peft_config["default"].routed_layers == [0]
    detach(model, merge=False)
    assert not [name for name, _ in model.named_modules() if "base_layer" in name or "mole" in name]
    with pytest.raises(ValueError, match="layer 1 holds routed experts already"):
        attach(model, section([0, 1]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        attach(model, section([2]))
    full, _ = build(tiny_parts, upcycled=False)
    upcycle_model(full, Upcycle(layers="all"))
    with pytest.raises(ValueError, match="no dense FFN is left"):
        attach(full, section("alternate"))
    with pytest.raises(ValueError, match="cannot be merged"):
        attach(model, section("all"))
        detach(model, merge=True)


def test_other_ffns_are_refused() -> None:
    model = llama()
    model.model.layers[1].mlp = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"layer 1 .* has no FFN 'mlp' of linear layers"):
        get_peft_model(model, settings())
    with pytest.raises(ValueError, match="num_experts_per_tok is 5"):
        settings(num_experts_per_tok=5)
    with pytest.raises(ValueError, match="scoring_func='sigmoid'"):
        settings(bias_update_rate=0.1)


@torch.no_grad()
def test_the_verbs_of_peft(tmp_path: Path) -> None:
    want = llama()(IDS).logits
    model = adapted(llama(), scoring_func="sigmoid", bias_update_rate=0.1)
    for ffn in ffns(model):
        ffn.mole_router["default"].e_score_correction_bias += 0.25  # pyright: ignore  # saved with it
    ours = model(IDS).logits
    assert not torch.allclose(ours, want, atol=1e-3)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(llama(), str(tmp_path)).double().eval()  # PEFT makes adapters float32
    assert torch.equal(again(IDS).logits, ours)
    assert all(float(f.mole_router["default"].e_score_correction_bias[0]) == 0.25 for f in ffns(again))  # pyright: ignore
    with again.disable_adapter():
        assert torch.equal(again(IDS).logits, want)
    again.add_adapter("other", settings(num_experts=3, layers=[1]))
    again.double()
    again.set_adapter("other")
    assert torch.equal(again(IDS).logits, want)  # fresh, on another layer
    again.set_adapter("default")
    assert torch.equal(again(IDS).logits, ours)
    again.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 active adapters"):
        again(IDS)
    again.set_adapter("default")
    again.delete_adapter("other")
    assert torch.equal(again(IDS).logits, ours)
    with pytest.raises(ValueError, match="cannot be merged"):
        again.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged"):
        again.merge_adapter()
    plain = again.unload()
    assert torch.equal(plain(IDS).logits, want)
    assert not any(isinstance(m, LoraExpertsFfn | LoraExpertsLinear) for m in plain.modules())


def test_a_balance_bias_moves_with_the_adapters_own_rate(tiny_parts: dict[str, str]) -> None:
    """On an upcycled model whose own routers balance too, in groups of other sizes."""
    from tests.adapters.test_every_type import build

    model, processor = build(tiny_parts, upcycled=False)
    sigmoid = {"scoring": "sigmoid", "init_std": 1.0}
    upcycle_model(model, Upcycle(layers=[1], router=Router(**sigmoid, bias_update_rate=0.5)))
    router = Router(**sigmoid, bias_update_rate=0.125)
    attach(model, LoraExperts(type="lora_experts", experts=3, top_k=1, router=router))
    model.requires_grad_(True)
    callbacks: Any = balance_callbacks(model)
    assert {callback.group: callback.rate for callback in callbacks} == {"moe": 0.5, "lora_experts": 0.125}
    for callback in callbacks:
        callback.on_train_begin(None, None, None)
    model.train()(**batch_of(processor, packed=True)).loss.backward()
    for callback in callbacks:
        callback.on_optimizer_step(None, None, None)
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert {len(bias): {abs(float(b)) for b in bias} - {0.0} for bias in biases.values()} == {3: {0.125}, 4: {0.5}}
