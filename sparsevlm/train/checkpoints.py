"""Checkpoints that count only when they are whole.

A checkpoint directory is written file by file; its marker `COMPLETE` comes last, after everything else has reached the
disk. A killed write therefore leaves a directory without a marker, which is never resumed from and is removed at the
next start. The same marker ends a stage directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from sparsevlm.rundir import COMPLETE

MARKER = COMPLETE
"""Name of the completion marker."""

_NAME = re.compile(r"checkpoint-(\d+)$")


def mark_complete(directory: Path, info: dict[str, Any]) -> None:
    """Flush every file of a directory to disk, then write its marker.

    Args:
        directory: A finished directory.
        info: What the marker says (JSON).
    """
    for file in directory.rglob("*"):
        _sync(file)
    _sync(directory)
    write_atomically(directory / MARKER, json.dumps(info, indent=2) + "\n")


def read_marker(directory: Path) -> dict[str, Any] | None:
    """Return what a directory's marker says; None when it is not complete."""
    marker = directory / MARKER
    return json.loads(marker.read_text()) if marker.is_file() else None


def write_atomically(file: Path, text: str) -> None:
    """Replace a file so that a reader sees the old text or the new one, also after a crash."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    """Flush a file, or a directory's list of names."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """All checkpoint directories, whole or not, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in root.iterdir() if (match := _NAME.match(path.name))]
    return sorted(found)


def latest(root: Path) -> Path | None:
    """Return the newest complete checkpoint below a directory, None when there is none."""
    whole = [path for _, path in _checkpoints(root) if read_marker(path) is not None]
    return whole[-1] if whole else None


def remove(directory: Path) -> None:
    """Delete a directory; its marker first, so that a half-deleted one does not count."""
    (directory / MARKER).unlink(missing_ok=True)
    shutil.rmtree(directory)


def clean(root: Path) -> list[Path]:
    """Delete what interrupted writes left behind; return it."""
    broken = [path for _, path in _checkpoints(root) if read_marker(path) is None]
    for path in broken:
        remove(path)
    return broken


def rotate(root: Path, keep: int = 2) -> None:
    """Delete all complete checkpoints but the last ``keep``."""
    whole = [path for _, path in _checkpoints(root) if read_marker(path) is not None]
    for path in whole[: max(len(whole) - keep, 0)]:
        remove(path)
