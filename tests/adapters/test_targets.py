"""From target names to layers, and adapters on models: identity at the start, save, load, merge, meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsevlm.adapters.attach import attach, detach, has_adapter, load_adapter, save_adapter
from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.adapters.saved import weights_hash
from sparsevlm.adapters.targets import TargetError, resolve_targets
from sparsevlm.model.build import build_model
from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.adapter import Lora
from sparsevlm.recipe.moe import Upcycle
from tests import tiny

LAYER = "model.language_model.layers"
TOWER = "model.vision_tower.encoder.layers"


@pytest.fixture
def sparse(tiny_parts: dict[str, str]) -> Any:
    """Two decoder layers, the second with experts and a shared one; features of the first tower layer are taken."""
    torch.manual_seed(0)
    model, _ = build_model(tiny.recipe_model(tiny_parts))
    upcycle_model(model, Upcycle(layers=[1], shared_expert="gated"))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(7)
    image = model.config.image_token_id
    ids = torch.tensor([[2, *[image] * 16, 11, 12, 13, 14]])
    grid = torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), image_grid_thw=grid).logits


def stir(model: Any) -> None:
    """Give the second matrices values, as training would."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize(
    ("target", "modules", "parameters"),
    [
        ("language.attention", [f"{LAYER}.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"], []),
        ("language.ffn", [f"{LAYER}.0.mlp.{p}_proj" for p in ("gate", "up", "down")], []),
        # the second layer of the tower comes after the features that are taken
        ("vision.attention", [f"{TOWER}.0.self_attn.{p}" for p in ("k_proj", "v_proj", "q_proj", "out_proj")], []),
        ("vision.ffn", [f"{TOWER}.0.mlp.fc1", f"{TOWER}.0.mlp.fc2"], []),
        ("connector", ["model.connector.0.layers.0", "model.connector.0.layers.2"], []),
        (
            "moe.experts",
            [f"{LAYER}.1.mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")],
            [f"{LAYER}.1.mlp.experts.gate_up_proj", f"{LAYER}.1.mlp.experts.down_proj"],
        ),
        ("moe.router", [f"{LAYER}.1.mlp.shared_expert_gate"], [f"{LAYER}.1.mlp.gate.weight"]),
        ("q_proj", [f"{TOWER}.0.self_attn.q_proj", *(f"{LAYER}.{i}.self_attn.q_proj" for i in (0, 1))], []),
        ("layers.1.self_attn.[qk]_proj", [f"{LAYER}.1.self_attn.{p}_proj" for p in "qk"], []),
        ("experts.down_proj", [], [f"{LAYER}.1.mlp.experts.down_proj"]),
    ],
)
def test_targets_are_what_their_names_say(sparse: Any, target: str, modules: list[str], parameters: list[str]) -> None:
    found = resolve_targets(sparse, [target])
    assert sorted(found.modules) == sorted(modules)
    assert sorted(found.parameters) == sorted(parameters)
    assert found.counts == {target: len(modules) + len(parameters)}


def test_a_part_is_its_halves_and_nothing_counts_twice(sparse: Any) -> None:
    whole = resolve_targets(sparse, ["language", "vision"])
    halves = resolve_targets(sparse, ["language.ffn", "language.attention", "vision.attention", "vision.ffn", "q_proj"])
    assert whole.modules == halves.modules


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("language.atention", "did you mean 'language.attention'"),
        ("down_prj", "did you mean 'down_proj'"),
        ("visoin", "did you mean 'vision'"),
    ],
)
def test_a_target_without_a_match_names_the_nearest(sparse: Any, target: str, says: str) -> None:
    with pytest.raises(TargetError, match=says) as caught:
        resolve_targets(sparse, ["language", target])
    assert caught.value.target == target


def test_experts_of_a_dense_model_are_refused(tiny_model: Any) -> None:
    with pytest.raises(TargetError, match="has no MoE layers"):
        resolve_targets(tiny_model[0], ["moe.experts"])


