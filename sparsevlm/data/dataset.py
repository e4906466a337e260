"""The rows that a stage trains on, planned ahead: which samples share a row is known before any picture is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from sparsevlm.data.measuring import Lengths, Measure
from sparsevlm.data.mixture import Draw, capped, draws, epoch_order
from sparsevlm.data.opened import OpenSource
from sparsevlm.data.packing import group_by_length, pack
from sparsevlm.data.sample import BadSampleError, Encoded, Sample
from sparsevlm.data.skips import Key, Row, Skip, SkipLog
from sparsevlm.recipe.schema import Batch, Source, Stage

Encode = Callable[[Sample, int | None], Encoded]
"""``encode(sample, max_length)``: reads the media and raises `BadSampleError`."""

WINDOW = 2048
"""Samples among which rows are composed: enough to fill rows, few enough that what shares a row stays chance."""


class StageData(Dataset[Row]):
    """All rows of a stage, in the order in which they are trained on.

    A row is one sample, or a pack of samples. Item i is a function of the recipe, the data and i alone, whatever the
    number of processes and workers, so training goes on after an interruption by leaving out the first items. Samples
    that turn out to be unreadable when their row is read are missing from it and reported in `Row.skipped`; no other
    takes their place. The last optimizer step of an epoch is filled up with empty rows.

    Args:
        sources: Sources of the recipe, by name.
        stage: The stage.
        measure: ``measure(sample, max_length) -> (tokens, visual tokens)`` without reading pixels.
        encode: ``encode(sample, max_length) -> Encoded``.
        packed: Whether rows are packs.
        seed: Seed of the order.
        skipped_path: ``skipped.jsonl``; None writes nothing.
        base_dir: Directory that relative paths start from; None means the working directory.

    Raises:
        ValueError: A source cannot be read, is a stream (see `StageStream`), or holds nothing that can be used; or too
            many records cannot.
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
        skipped_path: Path | None = None,
        base_dir: Path | None = None,
    ) -> None:
        self.stage, self.encode, self.packed, self.seed = stage, encode, packed, seed
        self.skips = SkipLog(skipped_path, stage.batch.max_skipped_share)
        self.sources = {name: OpenSource(name, sources[name], base_dir) for name in stage.data}
        self._names = list(self.sources)
        for name, source in self.sources.items():
            if source.streams:
                raise ValueError(
                    f"data.{name}: rows of format {source.source.format!r} cannot be counted; set 'streaming: true'"
                )
        self._lengths = Lengths(self.sources, measure, stage.batch, packed, self.skips)
        rows = list(self._plan())
        flat = [draw for row in rows for draw in row]
        number = {name: i for i, name in enumerate(self._names)}
        # Arrays and not lists: workers share their memory with the main process as long as nobody writes to it.
        self._source = np.array([number[name] for name, _ in flat], dtype=np.int32)
        self._row = np.array([row for _, row in flat], dtype=np.int64)
        self._ends = np.cumsum([len(row) for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        """Rows of the stage: steps times rows a step."""
        return self.num_steps * self.stage.batch.rows

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return -(-len(self._ends) // self.stage.batch.rows)

    @property
    def num_samples(self) -> int:
        """Samples in all rows together, a sample counted as often as it is trained on."""
        return len(self._row)

    @property
    def fingerprint(self) -> str:
        """Digest of the plan; the same whenever the same samples come in the same rows."""
        digest = hashlib.blake2b(repr((self._names, self.packed, self.stage.batch.rows)).encode(), digest_size=16)
        for array in (self._source, self._row, self._ends):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def draws(self, index: int) -> list[Draw]:
        """Return the samples planned for a row; none for one that fills up the last step."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if index >= len(self._ends):
            return []
        span = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        return [(self._names[s], r) for s, r in zip(self._source[span].tolist(), self._row[span].tolist(), strict=True)]

    def length(self, draw: Draw) -> tuple[int, int]:
        """Return the ``(tokens, visual tokens)`` that a planned sample was measured to have."""
        return self._lengths[draw]

    def __getitem__(self, index: int) -> Row:
        """Read the samples of a row."""
        samples = [self.sources[name].read(row) for name, row in self.draws(index)]
        return read_row(samples, self.encode, self.stage.batch.max_length)

    # ---- the plan -------------------------------------------------------------------------------------------------

    def _plan(self) -> Iterator[list[Draw]]:
        """Yield the rows of the stage."""
        rows = self._windows(self._order())
        if self.stage.steps is not None:
            rows = islice(rows, self.stage.steps * self.stage.batch.rows)
        yield from rows

    def _order(self) -> Iterator[Draw]:
        """Yield the samples in the order in which they are drawn: without end for a number of steps."""
        sizes = {name: len(source) for name, source in self.sources.items()}
        weights = self.stage.data if isinstance(self.stage.data, dict) else None
        mixture, epochs = self.stage.mixture, self.stage.epochs
        if epochs is None:
            return draws(sizes, weights, mixture, self.seed)
        total = max(1, round(epochs * sum(capped(sizes, mixture).values())))
        if mixture.sampling != "concat":
            return islice(draws(sizes, weights, mixture, self.seed), total)
        passes = (epoch_order(sizes, mixture, self.seed, epoch) for epoch in range(-int(-epochs // 1)))
        return islice((draw for one in passes for draw in one), total)

    def _windows(self, order: Iterator[Draw]) -> Iterator[list[Draw]]:
        """Yield rows, composed of one window of usable samples after the other."""
        number, ahead, waiting = 0, 1, []  # waiting: measured samples that no window has taken yet
        drawn, limit = 0, sum(len(source) for source in self.sources.values())
        while True:
            chunk = list(islice(order, ahead * WINDOW))
            drawn, ahead = drawn + len(chunk), min(2 * ahead, 32)  # measured together: workers start once for many
            waiting += self._lengths.usable(chunk)
            last = not chunk
            if not waiting and (last or drawn >= limit) and number == 0:
                raise ValueError(
                    f"none of the {min(drawn, limit)} records of {', '.join(self.sources)} can be used: "
                    f"{self.skips.summary()}"
                )
            step = self.stage.batch.rows
            full = WINDOW if self.packed else max(step, WINDOW - WINDOW % step)  # whole steps, so that groups fit them
            while len(waiting) >= full or (last and waiting):
                window, waiting = waiting[:full], waiting[full:]
                random = np.random.default_rng([self.seed, 4, number])
                lengths = [self._lengths[draw] for draw in window]
                for row in compose(lengths, self.stage.batch, self.packed, random):
                    yield [window[i] for i in row]
                number += 1
            if last:
                return


def compose(
    lengths: Sequence[tuple[int, int]], batch: Batch, packed: bool, random: np.random.Generator
) -> list[list[int]]:
    """Return the rows of a window: packs in random order, or single samples, those of a step of like length.

    Args:
        lengths: ``(tokens, visual tokens)`` of the samples.
        batch: Budgets, and rows of a step.
        packed: Whether rows are packs.
        random: Source of the order.
    """
    if packed:
        rows = pack(lengths, batch.max_length, batch.max_visual_tokens)
        return [rows[i] for i in random.permutation(len(rows))]
    if batch.group_by_length:
        return [[i] for i in group_by_length([tokens for tokens, _ in lengths], batch.rows, random)]
    return [[i] for i in range(len(lengths))]


def read_row(samples: Sequence[Sample | Skip], encode: Encode, max_length: int) -> Row:
    """Encode the samples of a row; those that cannot be used are reported instead.

    Args:
        samples: The samples, or what is wrong with them.
        encode: Reads the media.
        max_length: Tokens that the row has room for.
    """
    found: list[Encoded] = []
    read: list[Key] = []
    skipped: list[Skip] = []
    for sample in samples:
        read.append(sample.key if isinstance(sample, Skip) else (sample.source, sample.where))
        encoded = sample if isinstance(sample, Skip) else _encode(sample, encode, max_length)
        if isinstance(encoded, Encoded) and encoded.length + sum(other.length for other in found) > max_length:
            # planned by what its header says; cutting it or another one short would train on something else in silence
            assert isinstance(sample, Sample)
            reason = f"{encoded.length} tokens are more than its header promised, and than its row has room for"
            encoded = Skip(sample.source, sample.id, sample.where, reason)
        if isinstance(encoded, Skip):
            skipped.append(encoded)
        else:
            found.append(encoded)
    return Row(found, read, skipped)


def _encode(sample: Sample, encode: Encode, max_length: int) -> Encoded | Skip:
    try:
        encoded = encode(sample, max_length)
        if encoded.num_targets == 0:
            raise BadSampleError("no target token")
    except BadSampleError as error:
        return Skip(sample.source, sample.id, sample.where, str(error))
    except Exception as error:
        error.add_note(f"while encoding {sample.where} of data.{sample.source}")
        raise
    return encoded
