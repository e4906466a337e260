"""The cells of one row: looked up by the names that a format's options give, checked, and never trusted."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from sparsevlm.data.rows import RowContext, shown
from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.vision.tokens import MediaKind


class Columns:
    """A row and the options that name its columns.

    An option is the name of a column, a tuple of names of which the first that is there counts, or None for a column
    that the format shall not look for.

    Args:
        row: The row as it was read.
        options: Options of the format.

    Raises:
        BadSampleError: The row is no mapping.
    """

    def __init__(self, row: Any, options: Mapping[str, Any]) -> None:
        if not isinstance(row, dict):
            raise BadSampleError(f"malformed row: {shown(row)} is not an object")
        self.row: dict[str, Any] = row
        self.options = options

    def name(self, option: str) -> str:
        """Return the name of the column that `option` means in this row (the first choice when it has none)."""
        names = self._names(option)
        return next((name for name in names if self.row.get(name) is not None), names[0] if names else option)

    def has(self, option: str) -> bool:
        """Return whether the row has the column, be it empty."""
        return any(name in self.row for name in self._names(option))

    def value(self, option: str) -> Any:
        """Return the cell, None where there is none."""
        return self.row.get(self.name(option)) if self._names(option) else None

    def media(self, kind: MediaKind, option: str, context: RowContext) -> list[Media]:
        """Return the media of a column that holds one or a list of them, or nothing.

        Raises:
            BadSampleError: One of them is none, or leaves the media root.
        """
        clip = (self._second("start"), self._second("end")) if kind is MediaKind.VIDEO else (None, None)
        return [context.media(kind, value, clip[0] or 0.0, clip[1]) for value in as_list(self.value(option))]

    def _second(self, option: str) -> float | None:
        value = self.value(option) if self.options.get(option) else None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise BadSampleError(f"{self.name(option)!r} is {shown(value)}, not a second of the video")
        return float(value)

    def _names(self, option: str) -> Sequence[str]:
        names = self.options[option]
        return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, None as an empty one, and anything else as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def check_text(value: Any, name: str) -> str:
    """Return a text as it is.

    Raises:
        BadSampleError: It is no text, or holds half a surrogate pair (which no tokenizer takes).
    """
    if not isinstance(value, str):
        raise BadSampleError(f"{name!r} is {shown(value)}, not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadSampleError(f"{name!r} holds half a surrogate pair") from None
    return value


def clean_text(value: Any, name: str) -> str:
    """Return a text without white space around it.

    Raises:
        BadSampleError: As `check_text`, or nothing is left.
    """
    text = check_text(value, name).strip()
    if not text:
        raise BadSampleError(f"{name!r} is empty")
    return text


def pick(choices: Sequence[Any], identity: str, purpose: str) -> Any:
    """Return one of several choices: always the same for a row, evenly spread over rows."""
    return choices[zlib.crc32(f"{purpose}/{identity}".encode("utf-8", "replace")) % len(choices)]
