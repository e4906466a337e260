"""Rows of a folder of pictures and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsevlm.data.files import JsonRows
from sparsevlm.data.rows import Rows, shown
from sparsevlm.data.sample import BadSampleError
from sparsevlm.vision.tokens import MediaKind

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2", ".tga")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv")


class FolderRows(Rows):
    """Pictures and videos of a folder and its sub-folders.

    With a ``metadata.jsonl`` (its ``file_name`` names the file, as `datasets` has it), its lines are the rows.
    Without, every file is a row: ``text`` from the text file of the same name (``cat.png``, ``cat.txt``), ``label``
    from the name of its sub-folder; a row without text file has its label as text.

    Raises:
        ValueError: There is nothing in the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        listed = path / "metadata.jsonl"
        self._metadata = JsonRows(listed) if listed.is_file() else None
        found = (p for p in path.rglob("*") if media_kind(p.name) is not None and p.is_file())
        self._files = [] if self._metadata else sorted(p.relative_to(path).as_posix() for p in found)
        if not len(self):
            raise ValueError(f"no pictures, videos or metadata.jsonl in the folder {path}")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._files) if self._metadata is None else len(self._metadata)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """Return one row: ``image`` or ``video``, and what belongs to it."""
        if self._metadata is not None:
            row = self._metadata[index]
            name = row.get("file_name") if isinstance(row, dict) else None
            kind = media_kind(name) if isinstance(name, str) else None
            if kind is None:
                raise BadSampleError(f"'file_name' is {shown(name)}, not the name of a picture or video")
            return {"id": name, **row, str(kind): name}
        name = self._files[index]
        kind = media_kind(name)
        assert kind is not None  # only such files are listed
        row = {"id": name, str(kind): name}
        if "/" in name:
            row["text"] = row["label"] = name.split("/")[-2]
        beside = (self.path / name).with_suffix(".txt")
        if beside.is_file():
            try:
                row["text"] = beside.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise BadSampleError(f"{beside.name} cannot be read as UTF-8 text: {error}") from None
        return row

    def where(self, index: int) -> str:
        """Return the file's place in the folder, or its line in ``metadata.jsonl``."""
        return f"{self.path.name}/{self._files[index] if self._metadata is None else self._metadata.where(index)}"

    def folder(self, index: int) -> Path:
        """Return the folder."""
        return self.path


def media_kind(name: str) -> MediaKind | None:
    """Return whether a file name is one of a picture or a video."""
    suffix = Path(name).suffix.lower()
    return MediaKind.IMAGE if suffix in IMAGE_SUFFIXES else MediaKind.VIDEO if suffix in VIDEO_SUFFIXES else None
