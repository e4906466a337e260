"""Taking the changes off the weights that were written: the base has to come back, within one rounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsevlm.export.merge_deltas import Change, Edit, LowRank
from sparsevlm.export.merge_job import Job, Step
from sparsevlm.export.shards import ShardReader

_EXACT = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Unmerged:
    """How well the base came back.

    Attributes:
        changed: Tensors whose change was taken off.
        same: Other tensors; what is on the disk is, bit for bit, the base's, or what it was replaced by.
        largest: Largest difference of a value from the base's.
        where: The tensor that has it.
        share: Largest difference, of what one rounding to the stored type explains: at most 1.
        lost: Of the change itself, what rounding took: norm of all differences, over the norm of all changes.
        dtype: Type of most weights.
    """

    changed: int
    same: int
    largest: float
    where: str
    share: float
    lost: float
    dtype: str

    def describe(self) -> list[str]:
        """Return lines for the console."""
        return [
            f"unmerged: {self.changed} weights less their change are the base's to within one rounding of {self.dtype} "
            f"(largest difference {self.largest:.1e}, {self.share:.2f} of it, in {self.where}); rounding took "
            f"{100 * self.lost:.2g} % of the change",
            f"  {self.same} other tensors are what they should be, bit for bit",
        ]


@torch.no_grad()
def take_off(job: Job, directory: Path) -> Unmerged:
    """Read every tensor that was written, take its change off, and compare with the base; one after another.

    Raises:
        ValueError: A tensor differs by more than one rounding to its type, and of two sums in float32.
    """
    changed = same = 0
    largest, share, where = 0.0, 0.0, "none"
    differences = changes = 0.0
    with ShardReader(directory) as written:
        for step in job.steps():
            merged = written.read(step.key)
            weight = job.weight(step.source)
            if step.edit is None or step.edit.value is not None or step.edit.rows is not None:
                if not torch.equal(
                    merged, job.rounded(step.key, weight if step.edit is None else step.edit.apply(weight))
                ):
                    raise _lost(step, "it is not, bit for bit, what it should be")
                same += 1
                continue
            restored, allowed = restore(step.edit, merged, weight)
            difference = (restored - weight.float()).abs_()
            parts = difference / allowed
            worst = float(torch.nan_to_num(parts, nan=torch.inf).max())
            if worst > 1:
                raise _lost(step, f"a value differs by {float(difference.max()):.3g}, {worst:.3g} roundings")
            changed += 1
            share = max(share, worst)
            if float(difference.max()) >= largest:
                largest, where = float(difference.max()), step.key
            differences += float(difference.double().square().sum())
            changes += float((merged.float() - weight.float()).double().square().sum())
    lost = (differences / changes) ** 0.5 if changes else 0.0
    return Unmerged(changed, same, largest, where, share, lost, str(job.dtype).removeprefix("torch."))


def restore(edit: Edit, merged: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Take a change off.

    Args:
        edit: The change; replaces nothing.
        merged: The rounded, merged weight.
        weight: The base's: DoRA's norms, and changes that depend on it, need it.

    Returns:
        The weight as it was, in float32, and the largest difference that is rounding.
    """
    info = torch.finfo(merged.dtype)
    restored = merged.float()
    allowed = restored.abs() * (info.eps / 2) + info.tiny * info.eps  # half a step; near zero, half the smallest
    if edit.mixed:
        rest = Edit(changes=edit.changes).apply(weight).float()
        change = edit.apply(weight).float() - rest
        restored, allowed = restored - change, allowed + 2 * _EXACT * (restored.abs() + rest.abs())
    elif edit.shift is not None:
        restored, allowed = restored - edit.shift.float(), allowed + _EXACT * (restored.abs() + edit.shift.abs())
    before: list[tuple[Change, Tensor]] = []
    for change in edit.changes:
        before.append((change, weight))
        weight = change.apply(weight)
    for change, start in reversed(before):
        delta = change.delta()
        if change.magnitude is not None:
            assert isinstance(change, LowRank)
            factor = change.factor(start.float() + delta)
            restored = restored / factor
            allowed = allowed / factor.abs() + 2 * _EXACT * restored.abs()
        allowed = allowed + _EXACT * (restored.abs() + delta.abs())
        restored = restored - delta
    return restored, allowed


def _lost(step: Step, what: str) -> ValueError:
    return ValueError(
        f"{step.key}: the base does not come back when the change is taken off what was written: {what}; nothing was "
        "kept. Is the disk sound? If it happens again, please report this adapter"
    )
