"""Several adapters of one base, combined before they are merged.

Low-rank changes are combined as PEFT's `add_weighted_adapter` does, with its functions (`peft.utils.merge_utils`).

Sources: task arithmetic (Ilharco et al., 2022), TIES (Yadav et al., 2023, algorithm 1), DARE (Yu et al., 2023,
section 3).

*Deviations from PEFT 0.21*: what is dropped at random depends on the seed and on the weight's name, not on the order
of modules; rsLoRA adapters are not scaled by sqrt(r) once more after they are combined; modules that trained in full,
which PEFT refuses to combine, and biases and single tokens, which it drops, add their weighted changes; the SVD may be
left out (``--svd-rank full``).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsevlm.export.merge_deltas import Edit, Edits, LowRank

Method = Literal[
    "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
"""PEFT's names. `cat` adds the changes themselves, exactly; those with `svd` work on the changes and take the rank down
again; the others work on A and B apart."""

_PRUNING = ("ties", "dare", "magnitude_prune")
_ANYTHING = "use --method cat, which adds the changes themselves"


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined.

    Attributes:
        method: See `Method`.
        weights: One an adapter.
        density: Share of values that TIES, DARE and magnitude pruning keep.
        svd_rank: Rank of the result of the methods with SVD; 0: the largest of the adapters'; None: no SVD at all.
        seed: Of what DARE drops.
    """

    method: Method
    weights: tuple[float, ...]
    density: float | None = None
    svd_rank: int | None = 0
    seed: int = 0

    def describe(self) -> str:
        """Return the settings in words."""
        parts = [f"weights {', '.join(f'{weight:g}' for weight in self.weights)}"]
        if self.density is not None:
            parts.append(f"density {self.density:g}")
        if self.method.endswith("svd") and self.svd_rank != 0:
            parts.append(f"SVD rank {self.svd_rank or 'full'}")
        if "dare" in self.method:
            parts.append(f"seed {self.seed}")
        return f"{self.method} ({', '.join(parts)})"


def make_recipe(
    count: int,
    method: str = "cat",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    svd_rank: str | None = None,
    seed: int = 0,
) -> Recipe:
    """Check how adapters are to be combined.

    Args:
        count: Number of adapters.
        method: See `Method`.
        weights: One an adapter; default: equal ones that sum to 1.
        density: See `Recipe`; needed by the methods that prune, and by no others.
        svd_rank: A number or ``full``; default: the largest rank of the adapters.
        seed: Of what DARE drops.

    Raises:
        ValueError: A setting is missing, has no meaning for the method, or is out of its range.
    """
    if method not in get_args(Method):
        raise ValueError(f"--method {method!r} is not known; choose one of {', '.join(get_args(Method))}")
    if count == 1 and method != "cat":
        raise ValueError(f"--method {method} combines several adapters; pass two or more, then OUT")
    shares = tuple(weights) if weights is not None else (1 / count,) * count
    if len(shares) != count:
        raise ValueError(f"--weights has {len(shares)} numbers for {count} adapters; give one for each, in their order")
    if not all(math.isfinite(share) for share in shares) or not any(shares):
        raise ValueError(f"--weights {', '.join(map(str, shares))}: give finite numbers, not all of them zero")
    prunes = any(word in method for word in _PRUNING)
    if prunes and density is None:
        raise ValueError(
            f"--method {method} needs --density, the share of values that is kept, for example 0.5 (TIES' paper: 0.2)"
        )
    if density is not None and not prunes:
        raise ValueError(f"--density has no meaning for --method {method}; it is for {', '.join(_names(*_PRUNING))}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(
            f"--density {density} is out of range; give the share of values that is kept, above 0, up to 1"
        )
    rank: int | None = 0
    if svd_rank is not None:
        if not method.endswith("svd"):
            raise ValueError(f"--svd-rank has no meaning for --method {method}; it is for {', '.join(_names('svd'))}")
        rank = None if svd_rank == "full" else int(svd_rank) if svd_rank.isdecimal() else 0
        if rank == 0:
            raise ValueError(f"--svd-rank {svd_rank!r} is no rank; give a number from 1, or full")
    return Recipe(method, shares, density, rank, seed)  # pyright: ignore[reportArgumentType]


