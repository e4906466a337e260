"""Models in the middle of a stage, written for an upload that goes on while training does.

``RUN/STAGE/hub/step-N`` is a model directory that can be loaded, complete once its marker is there. The run writes
them, the uploader takes one by renaming it to ``pushing-N`` and deletes it when it is on the Hub. A new one takes the
place of one that still waits, so there are three on the disk at most: one that is written, one that waits, one that
goes up. None of them is a checkpoint to resume from, and rotating those does not touch them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from sparsevlm.train.checkpoints import read_marker

FOLDER = "hub"
_NAME = re.compile(r"(step|pushing)-(\d+)")


def found(stage_dir: Path, kind: str) -> list[tuple[int, Path]]:
    """Return the complete snapshots of a stage that wait (`step`) or are going up (`pushing`), the oldest first."""
    folder = stage_dir / FOLDER
    names = [(match, path) for path in folder.glob(f"{kind}-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[2]), path) for match, path in names if read_marker(path) is not None)


def claim(snapshot: Path) -> Path | None:
    """Take a snapshot that waits, for uploading; None where a newer one has just taken its place."""
    claimed = snapshot.with_name(snapshot.name.replace("step", "pushing"))
    try:
        return snapshot.rename(claimed)
    except FileNotFoundError:
        return None


def drop(snapshot: Path) -> None:
    """Delete a snapshot, unless somebody has just claimed it."""
    doomed = snapshot.with_name(f".{snapshot.name}.dropped")
    try:
        snapshot.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)
