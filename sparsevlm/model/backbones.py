"""Shapes of published backbones, so that a recipe that names them can be planned without a network.

Each is a small file in ``assets/backbones``: ``{"ids": [...], "parameters": n, "config": {...}}``; the parameter count
is the published checkpoint's and is tested against the model that the config builds.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from sparsevlm.registry import suggest

DIRECTORY = Path(__file__).resolve().parent.parent / "assets" / "backbones"

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@cache
def _table() -> dict[str, dict[str, Any]]:
    """Entries by Hub id in lower case (the Hub ignores case)."""
    entries = [json.loads(file.read_text()) for file in sorted(DIRECTORY.glob("*.json"))]
    return {name.lower(): entry | {"id": name} for entry in entries for name in entry["ids"]}


def known_backbones() -> list[str]:
    """Return the Hub ids whose shapes the package carries."""
    return sorted(entry["id"] for entry in _table().values())


def published_parameters(path: str) -> int:
    """Return the parameter count of a known backbone's checkpoint (of CLIP and SigLIP, of the vision tower)."""
    return _table()[path.lower()]["parameters"]


def backbone_config(path: str) -> PreTrainedConfig:
    """Return the configuration of a backbone without touching the network.

    Args:
        path: Hub id.

    Raises:
        ValueError: Neither the package nor the local Hub cache knows it; the message lists what the package knows,
            unless `path` can only have been meant as a directory.
    """
    entry = _table().get(path.lower())
    if entry is not None:
        values = dict(entry["config"])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):  # not in the cache; or no Hub id at all
        if not _HUB_ID.fullmatch(path):
            raise ValueError(
                f"no directory {path!r} here, and a Hub id has the form OWNER/NAME: make it first (the first lines of "
                "a recipe that comes with the package say how), or correct the path"
            ) from None
        ids = known_backbones()
        raise ValueError(
            f"no shapes of {path!r} here: it is no directory, not in the Hub cache, and none of the backbones that the "
            f"package knows{suggest(path, ids)} ({', '.join(ids)}); download its config.json, or give a directory"
        ) from None
