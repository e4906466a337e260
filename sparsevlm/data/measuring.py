"""How long samples are: measured once each, over several processes where there are many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sparsevlm.data.mixture import Draw
from sparsevlm.data.opened import OpenSource
from sparsevlm.data.sample import BadSampleError, Sample
from sparsevlm.data.skips import CHECK_FROM, Key, Skip, SkipLog
from sparsevlm.recipe.schema import Batch

Measure = Callable[[Sample, int | None], tuple[int, int]]
"""``measure(sample, max_length) -> (tokens, visual tokens)``: reads no pixels and raises `BadSampleError`."""

UNKNOWN, SKIPPED = -1, -2
PARALLEL_FROM = 4096
"""Samples from which on worker processes pay for their start."""
CHUNK = 64
"""Samples that a worker measures at once."""


class Lengths:
    """``(tokens, visual tokens)`` of samples, measured when first asked for.

    Under `torch.distributed` each rank measures its part and all get all; every rank must then ask for the same samples
    in the same order.

    Args:
        sources: The opened sources.
        measure: Measures one sample.
        batch: Budgets, and how many workers may be started.
        packed: Whether samples must fit the budget of visual tokens.
        skips: Told about samples that cannot be used.
    """

    def __init__(
        self, sources: Mapping[str, OpenSource], measure: Measure, batch: Batch, packed: bool, skips: SkipLog
    ) -> None:
        self.sources, self.batch, self.skips = sources, batch, skips
        self.limits = Limits(measure, batch, packed)
        self._tokens = {name: np.full(len(source), UNKNOWN, np.int32) for name, source in sources.items()}
        self._visual = {name: np.zeros(len(source), np.int32) for name, source in sources.items()}

    def __getitem__(self, draw: Draw) -> tuple[int, int]:
        """Return the length of a sample that was found usable."""
        name, row = draw
        tokens = int(self._tokens[name][row])
        assert tokens >= 0, f"{draw} was not measured, or cannot be used"
        return tokens, int(self._visual[name][row])

    def usable(self, draws: Sequence[Draw]) -> list[Draw]:
        """Measure samples and return those that can be used, in their order.

        Raises:
            TooManySkippedError: Too many cannot.
        """
        new = list(dict.fromkeys(draw for draw in draws if self._tokens[draw[0]][draw[1]] == UNKNOWN))
        skipped = []
        for (name, row), length in zip(new, self._measure(new), strict=True):
            if isinstance(length, Skip):
                self._tokens[name][row] = SKIPPED
                skipped.append(length)
            else:
                self._tokens[name][row], self._visual[name][row] = length
        keys: Iterable[Key] = ((name, self.sources[name].where(row)) for name, row in new)
        self.skips.note(keys, skipped, when="plan")
        self._check_sources({name for name, _ in new}, skipped)
        return [draw for draw in draws if self._tokens[draw[0]][draw[1]] >= 0]

    def _check_sources(self, names: Iterable[str], skipped: Sequence[Skip]) -> None:
        """Refuse a source of which nothing can be used, however small its share of all records is."""
        for name in names:
            measured = self._tokens[name][self._tokens[name] != UNKNOWN]
            if len(measured) >= CHECK_FROM and (measured == SKIPPED).all() and self.batch.max_skipped_share < 1:
                reason = next(skip for skip in skipped if skip.source == name)
                raise ValueError(
                    f"none of the {len(measured)} records of data.{name} read so far can be used; "
                    f"the first: {reason.where}: {reason.reason}"
                )

    def _measure(self, draws: list[Draw]) -> list[tuple[int, int] | Skip]:
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return self._measure_here(draws)
        rank, world = distributed.get_rank(), distributed.get_world_size()
        parts: list[Any] = [None] * world
        distributed.all_gather_object(parts, self._measure_here(draws[rank::world]))
        merged: list[Any] = [None] * len(draws)
        for start, part in enumerate(parts):
            merged[start::world] = part
        return merged

    def _measure_here(self, draws: list[Draw]) -> list[tuple[int, int] | Skip]:
        chunks: Any = _Chunks(self.sources, self.limits, draws)
        if self.batch.workers and len(draws) >= PARALLEL_FROM:
            # a generator of its own: a loader draws a seed, which would move the one that dropout goes on from
            random = torch.Generator().manual_seed(0)
            workers = self.batch.workers
            chunks = DataLoader(chunks, None, num_workers=workers, collate_fn=_as_it_is, generator=random)
        return [length for chunk in chunks for length in chunk]


class Limits:
    """Measures one sample and checks that it fits a row.

    Args:
        measure: Measures one sample.
        batch: Budgets.
        packed: Whether the budget of visual tokens applies.
    """

    def __init__(self, measure: Measure, batch: Batch, packed: bool) -> None:
        self.measure = measure
        self.max_length = batch.max_length
        self.max_visual = batch.max_visual_tokens if packed else None

    def __call__(self, sample: Sample | Skip) -> tuple[int, int] | Skip:
        """Return the length of a sample, or why it cannot be used."""
        if isinstance(sample, Skip):
            return sample
        try:
            tokens, visual = self.measure(sample, self.max_length)
            if tokens > self.max_length:
                raise BadSampleError(f"{tokens} tokens, a row takes {self.max_length} (batch.max_length)")
            if self.max_visual is not None and visual > self.max_visual:
                raise BadSampleError(f"{visual} visual tokens, a row takes {self.max_visual} (batch.max_visual_tokens)")
        except BadSampleError as error:
            return Skip(sample.source, sample.id, sample.where, str(error))
        except Exception as error:
            error.add_note(f"while measuring {sample.where} of data.{sample.source}")
            raise
        return tokens, visual


def _as_it_is(chunk: list[Any]) -> list[Any]:
    return chunk


class _Chunks(Dataset[list[Any]]):
    """Samples to measure, some at once."""

    def __init__(self, sources: Mapping[str, OpenSource], limits: Limits, draws: list[Draw]) -> None:
        self.sources, self.limits, self.draws = sources, limits, draws

    def __len__(self) -> int:
        return -(-len(self.draws) // CHUNK)

    def __getitem__(self, index: int) -> list[Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = self.draws[index * CHUNK : (index + 1) * CHUNK]
        return [self.limits(self.sources[name].read(row)) for name, row in part]
