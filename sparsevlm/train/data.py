"""The rows that a stage trains on."""

from __future__ import annotations

import os
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sparsevlm.data.collate import Collator
from sparsevlm.data.dataset import StageData
from sparsevlm.data.opened import OpenSource
from sparsevlm.data.sample import BadSampleError, Encoded, Sample
from sparsevlm.data.stream import StageStream, plan_rows
from sparsevlm.recipe.schema import Recipe
from sparsevlm.vision.feature_store import FeatureStore

LOOK_AT = 64
"""Records a source that `first_records` reads at most."""


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
        for sample in first_records(source, recipe):
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


def first_records(source: str, recipe: Recipe) -> list[Sample]:
    """Return the usable ones of a source's first records."""
    opened = OpenSource(source, recipe.data[source])
    if opened.streams:
        read = islice(opened.stream(0, recipe.seed, 0, 1), LOOK_AT)
    else:
        read = (opened.read(index) for index in range(min(len(opened), LOOK_AT)))
    return [sample for sample in read if isinstance(sample, Sample)]


def is_packed(recipe: Recipe, name: str, decoder: Any) -> bool:
    """Return whether a stage packs, given the decoder with the attention that runs.

    Raises:
        ValueError: The stage asks for packing, but the decoder lets documents of a row see each other.
    """
    from sparsevlm.model.attention import PACKED_SDPA, supports_packed_sdpa
    from sparsevlm.model.build import packs_for_free
    from sparsevlm.model.isolation import kind_isolates

    packing, attention = recipe.stages[name].batch.packing, decoder.config._attn_implementation
    if packing == "auto":
        return packs_for_free(attention) and kind_isolates(decoder)
    if packing and not kind_isolates(decoder):
        other = attention != PACKED_SDPA and supports_packed_sdpa(decoder) and kind_isolates(decoder, PACKED_SDPA)
        raise ValueError(
            f"stages.{name}.batch.packing is true, but {type(decoder).__name__} with attention {attention!r} lets "
            "documents of a packed row see each other; set packing: false"
            + f", or model.language.attention: {PACKED_SDPA}"
            * other
        )
    return packing


def stage_data(
    recipe: Recipe, name: str, model: Any, processor: Any, skipped_path: Path, store: FeatureStore | None = None
) -> StageData | StageStream:
    """Plan the rows of a stage for this rank.

    Args:
        recipe: The resolved recipe.
        name: The stage.
        model: Its model.
        processor: The model's processor.
        skipped_path: Where skipped records are written.
        store: Where features of media may be.

    Raises:
        ValueError: A source cannot be read, or too many of its records.
    """
    return plan_rows(
        recipe.data,
        recipe.stages[name],
        processor.measure,
        processor.encode if store is None else partial(processor.encode, store=store),
        packed=is_packed(recipe, name, model.model.language_model),
        seed=recipe.seed,
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        skipped_path=skipped_path,
    )
