"""What rows are, and what a format is told about the one it looks at."""

from __future__ import annotations

import base64
import binascii
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from sparsevlm.data.sample import BadSampleError, Media, Message, Sample
from sparsevlm.vision.tokens import MediaKind


@dataclass(frozen=True)
class RowContext:
    """Which row a format is looking at.

    Attributes:
        source: Name of the source in the recipe.
        index: Position of the row in its source.
        id: The row's own id where it has one, else its index.
        where: Place for people: ``file.json:row 12``.
        media_root: Folder that media paths are relative to; None when the source has none.
        caches: Folders that a data set library (never a user) names by absolute path.
    """

    source: str
    index: int
    id: str = ""
    where: str = ""
    media_root: Path | None = None
    caches: tuple[Path, ...] = ()

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
        return self._confined(self.media_root, path)

    def media(self, kind: MediaKind, value: Any, start: float = 0.0, end: float | None = None) -> Media:
        """Return the media that a row names or holds, not yet read.

        Args:
            kind: What it is.
            value: A path, a ``data:`` URL, encoded bytes, ``{"bytes", "path"}`` as `datasets` stores media, or a PIL
                image.
            start: Second at which a clip starts.
            end: Second at which it ends.

        Raises:
            BadSampleError: It is none of these, or a path that `resolve` refuses. Nothing is ever downloaded.
        """
        if isinstance(value, dict) and ("bytes" in value or "path" in value):
            if value.get("bytes") is None and isinstance(value.get("path"), str):
                return Media(kind, self._stored(value["path"]), start=start, end=end)
            value = value.get("bytes")
        if isinstance(value, str):
            scheme = value.partition(":")[0].lower()
            if scheme in ("http", "https", "s3", "gs", "hf", "ftp"):
                raise BadSampleError(f"remote media {value[:80]!r}; nothing is downloaded in training, fetch it first")
            value = _data_url(value) if scheme == "data" else self.resolve(value.removeprefix("file://"))
        if isinstance(value, (Path, bytes, bytearray)) or type(value).__module__.startswith("PIL."):
            return Media(kind, value, start=start, end=end)
        raise BadSampleError(f"{kind} is {shown(value)}, not a path, bytes or picture")

    def _stored(self, path: str) -> Path:
        """Return a path that `datasets` wrote down: absolute in its cache, or relative like any other."""
        if Path(path).is_absolute():
            for root in (*self.caches, self.media_root):
                if root is not None and Path(path).is_relative_to(root):
                    return self._confined(root, str(Path(path).relative_to(root)))
        return self.resolve(path)

    @staticmethod
    def _confined(root: Path, path: str) -> Path:
        try:
            top = _real(root.absolute())
            found = (top / path).resolve()
            inside = found.is_relative_to(top)
            exists = inside and found.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # name too long, lone surrogate, a loop of links
            raise BadSampleError(f"media path {path!r} cannot be resolved: {error}") from None
        if not inside:
            raise BadSampleError(f"media path {path!r} leaves the media root {root}")
        if not exists:
            raise BadSampleError(f"missing file {path!r} in {root}")
        return found


@cache
def _real(root: Path) -> Path:
    return root.resolve()


class Rows(Sequence[Any]):
    """Rows that can be counted and fetched in any order; ``rows[i]`` raises `BadSampleError` for a malformed one."""

    caches: tuple[Path, ...] = ()

    def where(self, index: int) -> str:
        """Return the place of a row, for people."""
        return f"row {index}"

    def folder(self, index: int) -> Path | None:
        """Return the folder that the row's media paths start from unless the recipe names another."""
        return None


class RowStream:
    """Rows that can only be read one after the other."""

    caches: tuple[Path, ...] = ()

    def read(
        self, epoch: int, seed: int, rank: int, world: int, limit: int | None = None
    ) -> Iterator[tuple[str, Path | None, Any]]:
        """Yield the place, the folder and the row (or the `BadSampleError` it is) of each row of this rank.

        Args:
            epoch: How often the stream was read before.
            seed: Orders files and shards, where there are any.
            rank: Which part of the rows to read.
            world: Number of parts.
            limit: Read only so many rows over all ranks: the first ones, always the same.
        """
        raise NotImplementedError


class ChainedRows(Rows):
    """Several rows one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))
        self.caches = tuple(cache for part in self.parts for cache in part.caches)

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1]

    def _find(self, index: int) -> tuple[Rows, int]:
        part = bisect_right(self._ends, index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: Any) -> Any:
        """Return one row."""
        part, i = self._find(index)
        return part[i]

    def where(self, index: int) -> str:
        """Return the place of a row in its part."""
        part, i = self._find(index)
        return part.where(i)

    def folder(self, index: int) -> Path | None:
        """Return the folder of the row's part."""
        part, i = self._find(index)
        return part.folder(i)


def _data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadSampleError(f"data URL {url[:40]!r} is not base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise BadSampleError(f"data URL {url[:40]!r} is broken: {error}") from None


def shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
