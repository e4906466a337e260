"""Taking the change off again; plain adapters sorted without PEFT's layers; writing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsevlm.export import merge_read
from sparsevlm.export.merge import MergeReport, merge_adapter
from sparsevlm.export.merge_adapter import open_adapter
from sparsevlm.export.merge_base import Base
from sparsevlm.export.merge_combine import make_recipe
from sparsevlm.export.merge_deltas import LowRank
from sparsevlm.export.merge_write import written_behind
from sparsevlm.export.shards import Entry, ShardWriter
from tests.export import dense, lora, models


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    dense.save(dense.text("llama"), directory)
    return directory


def merge(adapters: list[Path], base: Path, out: Path, **options: Any) -> MergeReport:
    names = [str(adapter) for adapter in adapters]
    return merge_adapter(names, out, base=str(base), check=False, unmerge=True, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_base_comes_back(dora: bool, dtype: Any, llama: Path, tmp_path: Path) -> None:
    """What `--unmerge` says is what a reader of both directories finds."""
    adapter = lora.train(llama, tmp_path / "a", target_modules=["q_proj", "down_proj"], use_dora=dora)
    found = merge([adapter], llama, tmp_path / "out", dtype=dtype).unmerged
    assert found is not None and (found.changed, found.same) == (6, 24)
    # One rounding is half a step of the type; float32 adds those of the sums, which the bound counts generously.
    assert (0.05 if dtype == "float32" else 0.4) < found.share <= 1
    merge([adapter], llama, tmp_path / "wide", dtype="float32")
    before, exact, stored = (lora.weights(d) for d in (llama, tmp_path / "wide", tmp_path / "out"))
    changed = [key for key in before if "q_proj" in key or "down_proj" in key]
    change = torch.cat([(exact[key] - before[key]).flatten() for key in changed]).norm()
    if dtype != "float32" and not dora:
        rounding = torch.cat([(stored[key].float() - exact[key]).flatten() for key in changed])
        assert found.largest == pytest.approx(float(rounding.abs().max()), rel=1e-3)
        assert found.lost == pytest.approx(float(rounding.norm() / change), rel=1e-3)


def test_every_kind_of_change_comes_off(tmp_path: Path) -> None:
    """Stacks, connectors, pieces, and several adapters."""
    base = models.save(*models.make_model(tmp_path / "parts", upcycle={"layers": "all"}), tmp_path / "base")

    def load(directory: Path) -> Any:
        from sparsevlm.model.build import load_model

        return load_model(directory)[0]

    options: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.gate.weight"],
        "modules_to_save": ["model.connector.0"],
    }
    pair = [lora.train(base, tmp_path / f"a{i}", load, **options, seed=i) for i in range(2)]
    one = merge(pair[:1], base, tmp_path / "one").unmerged
    two = merge(pair, base, tmp_path / "two", recipe=make_recipe(2, "cat", [0.7, 0.6])).unmerged
    assert one is not None and two is not None
    assert two.changed == one.changed + 4 and two.same == one.same - 4  # the connector's are sums now


def test_a_wrong_weight_is_found(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value by two roundings, in a merged weight or in one that stays."""
    adapter = lora.train(llama, tmp_path / "a", target_modules=["q_proj"])
    write = ShardWriter.write
    for wrong, match in (("layers.1.self_attn.q_proj", "roundings"), ("layers.1.self_attn.k_proj", "bit for bit")):

        def bad(self: ShardWriter, key: str, tensor: torch.Tensor, wrong: str = wrong) -> None:
            if wrong in key:
                tensor = tensor.clone()
                tensor.view(-1)[7] *= 1 + 2 * torch.finfo(tensor.dtype).eps
            write(self, key, tensor)

        monkeypatch.setattr(ShardWriter, "write", bad)
        with pytest.raises(ValueError, match=rf"{wrong}.*the base does not come back.*{match}"):
            merge([adapter], llama, tmp_path / "out", dtype="bfloat16")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": r".*\.1\..*_proj", "use_rslora": True}, True),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "lora_alpha": 7}, True),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, True),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}, False),
        ({"target_modules": ["q_proj"], "use_dora": True}, False),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, False),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
def test_plain_adapters_are_sorted_as_peft_sorts_them(
    options: dict[str, Any], plain: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_adapter(str(lora.train(llama, tmp_path / "a", **options)))
    taken: list[bool] = []
    read = merge_read.read_plain

    def note(*arguments: Any) -> Any:
        found = read(*arguments)
        taken.append(found is not None)
        return found

    with Base("base", llama) as base:
        monkeypatch.setattr(merge_read, "read_plain", note)
        quick = merge_read.read_edits(adapter, base)
        monkeypatch.setattr(merge_read, "read_plain", lambda *_: None)
        slow = merge_read.read_edits(adapter, base)
    assert taken == [plain] and quick.by_name.keys() == slow.by_name.keys()
    for name, edit in quick.by_name.items():
        for ours, theirs in zip(edit.changes, slow.by_name[name].changes, strict=True):
            assert isinstance(ours, LowRank) and isinstance(theirs, LowRank)
            assert torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b)
            assert (ours.scaling, ours.shape, ours.transposed) == (theirs.scaling, theirs.shape, theirs.transposed)


@pytest.mark.parametrize("scaling", [2.0, 0.25, 1.7, -2.0])
def test_scaling_a_factor_is_scaling_the_product(scaling: float) -> None:
    """A power of two is multiplied into B, where it costs nothing; the bits are the same."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 33, generator=generator), torch.randn(17, 4, generator=generator)
    assert torch.equal(LowRank(a, b, scaling, (17, 33)).delta(), (b @ a) * scaling)


@pytest.mark.parametrize("targets", [["lm_head"], ["wte", "lm_head", "c_fc"]], ids="+".join)
def test_tied_weights_kept_tied_by_peft(targets: list[str], tmp_path: Path) -> None:
    """What the refusal of one of two tied embeddings recommends is merged, and is what PEFT merges.

    Both ends compute with the change, before and after: PEFT forgets the head's when it loads such an adapter.
    """
    from transformers import GPT2Config

    dense.save(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64), tmp_path / "gpt2")
    adapter = lora.train(tmp_path / "gpt2", tmp_path / "a", target_modules=targets, ensure_weight_tying=True)
    report = merge_adapter(str(adapter), tmp_path / "out", base=str(tmp_path / "gpt2"))
    assert not report.untied and report.check is not None and report.check.difference < 1e-4 < report.check.change
    theirs = lora.weights(lora.merge_with_peft(tmp_path / "gpt2", adapter, tmp_path / "peft"))
    ours = lora.weights(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=2e-6)


def test_writing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file as without; a failure of the thread is the caller's; what waits stays below a size."""
    tensors = {f"t{i}": torch.full((3, i + 1), float(i)) for i in range(20)}
    plan = {key: Entry(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("sparsevlm.export.merge_write._WAITING", 100)
    monkeypatch.setattr("sparsevlm.export.merge_write._SYNCED", 100)
    writer = ShardWriter(tmp_path, plan, 10**9)
    with written_behind(writer, tmp_path) as put:
        for key, tensor in tensors.items():
            put(key, tensor)
    writer.finish()
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())

    def fail(self: ShardWriter, key: str, tensor: torch.Tensor) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(ShardWriter, "write", fail)
    for count in (1, 20):  # at the end; at a later call
        with pytest.raises(OSError, match="no space left"), written_behind(writer, tmp_path) as put:
            for key, tensor in list(tensors.items())[:count]:
                put(key, tensor)
