"""A source of the recipe, opened: one sample, or the reason why there is none, at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsevlm.data.rows import RowContext, Rows, RowStream
from sparsevlm.data.sample import BadSampleError, Sample
from sparsevlm.data.skips import Skip
from sparsevlm.recipe.schema import Source
from sparsevlm.registry import DATA_FORMATS


class OpenSource:
    """Rows of a source, read through its format.

    Args:
        name: Name of the source in the recipe.
        source: The source.
        base_dir: Directory that relative paths start from; None means the working directory.

    Raises:
        ValueError: The format is unknown or has no such option, or there are no rows.
    """

    def __init__(self, name: str, source: Source, base_dir: Path | None = None) -> None:
        self.name, self.source, self.base_dir = name, source, base_dir
        try:
            self.format = DATA_FORMATS.get(source.format)(**source.options)
            self.rows = self.format.rows(source, base_dir)
        except ValueError as error:
            raise ValueError(f"data.{name}: {error}") from error
        self.streams = isinstance(self.rows, RowStream) or not isinstance(self.rows, Sequence)
        self._root = None if source.media_root is None else (base_dir or Path()) / Path(source.media_root).expanduser()
        if self._root is not None and not self._root.is_dir():
            raise ValueError(f"data.{name}: media_root {source.media_root!r} is no folder ({self._root.absolute()})")
        if not self.streams and not len(self):
            raise ValueError(f"data.{name}: no rows in {source.path}")

    def __len__(self) -> int:
        """Number of rows of a source that is no stream, `limit` applied."""
        assert isinstance(self.rows, Sequence), f"data.{self.name} is a stream"
        return min(len(self.rows), self.source.limit or len(self.rows))

    def where(self, index: int) -> str:
        """Return the place of a row, for people."""
        return self.rows.where(index) if isinstance(self.rows, Rows) else f"{self.name}:row {index}"

    def read(self, index: int) -> Sample | Skip:
        """Return the sample of a row, or why there is none."""
        assert isinstance(self.rows, Sequence), f"data.{self.name} is a stream"
        where = self.where(index)
        folder = self.rows.folder(index) if isinstance(self.rows, Rows) else None
        try:
            row = self.rows[index]
        except BadSampleError as error:
            row = error
        return self._sample(row, index, str(index), where, folder)

    def stream(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Sample | Skip]:
        """Yield the samples of this rank's part of a stream; see `RowStream.read`."""
        limit = self.source.limit
        if isinstance(self.rows, RowStream):
            read = self.rows.read(epoch, seed, rank, world, limit)
        else:
            read = _plain_stream(self.rows, self.name, rank, world, limit)
        for number, (where, folder, row) in enumerate(read):
            yield self._sample(row, number, where.rpartition(":")[2], where, folder)

    def _sample(self, row: Any, index: int, fallback: str, where: str, folder: Path | None) -> Sample | Skip:
        named = row.get("id") if isinstance(row, dict) else None
        identity = str(named) if isinstance(named, (str, int)) else fallback
        caches = self.rows.caches if isinstance(self.rows, (Rows, RowStream)) else ()
        context = RowContext(self.name, index, identity, where, self._root or folder, caches)
        try:
            if isinstance(row, BadSampleError):
                raise row
            return self.format.sample(row, context)
        except BadSampleError as error:
            return Skip(self.name, identity, where, str(error))
        except Exception as error:
            error.add_note(f"in format {self.source.format!r}, at {where} of data.{self.name}")
            raise


def _plain_stream(
    rows: Iterable[Any], name: str, rank: int, world: int, limit: int | None
) -> Iterator[tuple[str, Path | None, Any]]:
    """Yield every ``world``-th row of something that can only be iterated over."""
    from itertools import islice

    for index, row in islice(enumerate(rows), rank, limit, world):
        yield f"{name}:row {index}", None, row
