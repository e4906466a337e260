"""What watches a training run: metrics.jsonl and the progress line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_NOT_WRITTEN = ("epoch", "total_flos")


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Turn ``{"lr/connector": x}`` into ``{"lr": {"connector": x}}``, and numbered entries into a list."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return {key: _as_list(value) for key, value in nested.items()}


def _as_list(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(key == str(i) for i, key in enumerate(node)):
        return list(node.values())
    return {key: _as_list(value) for key, value in node.items()}


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that a killed run left unfinished is dropped."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter(TrainerCallback):
    """Writes one JSON line each log, and forgets lines that a resumed run will write again.

    Args:
        file: ``metrics.jsonl``.

    Attributes:
        details: Entries that only the next line gets, in the place of the log's own of that name.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.details: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines after the step that training starts from."""
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_metrics(self.file) if row["step"] <= state.global_step]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **nest({k: v for k, v in logs.items() if k not in _NOT_WRITTEN})}
        row |= self.details
        self.details = {}
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")


def _rate(value: float) -> str:
    """Write a token rate: 950, 12.3k, 1.20M."""
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    return f"{value / 1e3:.1f}k" if value >= 1e4 else f"{value:.0f}"


def show_balance(balance: float, collapsed: float) -> str:
    """Write the routing's balance, with a colour and a word where it is low.

    Args:
        balance: Of the worst layer, see `moe.metrics.effective_share`.
        collapsed: The balance where all tokens take the same k of E experts, k / E. Half of the way there counts as
            collapsing, a fifth as uneven.
    """
    health = (balance - collapsed) / (1 - collapsed) if collapsed < 1 else 1.0
    text = f"balance {balance:.2f}"
    if health < 0.5:
        return f"[bold red]{text} collapsing[/]"
    return f"[yellow]{text} uneven[/]" if health < 0.8 else f"[green]{text}[/]"


class ProgressLine(TrainerCallback):
    """One line that moves: step, loss, learning rate, tokens a second. Without a terminal, ten plain lines a stage.

    Args:
        stage: Name shown in front.
        console: Where to print; default standard error, so that standard output stays for results.
        collapsed: See `show_balance`; for stages with routed experts.
        group: Routers whose balance is shown, see `sparsevlm.moe.groups`.
    """

    def __init__(self, stage: str, console: Console | None = None, collapsed: float = 0.0, group: str = "moe") -> None:
        self.stage = stage
        self.collapsed = collapsed
        self.balance = f"{group}/balance"
        self.console = console or Console(file=sys.stderr)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.printed = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the line."""
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=self.console,
            expand=True,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.stage, total=state.max_steps, completed=state.global_step, numbers="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the line."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the numbers of a log."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        rates = [value for key, value in logs.items() if key.startswith("lr/")]
        numbers = (
            f"loss {logs['loss']:.4f}  lr {max(rates, default=0.0):.2e}  {_rate(logs['tokens_per_second'])} tokens/s"
        )
        if self.balance in logs:
            numbers += f"  {show_balance(logs[self.balance], self.collapsed)}"
        if self.bar is not None:
            self.bar.update(self.task, numbers=numbers)
            return
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        if tenth > self.printed:
            self.printed = tenth
            self.console.print(f"{self.stage}  step {state.global_step}/{state.max_steps}  {numbers}", highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the line."""
        self.close()

    def close(self) -> None:
        """Give the terminal back (also after an error)."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
