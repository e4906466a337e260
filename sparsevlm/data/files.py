"""Rows of JSON and JSONL files, read when asked for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sparsevlm.data.rows import Rows, RowStream
from sparsevlm.data.sample import BadSampleError


class JsonRows(Rows):
    """Rows of a JSON list or of JSON lines, read from the file when asked for (only their places are kept).

    Raises:
        ValueError: The file is neither.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._pid = 0
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        self.is_list = head.startswith(b"[")
        spans = list(_list_spans(path)) if self.is_list else [line[:3] for line in _lines(path)]
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 3)  # start, end, line; an array is shared by workers

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        """Parse one row."""
        start, end, _ = self._spans[index].tolist()
        if self._file is None or self._pid != os.getpid():
            self._file, self._pid = os.open(self.path, os.O_RDONLY), os.getpid()
        return parse_row(os.pread(self._file, end - start, start))

    def where(self, index: int) -> str:
        """Return ``file.json:row 0`` (counted from 0) or ``file.jsonl:line 1`` (counted from 1)."""
        return f"{self.path.name}:row {index}" if self.is_list else f"{self.path.name}:line {self._spans[index, 2]}"

    def folder(self, index: int) -> Path:
        """Return the folder of the file."""
        return self.path.parent

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class JsonlStream(RowStream):
    """JSON lines, read from top to bottom without an index."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def read(
        self, epoch: int, seed: int, rank: int, world: int, limit: int | None = None
    ) -> Iterator[tuple[str, Path | None, Any]]:
        """Yield every ``world``-th line; without a limit the order of the files changes with the epoch."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.paths)).tolist()
        paths = self.paths if limit is not None else [self.paths[i] for i in order]
        lines = ((path, line, raw) for path in paths for _, _, line, raw in _lines(path))
        for path, line, raw in islice(lines, rank, limit, world):
            yield f"{path.name}:line {line}", path.parent, row_or_error(raw)


def parse_row(raw: bytes) -> Any:
    """Parse the JSON text of one row.

    Raises:
        BadSampleError: It is not JSON.
    """
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"malformed row: {error}") from None


def row_or_error(raw: bytes) -> Any:
    """Parse the JSON text of one row; the error is returned, not raised."""
    try:
        return parse_row(raw)
    except BadSampleError as error:
        return error


def _list_spans(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield the byte range of each element of a JSON list."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n\ufeff]*")
    at = space.match(text).end() + 1  # type: ignore[union-attr]  # matches anything; the list's bracket is next
    offset, done = len(text[:at].encode()), at
    try:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        while text[at : at + 1] != "]":
            start = at
            _, at = decoder.raw_decode(text, start)
            first = offset + len(text[done:start].encode())
            offset, done = first + len(text[start:at].encode()), at
            yield first, offset, 0
            at = space.match(text, at).end()  # type: ignore[union-attr]
            if text[at : at + 1] == ",":
                at = space.match(text, at + 1).end()  # type: ignore[union-attr]
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not a JSON list: {error.msg}") from None


def _lines(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield the byte range, number and content of each line that is not blank.

    Raises:
        ValueError: The first line of a ``.json`` file is no record; it is then no list of lines either.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if not line.strip():
                continue
            if start == 0 and path.suffix.lower() == ".json" and isinstance(row_or_error(line), BadSampleError):
                raise ValueError(f"{path} is neither a JSON list nor JSON lines: {row_or_error(line)}")
            yield start, end, number, line
