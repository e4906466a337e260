"""Which row of which source comes when: a function of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from sparsevlm.recipe.schema import Mixture

Draw = tuple[str, int]
"""Source name and row."""


def shares(sizes: Mapping[str, int], weights: Mapping[str, float] | None, mixture: Mixture) -> dict[str, float]:
    """Return the share of draws that each source gets; they sum to 1.

    Args:
        sizes: Rows of each source, caps applied.
        weights: Weight of each source, for ``sampling: weight``; None means equal weights.
        mixture: The recipe's section.

    Raises:
        ValueError: No weight is above 0, or one is negative.
    """
    if mixture.sampling == "weight":
        raw = {name: float((weights or {}).get(name, 1.0)) for name in sizes}
        if min(raw.values()) < 0 or not any(raw.values()):
            raise ValueError(f"mixture weights {raw} must be 0 or more, and one of them above 0")
    elif mixture.sampling == "temperature":
        raw = {name: size ** (1 / mixture.temperature) for name, size in sizes.items()}
    elif mixture.sampling == "sqrt_size":
        raw = {name: size**0.5 for name, size in sizes.items()}
    else:
        raw = {name: float(size) for name, size in sizes.items()}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def capped(sizes: Mapping[str, int], mixture: Mixture) -> dict[str, int]:
    """Return the rows of each source that one pass uses."""
    return {name: min(size, mixture.caps.get(name, size)) for name, size in sizes.items()}


def epoch_order(sizes: Mapping[str, int], mixture: Mixture, seed: int, epoch: int) -> list[Draw]:
    """Return one pass over all sources in random order: every row once, or `caps` rows of a source.

    A capped source gives other rows in every epoch until all have been seen.
    """
    used = capped(sizes, mixture)
    draws = []
    for number, (name, size) in enumerate(sizes.items()):
        draws += [(name, row) for row in _slice(size, used[name], epoch, [seed, 1, number])]
    order = np.random.default_rng([seed, 2, epoch]).permutation(len(draws))
    return [draws[i] for i in order]


def _slice(size: int, count: int, epoch: int, seed: list[int]) -> list[int]:
    """Return rows ``epoch * count`` to ``(epoch + 1) * count`` of an endless sequence of shuffled passes."""
    first, rows = epoch * count, []
    while len(rows) < count:
        turn, at = divmod(first + len(rows), size)
        rows += np.random.default_rng([*seed, turn]).permutation(size)[at : at + count - len(rows)].tolist()
    return rows


def draws(sizes: Mapping[str, int], weights: Mapping[str, float] | None, mixture: Mixture, seed: int) -> Iterator[Draw]:
    """Yield draws without end.

    ``concat`` yields one epoch after another. Otherwise sources take turns by their shares as evenly as can be: after n
    draws each source has had its share of n to within one draw. Each goes through its rows in shuffled order and is
    shuffled anew when all have been drawn.
    """
    if mixture.sampling == "concat":
        epoch = 0
        while True:
            yield from epoch_order(sizes, mixture, seed, epoch)
            epoch += 1
    used = capped(sizes, mixture)
    share = shares(used, weights, mixture)
    rows = {name: _endless(sizes[name], used[name], [seed, 1, number]) for number, name in enumerate(sizes)}
    for name in turns(share, seed):
        yield name, next(rows[name])


def turns(share: Mapping[str, float], seed: int) -> Iterator[str]:
    """Yield the source of each draw without end.

    Each source is due at its own random offset plus multiples of 1 / share; the one due first goes next.

    Args:
        share: Share of each source; one of 0 gets no turn.
        seed: Seed of the offsets.
    """
    names = [name for name in share if share[name] > 0]
    number = {name: i for i, name in enumerate(share)}
    rng = np.random.default_rng([seed, 3])
    due = {name: float(rng.random()) / share[name] for name in names}
    while True:
        name = min(names, key=lambda n: (due[n], number[n]))
        due[name] += 1 / share[name]
        yield name


def _endless(size: int, count: int, seed: list[int]) -> Iterator[int]:
    """Yield shuffled rows without end; at most `count` different ones of a capped source."""
    turn = 0
    kept = np.random.default_rng([*seed, 0]).permutation(size)[:count]
    while True:
        yield from np.random.default_rng([*seed, 1, turn]).permutation(kept).tolist()
        turn += 1
