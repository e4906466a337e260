"""`sparsevlm upcycle`: its options are the recipe's, its messages, and the memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sparsevlm import cli
from sparsevlm.export import stream
from sparsevlm.export.options import read_options
from sparsevlm.export.shards import Entry, ShardReader, ShardWriter
from sparsevlm.recipe.moe import Router, Upcycle
from tests.export import dense


def run(*arguments: str) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


# ---- options ------------------------------------------------------------------------------------------------------


VALUES: dict[str, tuple[str, Any]] = {
    "layers": ("1,2-3", [1, 2, 3]),
    "experts": ("2", 2),
    "top_k": ("1", 1),
    "granularity": ("2", 2),
    "shared_expert": ("gated", "gated"),
    "noise_std": ("0.5", 0.5),
    "drop_ratio": ("0.25", 0.25),
    "aux_loss_coef": ("0.5", 0.5),
    "aux_loss_reduction": ("sum", "sum"),
    "aux_loss_scope": ("global", "global"),
    "z_loss_coef": ("0.5", 0.5),
    "experts_implementation": ("eager", "eager"),
    "router.scoring": ("sigmoid", "sigmoid"),
    "router.init": ("zero", "zero"),
    "router.init_std": ("0.5", 0.5),
    "router.jitter": ("0.5", 0.5),
    "router.bias_update_rate": ("0.5", 0.5),
    "router.capacity_factor": ("1.5", 1.5),
    "router.eval_capacity_factor": ("2.5", 2.5),
    "router.min_capacity": ("7", 7),
    "router.drop": ("probability", "probability"),
}
"""What each option is given on the command line, and what must arrive."""

FLAGS = {"router.init": "--router-init", "router.init_std": "--router-init-std"}


def given_spec(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Upcycle:
    """Return what the command hands to the library."""
    seen: list[Upcycle] = []

    def fake(source: str, out: Path, spec: Upcycle, **_: Any) -> Any:
        seen.append(spec)
        raise ValueError("that is all")

    monkeypatch.setattr(stream, "upcycle_checkpoint", fake)
    assert run("upcycle", "src", "out", *arguments) == 2
    return seen[0]


def test_every_option_of_the_recipe_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [
        word
        for name, (text, _) in VALUES.items()
        for word in (FLAGS.get(name, "--" + name.removeprefix("router.").replace("_", "-")), text)
    ]
    spec = given_spec([*flags, "--no-norm-topk-prob"], monkeypatch)
    for name, (_, value) in VALUES.items():
        section, _, option = name.rpartition(".")
        assert getattr(spec.router if section else spec, option) == value, name
    assert spec.router.norm_topk_prob is False
    spec = given_spec(["--experts", "2", "--expert-from", "a", "--expert-from", "b"], monkeypatch)
    assert spec.experts_from == ["a", "b"]
    assert given_spec(["--aux-loss-count", "first"], monkeypatch).aux_loss_count == "first"  # not with a granularity
    covered = {*VALUES, "router.norm_topk_prob", "experts_from", "aux_loss_count"}
    options = {*Upcycle.model_fields, *(f"router.{name}" for name in Router.model_fields)} - {"router"}
    assert covered == options


def test_nothing_given_is_the_recipe_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_spec([], monkeypatch) == Upcycle()


def test_all_faults_at_once_with_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    faulty = ["--layers", "some", "--top-k", "5", "--jitter", "2", "--scoring", "max", "--noise-std", "-1"]
    assert run("upcycle", "src", "out", *faulty) == 2
    error = capsys.readouterr().err
    for line in (
        "--layers some: not alternate, all",
        "--top-k: top_k 5 is more than the 4 experts",
        "--jitter 2.0: input should be less than 1",
        "--scoring max: input should be 'softmax', 'topk_softmax', 'sigmoid' or 'modality'",
        "--noise-std -1.0: input should be greater than or equal to 0",
    ):
        assert line in error, error
    assert len(error.strip().splitlines()) == 5


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", "all"), ("0", [0]), ("0,2,4", [0, 2, 4]), ("8-11, 1", [8, 9, 10, 11, 1])],
)
def test_layers(text: str, layers: Any) -> None:
    assert read_options({"layers": text}).layers == layers


@pytest.mark.parametrize("text", ["", "1,", "-1", "1-", "x-2", "3-1"])
def test_layers_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="--layers"):
        read_options({"layers": text})


def test_forms_are_those_of_the_library() -> None:
    import inspect

    from sparsevlm.export.target import Form

    annotation = inspect.get_annotations(cli.upcycle, eval_str=True)["form"]
    assert get_args(get_args(annotation)[0]) == get_args(Form)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sparse"
    assert run("upcycle", "sparsevlm:quickstart/language", str(out), "--max-shard-size", "1MB") == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "LlamaForCausalLM -> Qwen2MoeForCausalLM",
        "layers: 2 of 4 (0, 2), each 4 experts of width 344, top 2",
        "the start is function-preserving: equal experts",
        "logits: largest difference",
        f"wrote {out}",
    ):
        assert text in said, said
    assert len(list(out.glob("*.safetensors"))) == 4
    assert run("upcycle", "sparsevlm:quickstart/language", str(out)) == 2
    assert run("upcycle", str(tmp_path / "nothing"), str(tmp_path / "x")) == 2
    assert run("upcycle", str(out), str(tmp_path / "x")) == 2


def test_parameters_are_counted(tmp_path: Path) -> None:
    model = dense.save(dense.text("qwen3", head_dim=8, tie_word_embeddings=True), tmp_path / "dense")
    report = stream.upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "out", Upcycle(layers="all"), check=False)
    assert report.parameters_before == model.num_parameters()
    ffn, router = 3 * 32 * 48, 4 * 32
    assert report.parameters_after == report.parameters_before + 3 * (3 * ffn + router)
    assert report.parameters_activated == report.parameters_before + 3 * (ffn + router)


# ---- memory -------------------------------------------------------------------------------------------------------


def test_one_layer_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense.save(dense.text("llama", num_hidden_layers=6, vocab_size=32), tmp_path / "dense")
    live = peak = total = 0
    read = ShardReader.read

    def leave(size: int) -> None:
        nonlocal live
        live -= size

    def watched(self: ShardReader, key: str) -> Tensor:
        nonlocal live, peak, total
        tensor = read(self, key)
        weakref.finalize(tensor, leave, tensor.nbytes)
        live, total = live + tensor.nbytes, total + tensor.nbytes
        peak = max(peak, live)
        return tensor

    monkeypatch.setattr(ShardReader, "read", watched)
    stream.upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "out", Upcycle(layers="all"), check=False)
    ffn = 3 * 32 * 48 * 4
    assert ffn <= peak <= 2 * ffn < total / 3, (peak, ffn, total)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """300 MB become 750 MB; the process takes no more than some copies of one layer's experts, which are 50 MB."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=4
    )
    config.dtype = "bfloat16"  # pyright: ignore[reportAttributeAccessIssue]
    with torch.device("meta"):
        plan = {
            name: Entry(tuple(value.shape), torch.bfloat16)
            for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    source = tmp_path / "dense"
    source.mkdir()
    config.save_pretrained(source)
    writer = ShardWriter(source, plan, 10**9)
    for name, entry in plan.items():
        writer.write(name, torch.zeros(entry.shape, dtype=entry.dtype))
    writer.finish()
    code = f"""
import json, resource, pathlib
from sparsevlm.export import stream
from sparsevlm.recipe.moe import Upcycle
import transformers.models.llama.modeling_llama, transformers.models.qwen2_moe.modeling_qwen2_moe
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = stream.upcycle_checkpoint({str(source)!r}, pathlib.Path({str(tmp_path / "out")!r}), Upcycle(), check=False)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([report.nbytes, (after - before) * 1024]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    nbytes, grown = json.loads(done.stdout.splitlines()[-1])
    layer = 4 * 3 * 512 * 4096 * 2
    assert nbytes > 14 * layer
    assert grown < 4 * layer, f"{grown / 1e6:.0f} MB for experts of {layer / 1e6:.0f} MB a layer"
    print(f"grew by {grown / 1e6:.0f} MB; a layer's experts are {layer / 1e6:.0f} MB")
