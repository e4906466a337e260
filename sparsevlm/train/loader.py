"""Which rows a rank reads, and the ids that travel with a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from sparsevlm.data.sample import Encoded
from sparsevlm.data.skips import Row
from sparsevlm.recipe.schema import Batch


def accumulation_steps(batch: Batch, world_size: int) -> int:
    """Return the micro-batches of an optimizer step on each rank.

    Raises:
        ValueError: The step's rows do not divide evenly.
    """
    at_once = batch.rows_per_rank * world_size
    if batch.rows % at_once:
        raise ValueError(
            f"batch.rows {batch.rows} is not a multiple of rows_per_rank x ranks = {batch.rows_per_rank} x {world_size}"
            f" = {at_once}; set batch.rows to a multiple of it, or change rows_per_rank or the number of processes"
        )
    return batch.rows // at_once


class StepSampler(Sampler[list[int]]):
    """Deals the rows, in order, to ranks: micro-batch ``j`` of rank ``r`` is the ``(j * world + r)``-th chunk.

    An optimizer step therefore sees the same chunks on any number of ranks.

    Args:
        num_rows: Rows of the stage; a multiple of ``rows_per_rank * world_size``.
        rows_per_rank: Rows of a micro-batch.
        rank: This rank.
        world_size: Ranks.
    """

    def __init__(self, num_rows: int, rows_per_rank: int, rank: int, world_size: int) -> None:
        at_once = rows_per_rank * world_size
        assert num_rows % at_once == 0, (num_rows, rows_per_rank, world_size)
        self.starts = range(rank * rows_per_rank, num_rows, at_once)
        self.rows_per_rank = rows_per_rank

    def __len__(self) -> int:
        """Micro-batches of this rank."""
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row indices of each micro-batch."""
        for start in self.starts:
            yield list(range(start, start + self.rows_per_rank))


class BatchWithIds:
    """Collates rows and keeps what the model does not take.

    ``sample_ids`` are the samples' ids, for messages about bad batches; ``rows`` say which records were read and
    skipped, to be counted in the main process.

    Args:
        collator: Rows to model inputs.
    """

    def __init__(self, collator: Callable[[Sequence[Sequence[Encoded]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Sequence[Encoded]]) -> dict[str, Any]:
        """Return the batch."""
        batch = self.collator(rows)
        batch["sample_ids"] = [encoded.sample_id for row in rows for encoded in row]
        batch["rows"] = [Row((), row.read, row.skipped) for row in rows if isinstance(row, Row)]
        return batch
