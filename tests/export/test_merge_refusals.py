"""What `merge` refuses, with what to pass instead; what an interruption leaves; the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sparsevlm.adapters.saved import write_parent
from sparsevlm.cli import app
from sparsevlm.export import merge_check
from sparsevlm.export.merge import merge_adapter
from sparsevlm.export.shards import ShardWriter
from tests.export import dense, lora


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    dense.save(dense.text("llama"), directory)
    return directory


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora.train(llama, tmp_path_factory.mktemp("adapters") / "plain", target_modules=["q_proj", "down_proj"])


def refused(match: str, adapter: Path | str, out: Path, base: Path | None = None, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        merge_adapter(str(adapter), out, base=base and str(base), check=False, **options)
    assert not out.exists() and not list(out.parent.glob(".*.partial"))


def edited(adapter: Path, out: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Copy an adapter with another configuration."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text())
    edit(config)
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"peft_type": "MMA"}, "MMA adapter, which has no merged form: its router.*Keep it as an adapter"),
        ({"peft_type": "MMA"}, "PeftModel.from_pretrained, upload it with its base by sparsevlm push .*--adapter-only"),
        ({"peft_type": "PARTIAL_LORA"}, "PARTIAL_LORA adapter, .*: only image tokens pass it"),
        ({"peft_type": "SLICE_LORA"}, "SLICE_LORA adapter, .*: each slice of a picture"),
        ({"peft_type": "LORA_EXPERTS"}, "LORA_EXPERTS adapter, .*: a router chooses its experts"),
        ({"peft_type": "PROMPT_TUNING"}, "no merged form: it adds virtual tokens"),
        ({"peft_type": "PREFIX_TUNING"}, "no merged form: it adds keys and values"),
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LoRA"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens: it is active after"),
        ({"layer_replication": [[0, 1]]}, "more layers than the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"new_option": 3}, "sets new_option, which the installed PEFT does not know"),
        ({}, "does not say what it was trained on; name that model with --base"),
        ({"base_model_name_or_path": "./gone"}, "was trained on './gone', which is not there.*--base"),
    ],
    ids=str,
)
def test_adapters_without_a_merged_form_or_base(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(match, lora.save_adapter(tmp_path / "adapter", **options), tmp_path / "out")


def test_folders_that_are_no_adapter(adapter: Path, llama: Path, tmp_path: Path) -> None:
    refused("whole model, not an adapter.*--base", llama, tmp_path / "out")
    refused(
        f"is a file; pass the directory that holds it: {adapter}", adapter / "adapter_config.json", tmp_path / "out"
    )
    refused("no such directory", tmp_path / "gone", tmp_path / "out")
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "tune")
    refused(f"a folder of adapters; pass one of its adapters: {run / 'tune'}", run, tmp_path / "out")
    (run / "tune" / "stage.json").write_text("{}")
    refused("this stage is not complete", run / "tune", tmp_path / "out")
    (run / "tune" / "COMPLETE").write_text("")
    refused(f"is a run; pass one of its adapters: {run / 'tune'}", run, tmp_path / "out")
    plain = tmp_path / "plain"
    shutil.copytree(llama, plain / "align")
    for name in ("stage.json", "COMPLETE"):
        (plain / "align" / name).write_text("{}")
    refused(r"a run whose complete stages \(align\) are all whole models", plain, tmp_path / "out")
    shutil.copytree(run / "tune", plain / "tune")
    refused(rf"is a whole model.*its run has {plain / 'tune'}", plain / "align", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused("holds no adapter_config.json .found: nothing", tmp_path / "empty", tmp_path / "out")
    (run / "tune" / "adapter_model.safetensors").rename(run / "tune" / "adapter_model.bin")
    refused("but adapter_model.bin; load the adapter with PEFT", run / "tune", tmp_path / "out", llama)


def test_names_that_the_hub_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def gone(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    refused("someone/gone: no such directory, and not fetched from the Hub: no such", "someone/gone", tmp_path / "out")
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "cache"))
    refused("someone/model on the Hub holds no adapter_config.json", "someone/model", tmp_path / "out")


def test_bases_that_do_not_fit(adapter: Path, llama: Path, tmp_path: Path) -> None:
    dense.save(dense.text("llama", hidden_size=64), tmp_path / "wide")
    refused(r"q_proj\.lora_A.* is \(4, 32\), but .* needs \(4, 64\)", adapter, tmp_path / "out", tmp_path / "wide")
    dense.save(dense.text("llama", num_hidden_layers=2), tmp_path / "short")
    refused("has no place for", adapter, tmp_path / "out", tmp_path / "short")
    dense.save(dense.text("llama", num_hidden_layers=4), tmp_path / "deep")
    refused("lacks .*layers.3", adapter, tmp_path / "out", tmp_path / "deep")
    refused("is an adapter itself, not a base", adapter, tmp_path / "out", adapter)
    quantised = tmp_path / "quantised"
    shutil.copytree(llama, quantised)
    config = json.loads((llama / "config.json").read_text())
    method = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (quantised / "config.json").write_text(json.dumps(config | method))
    refused(r"is quantised \(bitsandbytes\).*as --base", adapter, tmp_path / "out", quantised)


def test_the_parent_is_known_by_its_weights(adapter: Path, llama: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(adapter, stage)
    shutil.copytree(llama, tmp_path / "parent")
    write_parent(stage, tmp_path / "parent")
    report = merge_adapter(str(stage), tmp_path / "right", check=False)
    assert "hash" in report.identity
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    tensors = {key: value + 1 for key, value in load_file(llama / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused("trained on other weights", stage, tmp_path / "out", other)


def test_broken_tensors(adapter: Path, llama: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    for match, changed in (
        ("lacks ", {key: value for key, value in tensors.items() if key != name}),
        ("not finite", {**tensors, name: torch.full_like(tensors[name], torch.nan)}),
        ("has no place for", {**tensors, "base_model.model.score.weight": torch.ones(2, 2)}),
    ):
        broken = edited(adapter, tmp_path / match.strip(), lambda _: None)
        save_file(changed, broken / "adapter_model.safetensors")
        refused(match, broken, tmp_path / "out", llama)


def test_other_arguments(adapter: Path, llama: Path, tmp_path: Path) -> None:
    refused("is not a size", adapter, tmp_path / "out", llama, max_shard_size="much")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(ValueError, match="exists and is not empty"):
        merge_adapter(str(adapter), tmp_path / "used", base=str(llama))
    huge = edited(adapter, tmp_path / "huge", lambda config: config.update(lora_alpha=10**9))
    refused("overflows in float16", huge, tmp_path / "out", llama, dtype="float16")


def test_interrupted_merge_leaves_nothing(
    adapter: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = ShardWriter.write

    def stop_halfway(self: ShardWriter, key: str, tensor: torch.Tensor) -> None:
        assert not (tmp_path / "out").exists()
        if len(written) == 10:
            raise KeyboardInterrupt
        written.append(key)
        write(self, key, tensor)

    monkeypatch.setattr(ShardWriter, "write", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(str(adapter), tmp_path / "out", base=str(llama), check=False)
    assert len(written) == 10 and list(tmp_path.iterdir()) == []


def test_the_check_finds_a_wrong_merge(
    adapter: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the scaling had been left out."""
    from sparsevlm.export.merge_deltas import LowRank

    delta = LowRank.delta
    monkeypatch.setattr(LowRank, "delta", lambda self: delta(self) / 2)
    with pytest.raises(ValueError, match="logits of the merged model differ"):
        merge_adapter(str(adapter), tmp_path / "out", base=str(llama))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_never_trained_is_told(llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(lora.load_text(llama), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "fresh"))
    report = merge_adapter(str(tmp_path / "fresh"), tmp_path / "out", base=str(llama))
    assert report.idle == report.low_rank == 3
    assert report.check is not None and report.check.change == 0


def test_command(adapter: Path, llama: Path, tmp_path: Path) -> None:
    arguments = ["merge", str(adapter), str(tmp_path / "out"), "--base", str(llama)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for part in ("LoRA", "LlamaForCausalLM", "6 merged, 0 replaced, 24 as they were", "differ by at most", "wrote"):
        assert part in done.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "exists and is not empty" in again.output
    assert merge_check.ROWS * merge_check.TOKENS == 64
