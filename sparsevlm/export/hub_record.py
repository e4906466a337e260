"""What of a directory is on the Hub already: `pushed.json`, written beside a model when it has been uploaded."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

FILE = "pushed.json"
_KEPT = 20


@dataclass(frozen=True)
class Push:
    """One upload.

    Attributes:
        endpoint: Address of the Hub.
        repo: ``OWNER/NAME``.
        revision: Branch.
        commit: The commit that holds it, 40 hexadecimal digits.
        folder: Folder of the repository; None for its root.
        state: `state_of` the directory then.
    """

    endpoint: str
    repo: str
    revision: str
    commit: str
    folder: str | None
    state: str


def state_of(directory: Path) -> str:
    """Return what changes when a stage is trained anew or evaluated again; empty for what is no stage."""
    record = directory / "stage.json"
    return sha256(record.read_bytes()).hexdigest() if record.is_file() else ""


def read_pushes(directory: Path) -> list[Push]:
    """Return the uploads of a directory, the oldest first; entries of another form are left out."""
    file = directory / FILE
    if not file.is_file():
        return []
    try:
        rows: Any = json.loads(file.read_text(encoding="utf-8"))["pushes"]
        return [Push(**row) for row in rows]
    except (ValueError, KeyError, TypeError):
        return []


def note_push(directory: Path, push: Push) -> None:
    """Enter an upload.

    Raises:
        OSError: The directory cannot be written.
    """
    earlier = [row for row in read_pushes(directory) if (row.repo, row.revision) != (push.repo, push.revision)]
    document = {"pushes": [asdict(row) for row in [*earlier, push][-_KEPT:]]}
    partial = directory / f".{FILE}.{os.getpid()}.partial"
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    partial.replace(directory / FILE)
