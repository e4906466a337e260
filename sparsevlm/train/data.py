"""The rows that a stage trains on."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from sparsevlm.data.collate import Collator
from sparsevlm.data.dataset import StageData
from sparsevlm.data.opened import OpenSource
from sparsevlm.data.sample import BadSampleError, Encoded, Sample
from sparsevlm.data.stream import StageStream, plan_rows
from sparsevlm.recipe.schema import Recipe

LOOK_AT = 64
"""Records a source that `first_samples` reads at most."""


def make_collator(processor: Any, packed: bool) -> Collator:
    """Return the collator of a processor's batches."""
    return Collator(processor.tokenizer.pad_token_id, packed=packed)


def first_samples(recipe: Recipe, name: str, processor: Any, count: int) -> list[Encoded]:
    """Return some encoded samples of a stage, from each of its sources in turn, without planning its rows.

    Raises:
        ValueError: None of the first records of any source can be used.
    """
    stage = recipe.stages[name]
    found: list[list[Encoded]] = []
    for source in stage.data:
        encoded = []
        for sample in _first(source, recipe):
            try:
                encoded.append(processor.encode(sample, stage.batch.max_length))
            except BadSampleError:
                continue
            if len(encoded) == count:
                break
        found.append(encoded)
    mixed = [encoded for group in zip(*(_filled(e, count) for e in found), strict=True) for encoded in group]
    chosen = [encoded for encoded in mixed if encoded is not None][:count]
    if not chosen:
        raise ValueError(f"stage {name!r}: none of the first {LOOK_AT} records of {', '.join(stage.data)} can be used")
    return chosen


def _filled(encoded: list[Encoded], count: int) -> list[Encoded | None]:
    return [*encoded, *[None] * (count - len(encoded))]


def _first(source: str, recipe: Recipe) -> list[Sample]:
    """The usable ones of a source's first records."""
    opened = OpenSource(source, recipe.data[source])
    if opened.streams:
        read = islice(opened.stream(0, recipe.seed, 0, 1), LOOK_AT)
    else:
        read = (opened.read(index) for index in range(min(len(opened), LOOK_AT)))
    return [sample for sample in read if isinstance(sample, Sample)]


def is_packed(recipe: Recipe, name: str, attention: str) -> bool:
    """Return whether a stage packs, given the attention implementation that runs."""
    from sparsevlm.model.build import packs_for_free

    packing = recipe.stages[name].batch.packing
    return packs_for_free(attention) if packing == "auto" else packing


def stage_data(recipe: Recipe, name: str, model: Any, processor: Any, skipped_path: Path) -> StageData | StageStream:
    """Plan the rows of a stage for this rank.

    Raises:
        ValueError: A source cannot be read, or too many of its records.
    """
    attention = model.model.language_model.config._attn_implementation
    return plan_rows(
        recipe.data,
        recipe.stages[name],
        processor.measure,
        processor.encode,
        packed=is_packed(recipe, name, attention),
        seed=recipe.seed,
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        skipped_path=skipped_path,
    )
