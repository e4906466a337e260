"""What an adapter changes in each weight of its base, in float32.

Sources: LoRA (Hu et al., 2021, section 4.1), rsLoRA (Kalajdzievski, 2023), DoRA (Liu et al., 2024, section 4.1, eq. 5);
layouts of PEFT 0.21: ``peft/tuners/lora/layer.py`` and ``dora.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """What an adapter, or several, add to a weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        ...

    @property
    def magnitude(self) -> Tensor | None:
        """DoRA's length of each output's row: the change is no sum then."""
        ...

    @property
    def idle(self) -> bool:
        """Whether it changes nothing: B is zero, as at the start."""
        ...

    def delta(self) -> Tensor:
        """Return what is added, in the weight's shape and float32, without DoRA's rescaling."""
        ...

    def apply(self, weight: Tensor) -> Tensor:
        """Return the merged weight in float32."""
        ...


@dataclass(frozen=True)
class LowRank:
    """A change of rank r.

    Attributes:
        a: ``(r, in, …)``, a convolution's with its kernel; of a stack ``(E, r, in)``.
        b: ``(out, r, …)``; of a stack ``(E, out, r)``.
        scaling: alpha / r, or alpha / sqrt(r).
        shape: Of the weight.
        stacked: The weight is a stack of experts, ``(E, out, in)``.
        transposed: The weight is stored ``(in, out)``, or ``(E, in, out)``.
        magnitude: DoRA's length of each output's row, ``(out)``.
    """

    a: Tensor
    b: Tensor
    scaling: float
    shape: tuple[int, ...]
    stacked: bool = False
    transposed: bool = False
    magnitude: Tensor | None = None

    @property
    def idle(self) -> bool:
        """Whether B is zero, as at the start."""
        return not self.b.any()

    def delta(self) -> Tensor:
        """Return ``scaling * B A`` in the weight's shape and float32, without DoRA's rescaling."""
        b, a = self.b.float(), self.a.float()
        exact = (
            self.scaling > 0 and math.frexp(self.scaling)[0] == 0.5
        )  # a power of two: the same bits, before or after
        if exact:
            b = b * self.scaling
        product = torch.bmm(b, a) if self.stacked else b.flatten(1) @ a.flatten(1)
        if not exact:
            product.mul_(self.scaling)
        return (product.mT if self.transposed else product).reshape(self.shape)

    def apply(self, weight: Tensor) -> Tensor:
        """Return the merged weight in float32."""
        merged = self.delta().add_(weight)
        if self.magnitude is None:
            return merged
        return merged * self.factor(merged)

    def factor(self, adapted: Tensor) -> Tensor:
        """Return what DoRA multiplies the adapted weight by, in a shape that broadcasts over it."""
        assert self.magnitude is not None
        rows = adapted.mT if self.transposed else adapted  # a row an output
        norms = torch.linalg.norm(rows.flatten(1), dim=1)
        factor = self.magnitude.float().flatten() / norms
        return factor if self.transposed else factor.reshape(-1, *(1 for _ in self.shape[1:]))


@dataclass
class Edit:
    """What becomes of one weight, in this order.

    Attributes:
        value: It is replaced: a module that trained in full.
        changes: Low-rank changes.
        mixed: What several adapters make of it other than by low rank, each with its weight: their weighted changes
            are added.
        rows: Some rows are replaced: ``(indices, rows)``, of single tokens that trained.
        shift: It is added: the bias of LoRA's B.
        follows: PEFT keeps it equal to the weight that it is tied to.
    """

    value: Tensor | None = None
    changes: list[Change] = field(default_factory=list)
    mixed: list[tuple[float, Edit]] = field(default_factory=list)
    rows: tuple[Tensor, Tensor] | None = None
    shift: Tensor | None = None
    follows: bool = False

    def apply(self, weight: Tensor) -> Tensor:
        """Return the merged weight, in float32 unless it is only replaced."""
        merged = weight if self.value is None else self.value
        for change in self.changes:
            merged = change.apply(merged)
        if self.mixed:
            start, merged = weight.float(), merged.float()
            for share, edit in self.mixed:
                merged = merged + share * (edit.apply(weight).float() - start)
        if self.shift is not None:
            merged = torch.add(self.shift.float(), merged)
        if self.rows is not None:
            merged = merged.float().index_copy(0, self.rows[0], self.rows[1].float())
        return merged

    @property
    def is_sum(self) -> bool:
        """Whether the merged weight is the old one plus something that does not depend on it."""
        plain = self.rows is None and self.value is None and not self.mixed
        return plain and all(change.magnitude is None for change in self.changes)

    def total(self) -> Tensor:
        """Return that something."""
        parts = [change.delta() for change in self.changes] + ([] if self.shift is None else [self.shift.float()])
        return sum(parts[1:], start=parts[0])


@dataclass(frozen=True)
class Edits:
    """All that an adapter changes.

    Attributes:
        by_name: Name of the weight in the base -> what becomes of it.
        low_rank: Weights with a low-rank change.
        replaced: Other weights that are replaced, in whole or in rows.
        idle: Of `low_rank`, those whose B is all zero: never trained.
        dora: Some change is DoRA's.
    """

    by_name: dict[str, Edit]
    low_rank: int
    replaced: int
    idle: int
    dora: bool

    @classmethod
    def of(cls, by_name: dict[str, Edit]) -> Edits:
        """Count what there is."""
        low_rank = [edit for edit in by_name.values() if edit.changes]
        others: Sequence[Edit] = [edit for edit in by_name.values() if not edit.changes]
        return cls(
            by_name,
            low_rank=len(low_rank),
            replaced=sum(edit.value is not None or edit.rows is not None or bool(edit.mixed) for edit in others),
            idle=sum(all(change.idle for change in edit.changes) for edit in low_rank),
            dora=any(change.magnitude is not None for edit in low_rank for change in edit.changes),
        )
