"""Adapters that were trained on quantised weights: merged into the stored ones, or into those that training saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsevlm.export.merge import MergeReport, merge_adapter
from tests.export import dense, lora, models

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module", params=["nf4", "int8"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Kind, base, and an adapter with random weights of a sparse model whose decoder was quantised."""
    from sparsevlm.adapters.attach import attach, save_adapter
    from sparsevlm.recipe.adapter import QLora

    root = tmp_path_factory.mktemp(request.param)
    model, processor = models.make_model(root / "parts", upcycle={"layers": "all"})
    base = models.save(model, processor, root / "base")
    targets = ["language.attention", "moe.experts", "moe.router"]
    attach(model, QLora(type="qlora", quantisation=request.param, targets=targets, r=4))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "connector" in name:
            parameter.requires_grad_(True).data.add_(torch.randn_like(parameter), alpha=0.05)
    save_adapter(model, root / "adapter", base)
    processor.save_pretrained(root / "adapter")
    return request.param, base, root / "adapter"


def merge(adapter: Path, out: Path, **options: Any) -> MergeReport:
    return merge_adapter(str(adapter), out, **options)


def test_both_ways(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Replayed weights less the change are the dequantised ones; all else is the stored base's."""
    from sparsevlm.adapters.quantise import replayed

    kind, base, adapter = trained
    plain = merge(adapter, tmp_path / "plain", unmerge=True)
    replay = merge(adapter, tmp_path / "replay", replay_quantisation=True, unmerge=True)
    quantisation = json.loads((adapter / "parent.json").read_text())["quantization"]
    names = set(quantisation["weights"])
    assert names and replay.replayed == len(names) and plain.replayed == 0
    before, stored, seen = (lora.weights(d) for d in (base, tmp_path / "plain", tmp_path / "replay"))
    for key, weight in before.items():
        moved = replayed(key, weight, quantisation) - weight if key in names else torch.zeros_like(weight)
        assert key not in names or moved.abs().max() > 0
        # Two sums in float32, of values below 2.
        torch.testing.assert_close(seen[key] - stored[key], moved, rtol=0, atol=1e-6, msg=key)
    for report in (plain, replay):
        found = report.as_trained
        assert found is not None and found.kind == kind and report.check is not None
        assert report.check.difference < 1e-4
        assert found.replayed[1] < found.into_base[1] and found.into_base[0] > 1e-4
        if kind == "nf4":  # int8 rounds what goes into a layer, too, which no weight can replay
            assert found.replayed[0] < 1e-4 * max(1, report.check.largest)  # measured below 1e-5
    assert plain.as_trained is not None and replay.as_trained is not None
    assert (plain.as_trained.written, replay.as_trained.written) == ("into_base", "replayed")
    assert plain.as_trained.into_base == pytest.approx(replay.as_trained.into_base, rel=1e-3)


def test_refusals(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, base, adapter = trained
    dense.save(dense.text("llama"), tmp_path / "llama")
    plain = lora.train(tmp_path / "llama", tmp_path / "plain", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"does not say that .* quantised for training, .*leave it out"):
        merge(plain, tmp_path / "out", replay_quantisation=True)
    record = json.loads((adapter / "parent.json").read_text())
    try:
        changed = {**record, "quantization": {**record["quantization"], "weights": ["model.gone.weight"]}}
        (adapter / "parent.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"does not hold model\.gone\.weight, .*leave --replay-quantisation out"):
            merge(adapter, tmp_path / "out", base=str(base), replay_quantisation=True)
    finally:
        (adapter / "parent.json").write_text(json.dumps(record))
    assert not (tmp_path / "out").exists()


def test_a_card_says_what_the_weights_were_in_training(trained: tuple[str, Path, Path]) -> None:
    from sparsevlm.export import hub

    kind, _, adapter = trained
    assert f"It was trained on weights in {kind}: " in hub.prepare(str(adapter), "me/tiny").card