EVERYTHING = ["language", "vision", "moe.experts", "moe.router"]
OPTIONS = [
    pytest.param({"targets": EVERYTHING}, id="every target"),
    pytest.param({"targets": EVERYTHING, "rslora": True, "init": "gaussian"}, id="rslora, gaussian"),
    pytest.param({"targets": ["language", "vision"], "dora": True}, id="dora"),
    pytest.param({"targets": ["language", "connector"], "init": "orthogonal", "dropout": 0.5}, id="orthogonal"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_start_is_the_identity_and_what_is_saved_comes_back(
    sparse: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    before = logits(sparse)
    parent = tmp_path / "parent"
    sparse.save_pretrained(parent)
    attach(sparse, Lora(type="lora", r=4, **options), seed=5)
    # B A = 0 exactly but for DoRA, which divides by a norm and multiplies by it, and the orthogonal rows (float32)
    exact = not options.get("dora") and options.get("init") != "orthogonal"
    torch.testing.assert_close(logits(sparse), before, atol=0 if exact else 1e-6, rtol=0)
    assert not any(parameter.requires_grad for parameter in sparse.parameters())
    stir(sparse)
    if "connector" not in options["targets"]:  # trained in full beside the adapter
        for parameter in sparse.model.connector.parameters():
            parameter.requires_grad_(True)
            parameter.data += 0.01
    want = logits(sparse)
    assert not torch.allclose(want, before, atol=1e-3)
    save_adapter(sparse, tmp_path / "adapter", parent)
    again = SparseVLMForConditionalGeneration.from_pretrained(parent)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), want)


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_merging_adds_what_a_naive_reference_adds(sparse: Any, options: dict[str, Any]) -> None:
    attach(sparse, Lora(type="lora", r=4, alpha=8, **options))
    stir(sparse)
    want, weights = logits(sparse), {name: p.detach().clone() for name, p in sparse.named_parameters()}
    detach(sparse, merge=True)
    assert not has_adapter(sparse)
    assert not any(is_adapter_parameter(name) or "base_layer" in name for name in sparse.state_dict())
    torch.testing.assert_close(logits(sparse), want, atol=2e-6, rtol=0)  # float32, logits below 1
    if options.get("dora"):
        return
    scale = 8 / 2 if options.get("rslora") else 8 / 4
    name = f"{LAYER}.0.self_attn.q_proj"
    a, b = (weights[f"{name}.lora_{m}.default.weight"] for m in "AB")
    merged = dict(sparse.named_parameters())[f"{name}.weight"]
    torch.testing.assert_close(merged, weights[f"{name}.base_layer.weight"] + scale * b @ a)
    # down_proj is wrapped last, so it is the outer one; A is expert by expert, B has the experts innermost
    stack = f"{LAYER}.1.mlp.experts"
    a, b = (weights[f"{stack}.lora_{m}.default.weight"] for m in "AB")
    down = weights[f"{stack}.base_layer.base_layer.down_proj"]
    if a.shape[1] != down.shape[2]:
        a, b = (weights[f"{stack}.base_layer.lora_{m}.default.weight"] for m in "AB")
    for expert in range(4):
        delta = scale * b[:, expert::4] @ a[expert * 4 : expert * 4 + 4]
        merged = dict(sparse.named_parameters())[f"{stack}.down_proj"][expert]
        torch.testing.assert_close(merged, down[expert] + delta)


def test_the_seed_decides_and_the_global_generator_is_left_alone(tiny_parts: dict[str, str]) -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        model, _ = build_model(tiny.recipe_model(tiny_parts))
        torch.manual_seed(11)
        attach(model, Lora(type="lora"), seed=seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(11)))
        return {name: p for name, p in model.named_parameters() if "lora_A" in name}

    one, two, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_meta_device_counts_the_same(sparse: Any) -> None:
    with torch.device("meta"):
        meta = SparseVLMForConditionalGeneration(sparse.config)
    spec = Lora(type="lora", r=4, targets=EVERYTHING)
    want, got = attach(sparse, spec), attach(meta, spec)
    assert got == want
    assert all(parameter.is_meta for parameter in meta.parameters())
    # r (in + out) of every matrix, once an expert; Llama of width 32 with keys and values of 16, FFN of 48
    attention, ffn, tower = 2 * 4 * (4 * 32 + 4 * 32 - 2 * 16), 4 * 3 * (32 + 48), 4 * (4 * 64 + 2 * 80)
    experts, shared, router = 4 * 4 * ((32 + 96) + (48 + 32)), 4 * 3 * 80, 4 * (32 + 4) + 4 * (32 + 1)
    assert want.trainable == attention + ffn + tower + experts + shared + router
    detach(meta, merge=False)
    assert {name for name, _ in meta.named_parameters()} == {
        name.replace(".base_layer", "") for name, _ in sparse.named_parameters() if not is_adapter_parameter(name)
    }


def test_the_kernel_of_adapted_experts_can_be_chosen(sparse: Any) -> None:
    attach(sparse, Lora(type="lora", targets=["moe.experts"]))
    stir(sparse)
    want = logits(sparse)
    for kernel in ("eager", "batched_mm"):
        sparse.set_experts_implementation(kernel)
        torch.testing.assert_close(logits(sparse), want, atol=1e-6, rtol=0)  # float32, sums in another order


def test_a_bfloat16_model_gets_float32_adapters(sparse: Any) -> None:
    attach(sparse.bfloat16(), Lora(type="lora", targets=EVERYTHING))
    kinds = {is_adapter_parameter(name): parameter.dtype for name, parameter in sparse.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    stir(sparse)
    assert logits(sparse.to(torch.bfloat16)).dtype == torch.bfloat16


def test_a_tied_embedding_is_refused(tiny_model: Any) -> None:
    model, _ = tiny_model
    model.set_output_embeddings(torch.nn.Linear(32, model.get_input_embeddings().num_embeddings, bias=False))
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="cannot be adapted alone"):
        attach(model, Lora(type="lora", targets=["lm_head"]))


def test_the_hash_sees_every_tensor(sparse: Any, tmp_path: Path) -> None:
    sparse.save_pretrained(tmp_path / "a")
    want = weights_hash(tmp_path / "a")
    sparse.save_pretrained(tmp_path / "b")
    assert weights_hash(tmp_path / "b") == want
    for i, (_, parameter) in enumerate(list(sparse.named_parameters())[::9]):
        parameter.data *= 1.001
        sparse.save_pretrained(tmp_path / f"c{i}")
        assert weights_hash(tmp_path / f"c{i}") != want
        parameter.data /= 1.001
    with pytest.raises(ValueError, match="holds no model"):
        weights_hash(tmp_path)


@pytest.mark.parametrize("expert", range(4))
def test_the_hash_sees_every_expert_of_a_stack(sparse: Any, tmp_path: Path, expert: int) -> None:
    # 'experts: [3]' and 'trains: [adapter]' leave a merged model that differs from its parent in expert 3 alone
    sparse.save_pretrained(tmp_path / "parent")
    sparse.model.language_model.layers[1].mlp.experts.down_proj.data[expert] *= 1.001
    sparse.save_pretrained(tmp_path / "merged")
    assert weights_hash(tmp_path / "merged") != weights_hash(tmp_path / "parent")
