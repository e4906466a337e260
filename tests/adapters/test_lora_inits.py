"""Starts of LoRA that are made from weights or data: against PEFT's, at the parent's function, saved as plain LoRA."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsevlm.adapters.attach import attach, detach, load_adapter, save_adapter
from sparsevlm.adapters.inits import apply_start, draw_start, principal
from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration
from sparsevlm.recipe.adapter import Lora
from sparsevlm.train.parts import select_trainable
from tests.adapters.test_every_type import batch_of, build, logits, loss_and_gradients

TARGETS = ["language", "vision.attention"]
STARTS = [
    {"init": "pissa"},
    {"init": "pissa", "pissa_iterations": 8, "rslora": True},
    {"init": "olora", "dora": True},
    {"init": "corda"},
    {"init": "eva"},
]


def section(**options: Any) -> Lora:
    return Lora(**{"type": "lora", "r": 4, "alpha": 6, "targets": TARGETS, **options})


def started(model: Any, processor: Any, spec: Lora) -> dict[str, Tensor]:
    """Attach with a start that is made from four samples, one a row."""
    from sparsevlm.adapters.lora import prepare

    batches = [batch_of(processor, packed=False)]
    start = draw_start(model, prepare(model, spec).modules, spec, lambda batch: logits(model, batch), batches)
    attach(model, spec, start=start)
    return start


def step(model: Any, batch: dict[str, Any]) -> None:
    select_trainable(model, ["adapter"])
    for _ in range(3):
        _, gradients = loss_and_gradients(model.train(), batch)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter -= 0.3 * gradients[name]
    model.eval()


@pytest.mark.parametrize("options", STARTS, ids=lambda options: options["init"])
def test_from_the_parents_function_through_training_to_a_plain_lora_on_the_parent(
    tiny_parts: dict[str, str], tmp_path: Path, options: dict[str, Any]
) -> None:
    model, processor = build(tiny_parts, upcycled=False)
    model.save_pretrained(tmp_path / "parent")
    batch = batch_of(processor, packed=False)
    before, spec = logits(model, batch), section(**options)
    started(model, processor, spec)
    # float32, logits below 1: a weight is taken apart and put together again
    torch.testing.assert_close(logits(model, batch), before, atol=2e-6, rtol=0)
    step(model, batch)
    want = logits(model, batch)
    assert not torch.allclose(want, before, atol=1e-3)
    save_adapter(model, tmp_path / "adapter", tmp_path / "parent")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rank = 4 if options["init"] == "eva" else 8
    assert {tensor.shape[0] for key, tensor in held.items() if "lora_A" in key} == {rank}

    again: Any = SparseVLMForConditionalGeneration.from_pretrained(tmp_path / "parent")
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again.eval(), batch), want, atol=2e-6, rtol=0)
    base: Any = SparseVLMForConditionalGeneration.from_pretrained(tmp_path / "parent")
    alone = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(alone, batch), logits(again, batch))

    detach(model, merge=True)  # as a following stage does it with what was loaded
    torch.testing.assert_close(logits(model, batch), want, atol=2e-6, rtol=0)


def test_taking_it_off_gives_the_parent_back(tiny_parts: dict[str, str]) -> None:
    model, _ = build(tiny_parts, upcycled=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, section(init="pissa"))
    detach(model, merge=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("ours", [STARTS[0], STARTS[2]], ids=lambda options: options["init"])
def test_starts_from_weights_are_those_of_peft(ours: dict[str, Any]) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(24, 16)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=ours["init"], target_modules=["0"])
    model = nn.Sequential(nn.Linear(24, 16))
    model.load_state_dict({f"0.{key}": value for key, value in layer.state_dict().items()})
    theirs: Any = get_peft_model(model, config).base_model.model[0]  # pyright: ignore
    spec = section(**ours)
    start = draw_start(nn.ModuleDict({"layer": layer}), ["layer"], spec)
    a, b = start["layer.lora_A"], start["layer.lora_B"]
    torch.testing.assert_close(a, theirs.lora_A["default"].weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(b, theirs.lora_B["default"].weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.weight - 6 / 4 * b @ a, theirs.base_layer.weight, atol=1e-6, rtol=1e-5)


def test_the_fast_decomposition_comes_close_to_the_exact_one() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(24, 16)
    rest = []
    for iterations in (0, 16):
        start = draw_start(nn.ModuleDict({"x": layer}), ["x"], section(init="pissa", pissa_iterations=iterations))
        rest.append(torch.linalg.norm(layer.weight - 6 / 4 * start["x.lora_B"] @ start["x.lora_A"]))
    best = torch.linalg.svdvals(layer.weight)[4:].square().sum().sqrt()
    torch.testing.assert_close(rest[0], best, atol=1e-5, rtol=0)
    assert rest[0] <= rest[1] <= 1.01 * best


def test_corda_is_that_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT takes its dataclass from a package that it does not depend on
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 16))
    samples = [torch.randn(1, 30, 12) @ torch.diag(torch.linspace(0.2, 3, 12)) for _ in range(5)]
    spec = section(init="corda")
    start = draw_start(model, ["0"], spec, lambda x: model(x), samples)
    config = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="corda", target_modules=["0"], corda_config=CordaConfig(corda_method="ipm")
    )

    def run_all() -> None:
        for sample in samples:
            model(sample)

    preprocess_corda(model, config, run_model=run_all)
    theirs: Any = get_peft_model(model, config).base_model.model[0]  # pyright: ignore
    # signs of singular vectors are the decomposition's business: compare the product
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(start["0.lora_B"] @ start["0.lora_A"], product, atol=1e-4, rtol=1e-3)


def test_eva_finds_the_principal_directions_of_what_layers_see() -> None:
    from peft.utils.incremental_pca import IncrementalPCA

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    samples = [torch.randn(7 + i, 12) @ torch.diag(torch.linspace(0.2, 3, 12)) + 1 for i in range(5)]
    start = draw_start(model, ["0", "2"], section(init="eva"), lambda x: model(x), samples)
    seen = torch.cat(samples)
    for name, rows in (("0", seen), ("2", model[:2](seen))):
        naive = torch.linalg.svd(rows - rows.mean(0))[2][:4]
        theirs = IncrementalPCA(n_components=4).partial_fit(rows.detach()).components_
        for reference in (naive, theirs):
            cosine = torch.nn.functional.cosine_similarity(start[f"{name}.lora_A"], reference.float())
            torch.testing.assert_close(cosine.abs(), torch.ones(4), atol=1e-4, rtol=0)
        assert not start[f"{name}.lora_B"].any()
    assert torch.equal(principal(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 2), torch.eye(3)[[1, 2]])


def test_many_layers_are_looked_at_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsevlm.adapters import inits

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8))
    samples, spec, passes = [torch.randn(9, 12)], section(init="eva"), []

    def run(sample: Tensor) -> None:
        passes.append(model(sample))

    want = draw_start(model, ["0", "1"], spec, run, samples)
    assert len(passes) == 1
    monkeypatch.setattr(inits, "_BYTES", 1)
    got = draw_start(model, ["0", "1"], spec, run, samples)
    assert len(passes) == 3
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())


def test_rounding_under_bfloat16_is_that_of_the_weights(tiny_parts: dict[str, str]) -> None:
    """The residual is rounded to the weights' type: at most half a unit in the last of 8 bits, as weights are."""
    model, _ = build(tiny_parts, upcycled=False)
    model.bfloat16()
    name = "model.language_model.layers.0.self_attn.q_proj"
    whole = model.get_submodule(name).weight.detach().float()
    attach(model, section(init="pissa"))
    layer: Any = model.get_submodule(name)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.dtype == torch.float32
    product = 6 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    error = (layer.base_layer.weight.float() + product - whole).abs()
    assert 0 < float(error.max()) <= 2**-8 * float((whole - product).abs().max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["experts.down_proj"]}, "stacked weight"),
        ({"targets": ["patch_embedding"]}, "Conv2d"),
        ({"targets": ["k_proj"], "r": 20}, "has 16 and r is 20"),
    ],
)
def test_layers_without_such_a_start_are_refused(
    tiny_parts: dict[str, str], options: dict[str, Any], message: str
) -> None:
    model, _ = build(tiny_parts, upcycled=True)
    with pytest.raises(ValueError, match=message):
        attach(model, section(init="pissa", **options))


def test_a_start_of_other_layers_and_too_few_tokens_are_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 16))
    spec = section(init="eva")
    with pytest.raises(ValueError, match="more than r = 4 tokens, but 0 saw 3"):
        draw_start(model, ["0"], spec, lambda x: model(x), [torch.randn(3, 12)])
    start = draw_start(model, ["0"], spec, lambda x: model(x), [torch.randn(9, 12)])
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).base_model.model
    with pytest.raises(ValueError, match="has shape"):
        apply_start(wrapped, start, spec, "default")  # pyright: ignore
