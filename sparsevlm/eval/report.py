"""Evaluate a saved model on several sets, show the result as a table and keep it as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm import __version__
from sparsevlm.eval.run import EvalResult, build_task, evaluate
from sparsevlm.registry import EVAL_TASKS
from sparsevlm.rundir import choose_device, resolve_model

if TYPE_CHECKING:
    from rich.console import Console

    from sparsevlm.recipe.schema import Eval

SHOWN_FAULTS = 5


def evaluations(
    target: str, task: str | None, files: Sequence[str], common: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Eval]:
    """Return the evaluations that a command line asks for, by name.

    Args:
        target: Run or model directory, or Hub id.
        task: Registered task; None takes the evaluations of the recipe that the model was trained with.
        files: The task's data, an evaluation each; none for a task that makes its own.
        common: Fields of every evaluation (`limit`, `batch_size`, …); None leaves the field as it is.
        options: Options of the task (`blind`, …), laid over those that are there.

    Raises:
        ValueError: Unknown task or option, files missing, or no recipe to take the evaluations from.
    """
    from sparsevlm.recipe.schema import Eval

    fields = {name: value for name, value in common.items() if value is not None}
    if task is None:
        return {
            name: Eval.model_validate(
                spec.model_dump()
                | fields
                | {"options": {**spec.options, **options}}  # revalidated: limits may be wrong
            )
            for name, spec in _recipe_evaluations(target, files).items()
        }
    EVAL_TASKS.get(task)
    if not files and task == "scenes":
        files = ["sparsevlm:scenes"]
    if not files:
        raise ValueError(f"--task {task} needs a file: sparsevlm eval {target} --task {task} FILE.json")
    stems = [Path(file).stem for file in files]
    names = [stem if stems.count(stem) == 1 else file for stem, file in zip(stems, files)]
    return {
        name: Eval.model_validate({"task": task, "path": file, "options": dict(options), **fields})
        for name, file in zip(names, files)
    }


def _recipe_evaluations(target: str, files: Sequence[str]) -> dict[str, Eval]:
    from sparsevlm.recipe.load import load_recipe

    if files:
        raise ValueError(
            f"{files[0]}: say which task the file is for, --task NAME (known: {', '.join(EVAL_TASKS.names())})"
        )
    recipe = Path(resolve_model(target)) / "recipe.yaml"
    found = load_recipe(recipe).evals if recipe.is_file() else {}
    if not found:
        why = "its recipe names no evaluations" if recipe.is_file() else "no recipe.yaml lies beside it"
        raise ValueError(f"{target}: {why}; choose one with --task NAME (known: {', '.join(EVAL_TASKS.names())})")
    return found


def evaluate_saved(
    target: str,
    specs: Mapping[str, Eval],
    *,
    device: str | None = None,
    dtype: str = "auto",
    predictions: Path | None = None,
    progress: bool = True,
) -> dict[str, EvalResult]:
    """Load a saved model and evaluate it.

    Args:
        target: Run or model directory, or Hub id.
        specs: Evaluations by name.
        device: Where to run; default: a GPU where there is one.
        dtype: Type of the weights; ``"auto"`` as saved.
        predictions: Folder for the replies, a ``NAME.jsonl`` an evaluation.
        progress: Show a progress bar.
    """
    for spec in specs.values():
        build_task(spec)  # wrong options are told before minutes of loading
    device = choose_device(device)
    path = resolve_model(target)
    from sparsevlm.model.build import load_model

    model: Any
    model, processor = load_model(path, dtype=dtype)
    model.to(device)
    return {
        name: evaluate(
            model,
            processor,
            spec,
            progress=progress,
            predictions_path=predictions / f"{Path(name).stem}.jsonl" if predictions else None,
        )
        for name, spec in specs.items()
    }


def as_document(target: str, results: Mapping[str, EvalResult]) -> dict[str, Any]:
    """Return results as the JSON document of ``sparsevlm eval --output``."""
    return {
        "model": resolve_model(target),
        "sparsevlm": __version__,
        "evals": {name: {"kinds": dict(result), "report": result.report} for name, result in results.items()},
    }


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """Write a JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_result(name: str, result: EvalResult, console: Console) -> None:
    """Print accuracy beside the chance level by question kind, POPE's figures and what could not be asked."""
    from rich.table import Table

    report = result.report
    blind = ", blind" if report["options"].get("blind") else ""
    table = Table(title=f"{name} ({report['task']}{blind})", title_justify="left")
    table.add_column("question kind")
    for column in ("n", "accuracy", "chance"):
        table.add_column(column, justify="right")
    for kind, row in result.items():
        label = kind if row["core"] else f"{kind} (not core)"
        table.add_row(
            label, str(row["n"]), percent(row["accuracy"]), percent(row["chance"]), style="" if row["core"] else "dim"
        )
    table.add_section()
    if report["core_accuracy"] is not None and not all(row["core"] for row in result.values()):
        core = [row for row in result.values() if row["core"]]
        table.add_row(
            "core", str(sum(row["n"] for row in core)), percent(report["core_accuracy"]), percent(report["core_chance"])
        )
    if list(result) != ["all"]:  # questions without kinds are one row already
        table.add_row("all", str(report["n"]), percent(report["accuracy"]), percent(report["chance"]))
    console.print(table)
    for line in yes_no_lines(report["yes_no"]):
        console.print(line, markup=False, highlight=False)
    faults = report["faults"]
    if faults:
        console.print(f"{len(faults)} of {report['n']} questions could not be asked and count as wrong:", markup=False)
        for fault in faults[:SHOWN_FAULTS]:
            console.print(f"  {fault['where'] or fault['id']}: {fault['reason']}", markup=False, highlight=False)
        if len(faults) > SHOWN_FAULTS:
            console.print(f"  … and {len(faults) - SHOWN_FAULTS} more (see --output)")


def yes_no_lines(figures: Mapping[str, Mapping[str, float | int]]) -> list[str]:
    """Return POPE's figures as a line a kind; a single kind is the overall line already."""
    names = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_share": "yes share"}
    lines = []
    for kind, row in figures.items() if len(figures) > 2 else [("", figures["overall"])] if figures else []:
        shares = ", ".join(f"{name} {percent(row[key])}" for key, name in names.items())
        lines.append(f"yes/no{kind and f' ({kind})'}: {shares}; undecided {row['undecided']} of {row['n']}")
    return lines


def percent(share: float) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.1f} %"
