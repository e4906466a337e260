"""The cells of one row: looked up by the names that a format's options give, checked, and never trusted."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
        if kind is not MediaKind.VIDEO:
            return [context.media(kind, value) for value in as_list(self.value(option))]
        start, end = self._second("start"), self._second("end")
        videos = [context.media(kind, value, start or 0.0, end) for value in as_list(self.value(option))]
        files = as_list(self.value("subtitles")) if "subtitles" in self.options else []
        if len(files) not in (0, len(videos)):
            raise BadSampleError(f"{len(files)} {self.name('subtitles')!r} for {len(videos)} videos")
        return [with_subtitles(video, file, context) for video, file in zip(videos, files)] if files else videos

    def views(self, option: str, poses: str, context: RowContext) -> list[Media]:
        """Return the scenes of a column that holds the views of one, a list of paths, or a list of such lists.

        Raises:
            BadSampleError: As `media`, or a scene has no views, or not a pose for each.
        """
        scenes, matrices = as_list(self.value(option)), self.value(poses)
        if scenes and not any(isinstance(scene, list) for scene in scenes):
            scenes, matrices = [scenes], None if matrices is None else [matrices]
        matrices = matrices or [None] * len(scenes)
        if not isinstance(matrices, list) or len(matrices) != len(scenes):
            raise BadSampleError(f"{self.name(poses)!r} has not as many entries as {self.name(option)!r}")
        return [scene_media(scene, matrix, context) for scene, matrix in zip(scenes, matrices, strict=True)]

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


def with_subtitles(video: Media, file: Any, context: RowContext) -> Media:
    """Return a video with its file of subtitles; a row may say that there is none with null.

    Raises:
        BadSampleError: The file is no path in the media root.
    """
    if file is None:
        return video
    if not isinstance(file, str):
        raise BadSampleError(f"subtitles are {shown(file)}, not a path")
    return replace(video, subtitles=context.resolve(file))


def scene_media(views: Any, poses: Any, context: RowContext) -> Media:
    """Return a scene seen from several places.

    Args:
        views: List of pictures.
        poses: A 3 x 4 or 4 x 4 matrix a view, camera to world, as lists of rows; None where unknown.
        context: Which row it is.

    Raises:
        BadSampleError: No views, one of them is no picture, or the poses are no such matrices.
    """
    if not isinstance(views, list) or not views:
        raise BadSampleError(f"views are {shown(views)}, not a list of pictures")
    sources = tuple(context.media(MediaKind.IMAGE, view).source for view in views)
    if poses is None:
        return Media(MediaKind.MULTI_VIEW, sources)
    if not isinstance(poses, list) or len(poses) != len(views):
        raise BadSampleError(f"poses are {shown(poses)}, not a matrix for each of {len(views)} views")
    return Media(MediaKind.MULTI_VIEW, sources, meta={"poses": tuple(_matrix(pose) for pose in poses)})


def _matrix(pose: Any) -> tuple[tuple[float, ...], ...]:
    rows: list[Any] = pose if isinstance(pose, list) and len(pose) in (3, 4) else [None]
    for row in rows:
        numbers = row if isinstance(row, list) else []
        if len(numbers) != 4 or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            raise BadSampleError(f"a pose is {shown(pose)}, not a 3 x 4 or 4 x 4 matrix of numbers")
    return tuple(tuple(map(float, row)) for row in rows)


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
