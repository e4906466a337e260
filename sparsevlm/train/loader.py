"""Which rows a rank reads, and the ids that travel with a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from sparsevlm.data.sample import Encoded
from sparsevlm.data.skips import Row
from sparsevlm.recipe.schema import Batch, Recipe


def fit_rows(recipe: Recipe, world_size: int) -> Recipe:
    """Return the recipe with as many rows at once on each rank as its steps leave for one.

    A step of 8 rows with 4 at once on one process has 2 at once on each of four. The step stays the same.
    """
    stages = {}
    for name, stage in recipe.stages.items():
        batch = stage.batch
        share = batch.rows // world_size  # where this is not whole, `accumulation_steps` says so
        held = max((n for n in range(1, batch.rows_per_rank + 1) if share % n == 0), default=1) if share else 1
        stages[name] = stage.model_copy(update={"batch": batch.model_copy(update={"rows_per_rank": held})})
    return recipe.model_copy(update={"stages": stages})


def accumulation_steps(batch: Batch, world_size: int) -> int:
    """Return the micro-batches of an optimizer step on each rank.

    Raises:
        ValueError: The step's rows do not divide evenly.
    """
    at_once = batch.rows_per_rank * world_size
    if batch.rows % at_once:
        raise ValueError(
            f"batch.rows {batch.rows} cannot be divided over {world_size} processes with {batch.rows_per_rank} at once "
            f"on each; set it to a multiple of {at_once}, or change the number of processes"
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
    skipped, to be counted in the main process. Where features are kept, ``feature_keys`` say of each medium that goes
    through the tower its name and tokens, and ``features_read`` how many do not.

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
        documents = [encoded for row in rows for encoded in row if encoded.keys]
        if documents:
            batch["feature_keys"] = [pair for encoded in documents for pair in _wanted(encoded)]
            batch["features_read"] = sum(map(len, (encoded.keys for encoded in documents))) - len(batch["feature_keys"])
        return batch


def _wanted(encoded: Encoded) -> Iterator[tuple[str, int]]:
    """Yield name and tower tokens of the media of a sample whose features are not known."""
    for medium, key in enumerate(encoded.keys):
        if not encoded.kept or encoded.kept[medium] is None:
            yield key, sum(item.grid.num_tokens for item in encoded.items if item.medium == medium)
