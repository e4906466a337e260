"""What merging did, and how that is printed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from sparsevlm.export.merge_check import MergeCheck
    from sparsevlm.export.merge_quantised import AsTrained
    from sparsevlm.export.merge_unmerge import Unmerged


@dataclass(frozen=True)
class MergeReport:
    """What was done.

    Attributes:
        adapter: As the user named it, or them.
        method: LoRA, rsLoRA or DoRA, or how several were combined.
        base: The base's name.
        base_class: Its class.
        identity: How the base is known to be the right one.
        low_rank: Weights with a low-rank change.
        replaced: Weights that were replaced: modules that trained in full.
        mixed: Of `replaced`, those that are the base's and the weighted changes of several adapters.
        carried: Stored tensors that stay as they are.
        idle: Of `low_rank`, those whose B is zero: never trained.
        untied: Two tied weights are two tensors now.
        dtype: The type that most weights have.
        files: Weight files written.
        nbytes: Their size.
        notes: What else the user should know.
        unmerged: What came back of the base, None where that was not looked at.
        check: The comparison of logits, None where that was not looked at.
        replayed: Weights that changes were added to as training on quantised ones saw them.
        as_trained: Both ways to merge beside what was trained, of an adapter on quantised weights.
    """

    adapter: str
    method: str
    base: str
    base_class: str
    identity: str
    low_rank: int
    replaced: int
    mixed: int
    carried: int
    idle: int
    untied: bool
    dtype: str
    files: int
    nbytes: int
    notes: tuple[str, ...] = ()
    unmerged: Unmerged | None = None
    check: MergeCheck | None = None
    replayed: int = 0
    as_trained: AsTrained | None = None


def print_report(report: MergeReport, out: Path, console: Console) -> None:
    """Print what was done."""
    lines = [f"{report.method} {report.adapter} -> {report.base} ({report.base_class})", f"base: {report.identity}"]
    lines.append(
        f"weights: {report.low_rank} merged, {report.replaced} replaced, {report.carried} as they were; computed in "
        f"float32, stored in {report.dtype}"
    )
    if report.replayed:
        lines.append(f"quantisation: {report.replayed} weights of the base are as training saw them, dequantised")
    if report.mixed:
        lines.append(
            f"trained in full: {report.mixed} of the replaced are the base's with the adapters' changes added, in the "
            "same weights"
        )
    if report.idle:
        lines.append(f"note: {report.idle} of {report.low_rank} have B = 0, as at the start: they never trained")
    if report.untied:
        lines.append("untied: input and output embeddings are two tensors now; config.json says so")
    lines += [f"note: {note}" for note in report.notes]
    if report.unmerged is not None:
        lines += report.unmerged.describe()
    lines += ["logits: not compared"] if report.check is None else report.check.describe()
    if report.as_trained is not None:
        lines += report.as_trained.describe()
    files = "1 file" if report.files == 1 else f"{report.files} files"
    lines.append(f"wrote {out} ({report.nbytes / 1e6:.1f} MB of weights in {files})")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
