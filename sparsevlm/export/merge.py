"""Merging an adapter into its base on disk, weight by weight: neither model is ever in memory as a whole.

Each merged weight is computed in float32 and rounded once. What the adapter changes in a weight is `merge_deltas.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from sparsevlm.export.folder import copy_files, refuse_full, refuse_in_use, written_aside
from sparsevlm.export.merge_adapter import AdapterFolder, find_base, find_common_base, open_adapter
from sparsevlm.export.merge_base import Base
from sparsevlm.export.merge_combine import Recipe, combine, make_recipe
from sparsevlm.export.merge_job import Job
from sparsevlm.export.merge_quantised import compare_quantised, quantised_for, refuse_replay
from sparsevlm.export.merge_read import read_edits
from sparsevlm.export.merge_report import MergeReport
from sparsevlm.export.merge_unmerge import take_off
from sparsevlm.export.merge_write import written_behind
from sparsevlm.export.shards import ShardWriter, parse_size, total_bytes

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""`auto`: each weight keeps the type that the base stores it in."""


def merge_adapter(
    adapter: str | Sequence[str],
    out: Path,
    *,
    base: str | None = None,
    recipe: Recipe | None = None,
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
    untie: bool = False,
    replay_quantisation: bool = False,
    check: bool = True,
    unmerge: bool = False,
) -> MergeReport:
    """Write the model that computes what a base with its adapter does.

    Reads and writes weight by weight: in memory are the adapters, one weight and its change. Everything is written to a
    hidden directory beside ``out`` that takes its name at the very end. The same arguments give the same bytes.

    Args:
        adapter: Directory or Hub id of a LoRA adapter; or of several, trained on one base.
        out: Directory to write; must not exist, or be empty.
        base: The model that the adapter was trained on; default: what the adapter names.
        recipe: How several are combined (`merge_combine.make_recipe`); default: the mean of their changes.
        dtype: Type of the weights.
        max_shard_size: Largest weight file, ``5GB``.
        untie: Give the output embeddings a tensor of their own where the adapter changes one of two tied weights.
        replay_quantisation: Add the changes of an adapter that was trained on quantised weights to those, dequantised.
        check: Load both models at the end, in float32, and compare their logits.
        unmerge: Read what was written, take the changes off again, and compare with the base; weight by weight.

    Raises:
        ValueError: Anything that the arguments cause: ``out`` is in use, an adapter has no merged form or does not fit
            the base, adapters cannot be combined, the base is quantised or another one, the disk is too small, the
            logits differ, or the base does not come back.
    """
    names = [adapter] if isinstance(adapter, str) else list(adapter)
    if recipe is None and len(names) > 1:
        recipe = make_recipe(len(names))
    refuse_in_use(out)
    limit = parse_size(max_shard_size)
    sources = [open_adapter(name) for name in names]
    name, directory, identity = find_base(sources[0], base) if len(sources) == 1 else find_common_base(sources, base)
    with ExitStack() as stack, torch.no_grad():
        opened = stack.enter_context(Base(name, directory))
        found = [(source.name, read_edits(source, opened)) for source in sources]
        edits = found[0][1] if recipe is None else combine(found, recipe)
        settings = quantised_for(sources)
        if replay_quantisation:
            refuse_replay(sources, settings)
        chosen = None if dtype == "auto" else getattr(torch, dtype)
        job = Job(opened, edits, chosen, untie, settings, replay_quantisation)
        refuse_full(out, total_bytes(job.plan.values()))
        with written_aside(out) as partial:
            writer = ShardWriter(partial, job.plan, limit)
            stack.callback(writer.close)
            with written_behind(writer, partial) as write:
                for step in job.steps():
                    write(step.key, job.tensor(step))
            writer.finish()
            copy_files(directory, partial)
            copy_files(sources[0].directory, partial)  # it was trained with its own tokenizer and chat template
            notes = _other_files(sources, partial)
            job.write_config(partial)
            taken_off = take_off(job, partial) if unmerge else None
            measured = as_trained = None
            if check:
                from sparsevlm.export.merge_check import compare, compare_combined

                if settings is not None and recipe is None:
                    measured, as_trained = compare_quantised(job, sources[0], partial)
                elif recipe is None:
                    measured = compare(opened, sources[0], partial, job.dtype)
                else:
                    measured = compare_combined(job, partial)
    method = "DoRA" if edits.dora else "rsLoRA" if sources[0].config.get("use_rslora") else "LoRA"
    return MergeReport(
        adapter=" + ".join(names),
        method=method if recipe is None else recipe.describe(),
        base=name,
        base_class=opened.model_class.__name__,
        identity=identity,
        low_rank=edits.low_rank,
        replaced=edits.replaced,
        mixed=sum(bool(edit.mixed and not edit.changes) for edit in edits.by_name.values()),
        carried=job.carried,
        idle=edits.idle,
        untied=job.separated,
        dtype=str(job.dtype).removeprefix("torch."),
        files=len(set(writer.files.values())),
        nbytes=total_bytes(job.plan.values()),
        notes=notes,
        unmerged=taken_off,
        replayed=len(job.replayed),
        check=measured,
        as_trained=as_trained,
    )


def _other_files(sources: Sequence[AdapterFolder], out: Path) -> tuple[str, ...]:
    """Tell which files of further adapters (tokenizer, chat template) are others than those that were copied."""
    notes: list[str] = []
    for source in sources[1:]:
        files = (file for file in source.directory.iterdir() if file.is_file() and (out / file.name).is_file())
        differ = sorted(file.name for file in files if file.read_bytes() != (out / file.name).read_bytes())
        if differ:
            notes.append(f"{', '.join(differ)}: {source.name} has others than {sources[0].name}, whose were kept")
    return tuple(notes)
