"""What a command line asks for, and how results look."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsevlm.data.sample import Message, Sample
from sparsevlm.eval.base import EvalTask, Example, Reply
from sparsevlm.eval.metrics import Reference
from sparsevlm.eval.report import evaluations, print_result
from sparsevlm.eval.run import EvalResult, build_task
from sparsevlm.recipe.load import dump_recipe, load_recipe
from sparsevlm.registry import EVAL_TASKS
from sparsevlm.rundir import COMPLETE

RECIPE = """
name: tiny
model: {{vision: {{path: {vision}}}, language: {{path: {language}}}}}
data: {{scenes: {{path: "sparsevlm:scenes", format: scenes}}}}
stages: {{align: {{trains: [connector], data: [scenes], steps: 2}}}}
evals:
  seen: {{task: scenes, path: "sparsevlm:scenes", limit: 7, batch_size: 3, options: {{split: train}}}}
"""


@pytest.fixture
def stage(tiny_parts: dict[str, str], tmp_path: Path) -> Path:
    """A complete stage with the recipe it was made from."""
    (tmp_path / "r.yaml").write_text(RECIPE.format(**tiny_parts))
    folder = tmp_path / "run" / "align"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(tmp_path / "r.yaml")))
    (folder / "config.json").write_text("{}")
    (folder / COMPLETE).touch()
    return folder


@pytest.mark.parametrize("target", ["run", "stage"])
def test_without_a_task_the_runs_own_evaluations_are_taken(stage: Path, target: str) -> None:
    where = str(stage if target == "stage" else stage.parent)
    (spec,) = evaluations(where, None, [], {"batch_size": 5, "limit": None}, {"blind": True}).values()
    assert (spec.task, spec.limit, spec.batch_size) == ("scenes", 7, 5)
    assert spec.options == {"split": "train", "blind": True}


def test_one_evaluation_a_file(stage: Path) -> None:
    files = ["a/x.json", "b/x.json", "y.jsonl"]
    specs = evaluations(str(stage), "vqa", files, {"limit": 3}, {"metric": "yes_no"})
    assert {name: spec.path for name, spec in specs.items()} == dict(zip(["a/x.json", "b/x.json", "y"], files))
    assert all(spec.limit == 3 and spec.options == {"metric": "yes_no"} for spec in specs.values())


def make_result(rows: list[tuple[str, str, str | None, bool]]) -> EvalResult:
    """A result of ``(kind, answer, reply, core)`` rows."""
    replies = []
    for i, (kind, answer, text, core) in enumerate(rows):
        sample = Sample((Message("user", ("?",)),), id=str(i), where=f"[file]:row {i}")
        example = Example(sample, kind, Reference((answer,)), core=core)
        replies.append(Reply(example, text, float(text == answer), "" if text else "[red]unreadable"))
    kinds, report = EvalTask().summarise(replies)
    return EvalResult(kinds, {"task": "vqa", "options": {"blind": True}, **report}, replies)


def printed(result: EvalResult) -> str:
    out = io.StringIO()
    print_result("set", result, Console(file=out, width=100))
    return out.getvalue()


def test_table_faults_and_yes_no() -> None:
    rows: list[tuple[str, str, str | None, bool]] = [
        ("colour", "red", "red", True),
        ("colour", "blue", None, True),
        ("claim", "yes", "yes", True),
        ("claim", "no", "yes", True),
        ("hard", "x", "y", False),
        ("hard", "x", "x", True),  # one question outside is enough to keep its kind outside
    ]
    text = printed(make_result(rows))
    cells = [re.findall(r"[^│\s][^│]*[^│\s]|\d", line) for line in text.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["claim", "2", "50.0 %", "50.0 %"],
        ["colour", "2", "50.0 %", "50.0 %"],
        ["hard (not core)", "2", "50.0 %", "100.0 %"],
        ["core", "4", "50.0 %", "50.0 %"],
        ["all", "6", "50.0 %", "66.7 %"],
    ]
    assert "set (vqa, blind)" in text
    assert "yes/no: accuracy 50.0 %, precision 50.0 %, recall 100.0 %, F1 66.7 %, yes share 100.0 %" in text
    assert "1 of 6 questions could not be asked" in text and "[file]:row 1: [red]unreadable" in text


def test_long_lists_of_faults_are_cut() -> None:
    text = printed(make_result([("all", "x", None, True)] * 8))
    assert text.count("│ all") == 1  # one kind is all
    assert text.count("unreadable") == 5 and "… and 3 more" in text and "yes/no" not in text


def test_the_task_in_the_documentation_works() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1]
    from sparsevlm.recipe.schema import Eval

    scope: dict[str, Any] = {
        "EVAL_TASKS": EVAL_TASKS, "EvalTask": EvalTask, "Eval": Eval, "Path": Path, "Example": Example,
        "Sample": Sample, "Message": Message, "Reference": Reference,
    }  # fmt: skip
    try:
        exec(code, scope)
        spec = Eval(task="spelling", path="-", options={"words": ["dog", "cow"]})
        examples = build_task(spec).examples(spec, Path())
        assert [example.reference.answers for example in examples] == [("dog",), ("cow",)]
    finally:
        EVAL_TASKS._entries.pop("spelling", None)
