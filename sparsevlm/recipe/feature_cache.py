"""`feature_cache`: features of a tower that does not train, kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from sparsevlm.recipe.section import CrossFault, Strict, names, view


class FeatureCache(Strict):
    """Keep what the vision tower gives for each medium, and read it the next time instead of decoding and encoding.

    Used over epochs, stages, runs and recipes with the same tower; a stage that trains its tower does without. Entries
    are found by the bytes of the media, the way they are brought to the tower and the tower's weights, so that nothing
    stale is read. Not with ZeRO-3.
    """

    path: str
    """Folder; may be shared by runs, also at the same time."""
    max_gb: float = Field(default=100, gt=0)
    """Size of the folder (10^9 bytes) from which on nothing is added to it; processes that write at the same moment may
    exceed it by 64 MiB each."""


def cache_faults(raw: dict[str, Any]) -> Iterator[CrossFault]:
    """Yield the stages of a recipe that cannot use a cache."""
    if raw.get("feature_cache") is None:
        return
    for name, value in view(raw.get("stages")).items():
        stage = view(value)
        own = stage.get("sharding") is not None
        sharding = view(stage["sharding"] if own else raw.get("sharding"))
        if sharding.get("zero") == 3 and "vision" not in names(stage.get("trains")):
            at = ("stages", name, "sharding") if own else ("sharding",)
            yield (
                (*at, "zero"),
                "ZeRO-3 shards the tower's weights, which name the features of 'feature_cache': use 'zero: 2' or less, "
                "or leave the cache out",
            )
