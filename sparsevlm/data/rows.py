"""Where rows come from: JSON, JSONL, parquet, folders of pictures, Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevlm.data.sample import BadSampleError, Message, Sample
from sparsevlm.recipe.schema import Source


@dataclass(frozen=True)
class RowContext:
    """Which row a format is looking at.

    Attributes:
        source: Name of the source in the recipe.
        index: Position of the row in its source.
        id: The row's own id where it has one, else its index.
        where: Place for people: ``file.json:row 12``.
        media_root: Folder that media paths are relative to; None when the source has none.
    """

    source: str
    index: int
    id: str = ""
    where: str = ""
    media_root: Path | None = None

    def make(self, messages: Iterable[Message], meta: dict[str, Any] | None = None) -> Sample:
        """Return a sample with this row's identity."""
        return Sample(tuple(messages), id=self.id, source=self.source, where=self.where, meta=meta or {})

    def resolve(self, path: str) -> Path:
        """Return a media path inside the media root.

        Raises:
            BadSampleError: The path is absolute, leaves the media root (also through a link), or is no file.
        """
        if self.media_root is None:
            raise BadSampleError(f"media path {path!r}, but the source has no media_root")
        if not path or "\0" in path or Path(path).is_absolute():
            raise BadSampleError(f"media path {path!r} is not relative to media_root")
        try:
            root = self.media_root.resolve()
            found = (root / path).resolve()
            inside = found.is_relative_to(root)
            exists = inside and found.is_file()
        except OSError as error:  # name too long, a loop of links
            raise BadSampleError(f"media path {path!r} cannot be resolved: {error.strerror}") from None
        if not inside:
            raise BadSampleError(f"media path {path!r} leaves the media root {self.media_root}")
        if not exists:
            raise BadSampleError(f"missing file {path!r} in {self.media_root}")
        return found


def open_rows(source: Source, base_dir: Path | None = None) -> Sequence[Any] | Iterable[Any]:
    """Return the rows of a source."""
    raise NotImplementedError
