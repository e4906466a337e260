"""The rows of a stage whose data can only be read one record after the other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from sparsevlm.data.dataset import Encode, StageData, compose, read_row
from sparsevlm.data.measuring import Limits, Measure
from sparsevlm.data.mixture import shares, turns
from sparsevlm.data.opened import OpenSource
from sparsevlm.data.sample import Sample
from sparsevlm.data.skips import Row, Skip, SkipLog
from sparsevlm.recipe.schema import Source, Stage

WINDOW = 512
"""Samples among which rows are composed; fewer than in `dataset`, since streamed records carry their pictures."""

_GIVE_UP = 4
"""Windows without a usable sample after which a stream is taken for broken."""


class StageStream(Dataset[Row]):
    """All rows of a stage with a streamed source; used like `StageData`.

    Rows are composed window by window while the records come in. Every rank reads its own part of each source, and
    every worker of a rank reads that part from its start, measures it, and decodes only the rows that are asked for: so
    item i is a function of the recipe, the data, the number of ranks and i, whatever the number of workers, and leaving
    out the first items goes on where a run stopped (their records are read and measured again, not decoded). Items are
    meant to be asked for in rising order; asking for an earlier one reads from the start again.

    Streams have no known size: `concat` draws from all sources in turn until each is through, `weight` by the weights;
    the other two mixtures, and a number of epochs, need one.

    Args:
        sources: Sources of the recipe, by name.
        stage: The stage.
        measure: ``measure(sample, max_length) -> (tokens, visual tokens)`` without reading pixels.
        encode: ``encode(sample, max_length) -> Encoded``.
        packed: Whether rows are packs.
        seed: Seed of the order.
        rank: This rank; it is asked for the rows that `StepSampler` gives it.
        world: Number of ranks.
        skipped_path: ``skipped.jsonl``; None writes nothing.
        base_dir: Directory that relative paths start from; None means the working directory.

    Raises:
        ValueError: A source cannot be read, or something needs its size.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        stage: Stage,
        measure: Measure,
        encode: Encode,
        *,
        packed: bool,
        seed: int,
        rank: int = 0,
        world: int = 1,
        skipped_path: Path | None = None,
        base_dir: Path | None = None,
    ) -> None:
        if stage.steps is None:
            raise ValueError("a streamed source has no known size: give 'steps' instead of 'epochs'")
        if stage.mixture.sampling not in ("concat", "weight"):
            raise ValueError(
                f"a streamed source has no known size: 'sampling: {stage.mixture.sampling}' needs one, "
                "use 'concat' or 'weight'"
            )
        self.stage, self.encode, self.packed, self.seed = stage, encode, packed, seed
        self.rank, self.world, self.num_steps = rank, world, stage.steps
        self.sources = {
            name: OpenSource(name, _limited(sources[name], stage.mixture.caps.get(name)), base_dir)
            for name in stage.data
        }
        self.skips = SkipLog(skipped_path, stage.batch.max_skipped_share)
        self._limits = Limits(measure, stage.batch, packed)
        self._rows: Iterator[tuple[list[Sample], list[Skip]]] | None = None
        self._next = 0  # number of the row of this rank that `_rows` gives next
        self._pid = 0

    def __len__(self) -> int:
        """Rows of the stage over all ranks: steps times rows a step."""
        return self.num_steps * self.stage.batch.rows

    @property
    def fingerprint(self) -> str:
        """Digest of what the rows hang on, the contents of the streams left out."""
        parts = [(name, source.source.model_dump()) for name, source in self.sources.items()]
        key = (parts, self.packed, self.seed, self.world, self.stage.batch.model_dump(exclude={"workers"}))
        return hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()

    def __getitem__(self, index: int) -> Row:
        """Read the samples of a row of this rank."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        at_once = self.stage.batch.rows_per_rank
        chunk, within = divmod(index, at_once)
        assert chunk % self.world == self.rank, f"row {index} is not one of rank {self.rank}"
        number = chunk // self.world * at_once + within
        if self._rows is None or self._pid != os.getpid() or number < self._next:
            self._rows, self._next, self._pid = self._compose(), 0, os.getpid()
        samples, skipped = next(islice(self._rows, number - self._next, None))
        self._next = number + 1
        row = read_row(samples, self.encode, self.stage.batch.max_length)
        row.skipped += skipped
        row.read += [skip.key for skip in skipped]
        return row

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_rows": None, "_next": 0}

    def _compose(self) -> Iterator[tuple[list[Sample], list[Skip]]]:
        """Yield the samples of each row, and with the first of a window what was skipped in composing it."""
        drawn, number, in_vain = self._draw(), 0, 0
        skipped: list[Skip] = []
        waiting: list[tuple[Sample, tuple[int, int]]] = []
        step = self.stage.batch.rows
        full = WINDOW if self.packed else max(step, WINDOW - WINDOW % step)
        while True:
            before = len(waiting)
            for sample in islice(drawn, full - len(waiting)):
                length = self._limits(sample)
                if isinstance(length, Skip):
                    skipped.append(length)
                elif isinstance(sample, Sample):
                    waiting.append((sample, length))
            in_vain = in_vain + 1 if len(waiting) == before else 0
            if in_vain >= _GIVE_UP:
                raise ValueError(
                    f"none of the last {in_vain * full} records of {', '.join(self.sources)} can be used; "
                    f"the last: {skipped[-1].where}: {skipped[-1].reason}"
                )
            if len(waiting) < full:
                continue
            random = np.random.default_rng([self.seed, 5, self.rank, number])
            shuffled = [
                waiting[i] for i in random.permutation(len(waiting))
            ]  # streams come in the order of their files
            for row in compose([length for _, length in shuffled], self.stage.batch, self.packed, random):
                yield [shuffled[i][0] for i in row], skipped
                skipped = []
            waiting, number = [], number + 1

    def _draw(self) -> Iterator[Sample | Skip]:
        """Yield the records of this rank without end."""
        mixture, data = self.stage.mixture, self.stage.data
        if mixture.sampling == "weight":
            assert isinstance(data, dict)
            endless = {name: self._again(source) for name, source in self.sources.items()}
            for name in turns(shares(dict.fromkeys(data, 1), data, mixture), self.seed):
                yield next(endless[name])
        epoch = 0
        while True:
            opened = {name: self._read(source, epoch) for name, source in self.sources.items()}
            for name in cycle(list(opened)):
                if name not in opened:
                    continue
                record = next(opened[name], None)
                if record is not None:
                    yield record
                    continue
                del opened[name]
                if not opened:
                    break
            epoch += 1

    def _again(self, source: OpenSource) -> Iterator[Sample | Skip]:
        epoch = 0
        while True:
            yield from self._read(source, epoch)
            epoch += 1

    def _read(self, source: OpenSource, epoch: int) -> Iterator[Sample | Skip]:
        """Yield this rank's records of one pass over a source.

        Raises:
            ValueError: There is none.
        """
        empty = True
        if source.streams:
            records = source.stream(epoch, self.seed, self.rank, self.world)
        else:
            order = np.random.default_rng([self.seed, 6, epoch]).permutation(len(source))
            records = (source.read(int(row)) for row in order[self.rank :: self.world])
        for record in records:
            empty = False
            yield record
        if empty:
            raise ValueError(f"data.{source.name} has no record for rank {self.rank} of {self.world}")


def _limited(source: Source, cap: int | None) -> Source:
    limits = [limit for limit in (source.limit, cap) if limit is not None]
    return source.model_copy(update={"limit": min(limits, default=None)})


def plan_rows(
    sources: Mapping[str, Source],
    stage: Stage,
    measure: Measure,
    encode: Encode,
    *,
    packed: bool,
    seed: int,
    rank: int = 0,
    world: int = 1,
    skipped_path: Path | None = None,
    base_dir: Path | None = None,
) -> StageData | StageStream:
    """Return the rows of a stage: planned ahead, or read as a stream where one of its sources is one.

    Arguments and errors are those of `StageData` and `StageStream`.
    """
    common: dict[str, Any] = {"packed": packed, "seed": seed, "skipped_path": skipped_path, "base_dir": base_dir}
    if any(sources[name].streaming for name in stage.data):
        return StageStream(sources, stage, measure, encode, rank=rank, world=world, **common)
    return StageData(sources, stage, measure, encode, **common)
