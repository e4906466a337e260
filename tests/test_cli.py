"""The command line: lean imports, arguments that arrive, exit codes, and evaluation and chat end to end."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sparsevlm
from sparsevlm.cli import main
from sparsevlm.rundir import COMPLETE
from sparsevlm.train.launch import LaunchError
from tests import tiny

HEAVY = ("torch", "transformers", "numpy", "PIL", "datasets", "ruamel", "sparsevlm.recipe.schema")
"""Not pydantic: typer itself imports it for some option types."""


def run(*arguments: str) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", ["", "plan", "train", "eval", "chat", "version"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"""
import sys
from sparsevlm.cli import main
try:
    main({[*command.split(), "--help"]!r})
finally:
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    print("HEAVY", loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"Usage: sparsevlm {command}".strip() in done.stdout and "HEAVY []" in done.stdout


def test_module_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "sparsevlm", "version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, sparsevlm.__version__)


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "train" in "".join(capsys.readouterr())


# ---- plan and train: arguments arrive, faults become exit codes ---------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of `launch.train`, as its own signature binds them; the first entry may be an exception to raise."""
    from sparsevlm.train import launch

    calls: list[Any] = []
    signature = inspect.signature(launch.train)

    def train(*args: Any, **kwargs: Any) -> None:
        fault = calls.pop(0) if calls and isinstance(calls[0], BaseException) else None
        calls.append(signature.bind(*args, **kwargs).arguments)
        if fault is not None:
            raise fault

    monkeypatch.setattr(launch, "train", train)
    return calls


def test_train_passes_its_arguments(launched: list[Any]) -> None:
    assert run("train", "r.yaml", "a.b=1", "c=x y", "--gpus", "2", "--nnodes", "3", "--node-rank", "1", "--rdzv", "h:1",
               "-o", "out") == 0  # fmt: skip
    assert launched == [
        {
            "recipe_path": Path("r.yaml"), "overrides": ["a.b=1", "c=x y"], "gpus": 2, "nproc": None, "nnodes": 3,
            "node_rank": 1, "rdzv": "h:1", "output": Path("out"),
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (ValueError("r.yaml:3:1: stages: missing"), 2, "r.yaml:3:1"),
        (OSError("disk full"), 1, "disk full"),
        (LaunchError("a process failed"), 1, "a process failed"),
        (KeyboardInterrupt(), 130, "same command again to continue"),
    ],
)
def test_faults_are_told_without_traceback(
    launched: list[Any], capsys: pytest.CaptureFixture[str], fault: BaseException, code: int, message: str
) -> None:
    launched.append(fault)
    assert run("train", "r.yaml") == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_debug_shows_the_traceback(launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    launched.append(ValueError("wrong"))
    assert run("train", "r.yaml", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_faults_of_the_program_keep_their_traceback(launched: list[Any]) -> None:
    launched.append(RuntimeError("bug"))
    with pytest.raises(RuntimeError, match="bug"):
        main(["train", "r.yaml"])


@pytest.mark.parametrize("arguments", [("train",), ("train", "r.yaml", "--gpus", "0"), ("dance",), ("eval",)])
def test_wrong_arguments(arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == 2


def test_plan_of_a_missing_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "nowhere.yaml") == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_plan_prints_json_and_tables(
    tiny_parts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""
name: tiny
model:
  vision: {{path: {tiny_parts["vision"]}}}
  language: {{path: {tiny_parts["language"]}}}
data:
  scenes: {{path: "sparsevlm:scenes", format: scenes}}
stages:
  align: {{trains: [connector], data: [scenes], steps: 2}}
"""
    )
    assert run("plan", str(recipe), "stages.align.batch.rows=4", "--media", "64x48,3f@64x48", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (stage,) = document["stages"]
    assert stage["visual_tokens"] == {"64x48": 16, "3f@64x48": 48}
    assert stage["tokens_per_step"] == 4 * 2048
    assert run("plan", str(recipe)) == 0
    assert "align" in capsys.readouterr().out
    assert run("plan", str(recipe), "stages.align.trains=[conector]") == 2
    assert "stages.align.trains" in capsys.readouterr().err


# ---- eval and chat on a saved model ---------------------------------------------------


@pytest.fixture(scope="module")
def saved_run(tiny_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one complete stage and one that is not."""
    from sparsevlm.model.build import build_model

    folder = tmp_path_factory.mktemp("run")
    model, processor = build_model(tiny.recipe_model(tiny_parts))
    model.save_pretrained(folder / "align")
    processor.save_pretrained(folder / "align")
    (folder / "align" / "stage.json").write_text("{}")
    (folder / "align" / COMPLETE).touch()
    (folder / "instruct").mkdir()
    tiny.picture("red").save(folder / "red.png")
    rows = [
        {"image": "red.png", "question": "what color is it ?", "answer": "red", "kind": "color"},
        {"question": "is it red ?", "answer": "yes", "kind": "claim", "metric": "yes_no"},
        {"image": "gone.png", "question": "what color is it ?", "answer": "red", "kind": "color"},
    ]
    (folder / "q.json").write_text(json.dumps(rows))
    return folder


def test_eval_writes_json_and_a_table(saved_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sub" / "out.json"
    assert run("eval", str(saved_run), str(saved_run / "q.json"), "--task", "vqa", "--max-new-tokens", "4",
               "--output", str(out), "--predictions", str(tmp_path), "--device", "cpu") == 0  # fmt: skip
    document = json.loads(out.read_text())
    assert document["model"] == str(saved_run / "align")
    evaluated = document["evals"]["q"]
    assert evaluated["kinds"]["color"]["n"] == 2 and set(evaluated["kinds"]["claim"]) == {
        "accuracy", "chance", "n", "core",
    }  # fmt: skip
    assert evaluated["report"]["yes_no"]["overall"]["n"] == 1
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 3
    said = capsys.readouterr().out
    assert "color" in said and "1 of 3 questions could not be asked" in said and "gone.png" in said


def test_eval_of_scenes_blind_with_options(saved_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run("eval", str(saved_run / "align"), "--task", "scenes", "--limit", "4", "--option", "kinds=[colour, size]",
               "--blind", "--batch-size", "4", "--max-new-tokens", "2", "-o", str(out)) == 0  # fmt: skip
    evaluated = json.loads(out.read_text())["evals"]["sparsevlm:scenes"]
    assert set(evaluated["kinds"]) == {"colour", "size"} and evaluated["report"]["n"] == 4
    assert evaluated["report"]["options"] == {"kinds": ["colour", "size"], "blind": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "vqu", "q.json"], "did you mean 'vqa'"),
        (["--task", "vqa"], "needs a file"),
        (["q.json"], "--task NAME"),
        ([], "no recipe.yaml"),
        (["--task", "scenes", "--option", "loud"], "KEY=VALUE"),
        (["--task", "scenes", "--option", "loud=1"], "loud"),
    ],
)
def test_eval_faults(saved_run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", str(saved_run), *arguments) == 2
    assert message in capsys.readouterr().err


def test_chat_one_shot(saved_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["chat", str(saved_run), "--image", str(saved_run / "red.png"), "--prompt", "what color is it ?",
                 "--prompt", "how many ?", "--max-new-tokens", "4"]  # fmt: skip
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 2
    assert run(*arguments) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--image", "gone.png"], "gone.png: no such file"),
        (["RUN/instruct"], "no complete stage"),
        (["nowhere"], "no such run or model"),
        (["RUN", "--temperature", "-1"], "temperature"),
        (["RUN", "--device", "gpu"], "device 'gpu' cannot be used"),
        (["RUN", "--dtype", "int8"], "int8"),
    ],
)
def test_chat_faults(saved_run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", *(argument.replace("RUN", str(saved_run)) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("logger", "remark"),
    [
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: %s"),
    ],
)
def test_remarks_of_libraries_are_dropped_and_warnings_kept(
    logger: str, remark: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run("plan", "nowhere.yaml")  # sets the filters
    log = logging.getLogger(logger)
    log.addHandler(caplog.handler)
    try:
        log.warning(remark, "x") if "%s" in remark else log.warning(remark)
        log.warning("something else")
    finally:
        log.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records if record.name == logger][-1:] == ["something else"]
    assert not any(remark[:20] in record.message for record in caplog.records)
