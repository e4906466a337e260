"""What a stage did, in numbers: the row in `RUN/summary.json` and the tables at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.rundir import SUMMARY
from sparsevlm.train.checkpoints import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from sparsevlm.train.parts import TrainableReport

STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class StageSummary:
    """One stage's row.

    Attributes:
        name: The stage.
        seconds: Wall time: loading, training (also of interrupted sessions), saving, evaluation.
        loss_first: Loss of the first step.
        loss_last: Mean loss since the last but one log.
        tokens_per_second: Real tokens (no padding) over all ranks, while training.
        parameters: ``{"total", "trainable", "activated", "language_model": {"total", "activated"}}``.
        eval: Question kind -> ``{"accuracy", "chance", "n", "core"}``; ``name/kind`` where several evaluations
            have the kind.
        trains: Parts that trained.
    """

    name: str
    seconds: float
    loss_first: float
    loss_last: float
    tokens_per_second: float
    parameters: dict[str, Any]
    eval: dict[str, dict[str, Any]] = field(default_factory=dict)
    trains: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON types."""
        return {**asdict(self), "trains": list(self.trains)}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> StageSummary:
        """Read a row back."""
        return cls(**{**row, "trains": tuple(row["trains"])})


def losses_and_speed(rows: Sequence[dict[str, Any]]) -> tuple[float, float, float, float]:
    """Return first loss, last loss, tokens a second and training seconds from the lines of metrics.jsonl."""
    if not rows:
        nan = float("nan")
        return nan, nan, 0.0, 0.0
    tokens = sum(row["tokens"] for row in rows)
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in rows if row["tokens_per_second"])
    return rows[0]["loss"], rows[-1]["loss"], tokens / seconds if seconds else 0.0, seconds


def write_summary(run_dir: Path, names: Sequence[str]) -> list[StageSummary]:
    """Collect the rows of finished stages into `RUN/summary.json` and return them."""
    rows = []
    for name in names:
        file = run_dir / name / STAGE_FILE
        if file.is_file():
            rows.append(StageSummary.from_dict(json.loads(file.read_text(encoding="utf-8"))["summary"]))
    document = {"stages": [row.to_dict() for row in rows]}
    write_atomically(run_dir / SUMMARY, json.dumps(document, indent=2) + "\n")
    return rows


def short(number: float) -> str:
    """Write a count: 950, 12.3k, 1.20M, 2.78B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def print_trainable(report: TrainableReport, stage: str, console: Console) -> None:
    """Print what a stage trains, part by part, and at which rate."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"{stage}: what trains", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("part")
    for column in ("parameters", "trainable", "peak lr"):
        table.add_column(column, justify="right")
    for row in report.parts:
        rate = f"{row.lr:.1e}" if row.lr is not None else "frozen"
        style = "" if row.trainable else "dim"
        table.add_row(row.part, short(row.total), short(row.trainable) if row.trainable else "-", rate, style=style)
    table.add_section()
    share = 100 * report.trainable / max(report.total, 1)
    table.add_row("all", short(report.total), f"{short(report.trainable)} ({share:.1f} %)", "")
    console.print(table)


def print_run(rows: Sequence[StageSummary], console: Console) -> None:
    """Print the tables at the end of a run: a line a stage, and accuracy a question kind beside the chance level."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="stages", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("stage", no_wrap=True)
    table.add_column("trains", min_width=10)
    for column in ("total", "trained", "active", "loss", "tokens/s", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        counts = row.parameters
        table.add_row(
            row.name,
            ", ".join(row.trains),
            *(short(counts[key]) for key in ("total", "trainable", "activated")),
            f"{row.loss_first:.2f} → {row.loss_last:.2f}",
            short(row.tokens_per_second),
            f"{row.seconds:.0f}",
        )
    console.print(table, crop=False)  # long names of stages would push the last columns out of 80 characters
    kinds = {kind: cell for row in rows for kind, cell in row.eval.items()}
    if not kinds:
        return
    table = Table(
        title="accuracy on held-out questions", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )
    table.add_column("question kind", no_wrap=True)
    for column in ("n", "chance", *(row.name for row in rows)):
        table.add_column(column, justify="right")
    for kind, cell in sorted(kinds.items(), key=lambda item: (not item[1]["core"], item[0])):
        table.add_row(
            kind if cell["core"] else f"{kind} (not core)",
            str(cell["n"]),
            f"{100 * cell['chance']:.1f} %",
            *(f"{100 * row.eval[kind]['accuracy']:.1f} %" if kind in row.eval else "-" for row in rows),
            style="" if cell["core"] else "dim",
        )
    core = [kind for kind, cell in kinds.items() if cell["core"]]
    if core:
        table.add_section()
        table.add_row("core", *_core_cells(rows, kinds, core))
    console.print(table, crop=False)


def _core_cells(rows: Sequence[StageSummary], kinds: dict[str, Any], core: Sequence[str]) -> list[str]:
    """Cells of the core line: questions, chance and accuracy over all core questions."""
    total = sum(kinds[kind]["n"] for kind in core)
    cells = [str(total), f"{100 * sum(kinds[k]['chance'] * kinds[k]['n'] for k in core) / max(total, 1):.1f} %"]
    for row in rows:
        asked = [row.eval[kind] for kind in core if kind in row.eval]
        number = sum(cell["n"] for cell in asked)
        right = sum(cell["accuracy"] * cell["n"] for cell in asked)
        cells.append(f"{100 * right / number:.1f} %" if number else "-")
    return cells