def parse_weights(text: str) -> list[float]:
    """Turn ``0.6,0.4`` into numbers.

    Raises:
        ValueError: One is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights {text!r} is no list of numbers; write one an adapter, like 0.6,0.4") from None


def combine(found: Sequence[tuple[str, Edits]], recipe: Recipe) -> Edits:
    """Combine what several adapters change in the weights of their base.

    An adapter without a change of a weight has no part in it, as in PEFT.

    Args:
        found: Adapters by name, with what they change.
        recipe: How.

    Raises:
        ValueError: They cannot be combined, or not by this method.
    """
    names = list(dict.fromkeys(name for _, edits in found for name in edits.by_name))
    return Edits.of({name: _combine_weight(name, found, recipe) for name in names})


def _combine_weight(name: str, found: Sequence[tuple[str, Edits]], recipe: Recipe) -> Edit:
    """Combine what becomes of one weight."""
    low_rank: list[tuple[str, float, LowRank]] = []
    mixed: list[tuple[float, Edit]] = []
    follows = [edits.by_name[name].follows for _, edits in found if name in edits.by_name]
    if any(follows):
        if all(follows):
            return Edit(follows=True)
        raise ValueError(
            f"{' and '.join(adapter for adapter, _ in found)}: one keeps {name} equal to the weight that it is tied "
            "to, another changes it; they cannot be combined"
        )
    for (adapter, edits), share in zip(found, recipe.weights, strict=True):
        edit = edits.by_name.get(name)
        if edit is None:
            continue
        for change in edit.changes:
            assert isinstance(change, LowRank)
            if change.magnitude is not None:
                raise ValueError(
                    f"{adapter} is a DoRA adapter: it rescales whole rows of {name}, which is no change that could be "
                    "weighed against others. Merge it alone, or train it without DoRA"
                )
            low_rank.append((adapter, share, change))
        if edit.value is not None or edit.rows is not None or edit.shift is not None:
            if edit.value is not None and not edit.value.is_floating_point():
                raise ValueError(f"{adapter} replaces {name} by whole numbers, of which no mean can be taken")
            mixed.append((share, Edit(value=edit.value, rows=edit.rows, shift=edit.shift)))
    if not low_rank:
        return Edit(mixed=mixed)
    _check_factors(name, low_rank, recipe.method)
    changes = [Combined(name, tuple(share for _, share, _ in low_rank), tuple(part for *_, part in low_rank), recipe)]
    return Edit(changes=[*changes], mixed=mixed)


def _check_factors(name: str, parts: list[tuple[str, float, LowRank]], method: Method) -> None:
    """Refuse low-rank changes that a method cannot combine."""
    if method == "cat":
        return
    if any(part.stacked for *_, part in parts):
        raise ValueError(
            f"{name} is a stack of experts, for which PEFT defines no --method {method} (a share of values would be "
            f"taken of all experts together); {_ANYTHING}"
        )
    ranks = {adapter: part.a.shape[0] for adapter, _, part in parts}
    if not method.endswith("svd") and len(set(ranks.values())) > 1:
        found = ", ".join(f"{adapter} has rank {rank}" for adapter, rank in ranks.items())
        other = "svd" if method == "linear" else f"{method}_svd"
        raise ValueError(
            f"{name}: {found}; --method {method} combines A with A and B with B, which takes one rank: use --method "
            f"{other}, or {_ANYTHING}"
        )


@dataclass(frozen=True)
class Combined:
    """Low-rank changes of one weight by several adapters; combined when they are asked for, so that one is in memory.

    Attributes:
        name: The weight's.
        weights: One a part.
        parts: The changes.
        recipe: How they are combined.
    """

    name: str
    weights: tuple[float, ...]
    parts: tuple[LowRank, ...]
    recipe: Recipe

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.parts[0].shape

    @property
    def magnitude(self) -> None:
        """DoRA is not combined."""
        return None

    @property
    def idle(self) -> bool:
        """Whether B of all parts is zero, as at the start."""
        return all(part.idle for part in self.parts)

    def delta(self) -> Tensor:
        """Return what is added, in the weight's shape and float32."""
        method = self.recipe.method
        if method == "cat":
            return self._sum().delta()
        if method.endswith("svd"):
            return self._reduced(self._mix())
        a, b = self._factors()
        return LowRank(a, b, 1.0, self.shape, transposed=self.parts[0].transposed).delta()

    def apply(self, weight: Tensor) -> Tensor:
        """Return the merged weight in float32."""
        return self.delta().add_(weight)

    def _sum(self) -> LowRank:
        """Return the weighted sum: all A below each other, all B beside each other."""
        first = self.parts[0]
        rank = 1 if first.stacked else 0  # the dimension of A that is the rank; B's is the next
        pairs = list(zip(self.weights, self.parts, strict=True))
        a = torch.cat([part.a.float() * share * part.scaling for share, part in pairs], dim=rank)
        b = torch.cat([part.b.float() for part in self.parts], dim=rank + 1)
        return LowRank(a, b, 1.0, self.shape, first.stacked, first.transposed)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Combine A with A and B with B; each takes the root of weight and scaling, and A the sign."""
        scaled = [share * part.scaling for share, part in zip(self.weights, self.parts, strict=True)]
        roots = [math.sqrt(abs(value)) for value in scaled]
        signed = [math.copysign(root, value) for root, value in zip(roots, scaled, strict=True)]
        with self._drawing():
            a = self._function()([part.a.float() for part in self.parts], torch.tensor(signed))
            b = self._function()([part.b.float() for part in self.parts], torch.tensor(roots))
        return a, b

    def _mix(self) -> Tensor:
        """Combine the changes themselves."""
        with self._drawing():
            return self._function()([part.delta() for part in self.parts], torch.tensor(self.weights))

    def _function(self) -> Callable[[list[Tensor], Tensor], Tensor]:
        """Return PEFT's function of tensors and their weights."""
        from peft.utils import merge_utils

        name = self.recipe.method.removesuffix("_svd")
        if name in ("linear", "svd"):
            return merge_utils.task_arithmetic
        function = getattr(merge_utils, name)
        density = self.recipe.density
        return lambda tensors, weights: function(tensors, weights, density)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Let PEFT draw what it drops; this weight's draws depend on the seed and its name alone."""
        digest = hashlib.sha256(f"{self.recipe.seed} {self.name}".encode()).digest()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density .* no pruning will be performed")
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            yield

    def _reduced(self, delta: Tensor) -> Tensor:
        """Take a change down to the rank that was asked for."""
        rank = self.recipe.svd_rank
        if rank is None:
            return delta
        rank = rank or max(part.a.shape[0] for part in self.parts)
        rows = (delta.mT if self.parts[0].transposed else delta).flatten(1)
        u, s, vh = torch.linalg.svd(rows, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ vh[:rank]
        if self.parts[0].transposed:
            low = low.mT
        return low.reshape(self.shape)


def _names(*words: str) -> list[str]:
    return [name for name in get_args(Method) if any(word in name for word in words)]
