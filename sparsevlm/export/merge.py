"""Merging an adapter into its base on disk, weight by weight: neither model is ever in memory as a whole.

Each merged weight is computed in float32 and rounded once. What the adapter changes in a weight is `merge_deltas.py`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparsevlm.export.folder import copy_files, refuse_full, refuse_in_use, written_aside
from sparsevlm.export.merge_adapter import AdapterFolder, find_base, find_common_base, open_adapter
from sparsevlm.export.merge_base import Base
from sparsevlm.export.merge_combine import Recipe, combine, make_recipe
from sparsevlm.export.merge_deltas import Edit, Edits
from sparsevlm.export.merge_read import read_edits
from sparsevlm.export.merge_report import MergeReport
from sparsevlm.export.shards import Entry, ShardWriter, parse_size, total_bytes

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""`auto`: each weight keeps the type that the base stores it in."""

_BALANCE_BIAS = "e_score_correction_bias"
"""Stays in float32, whatever the type of the weights: it moves in steps that 16 bits would lose."""


def merge_adapter(
    adapter: str | Sequence[str],
    out: Path,
    *,
    base: str | None = None,
    recipe: Recipe | None = None,
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
    untie: bool = False,
    check: bool = True,
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
        check: Load both models at the end, in float32, and compare their logits.

    Raises:
        ValueError: Anything that the arguments cause: ``out`` is in use, an adapter has no merged form or does not fit
            the base, adapters cannot be combined, the base is quantised or another one, the disk is too small, or the
            logits differ.
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
        job = Job(opened, edits, None if dtype == "auto" else getattr(torch, dtype), untie)
        refuse_full(out, total_bytes(job.plan.values()))
        with written_aside(out) as partial:
            writer = ShardWriter(partial, job.plan, limit)
            stack.callback(writer.close)
            for key, tensor in job.tensors():
                writer.write(key, tensor)
            writer.finish()
            copy_files(directory, partial)
            copy_files(sources[0].directory, partial)  # it was trained with its own tokenizer and chat template
            notes = _other_files(sources, partial)
            job.write_config(partial)
            measured = None
            if check:
                from sparsevlm.export.merge_check import compare, compare_combined

                if recipe is None:
                    measured = compare(opened, sources[0], partial, job.dtype)
                else:
                    measured = compare_combined(opened, job.by_name, job.separated, partial, job.dtype)
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
        check=measured,
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


class Job:
    """One merging: what is read, what is made of it, and the plan of what is written.

    Attributes:
        edits: What changes.
        by_name: Name in the base -> what becomes of that weight, ties settled.
        dtype: Type of the result.
        plan: Key on disk -> shape and type, in the order of the base.
        separated: Two tied weights are two tensors now.
        untied: Keys of them that the base does not hold -> the one that it holds, and what becomes of that.
        carried: Stored tensors that stay as they are.
    """

    def __init__(self, base: Base, edits: Edits, dtype: torch.dtype | None, untie: bool) -> None:
        self.base, self.edits = base, edits
        self._dtype, self.dtype = dtype, dtype or base.dtype
        self.separated = False
        self.untied: dict[str, tuple[str, Edit | None]] = {}
        self.by_name = dict(edits.by_name)
        for name, other in base.tied.items():
            self._settle_tie(name, other, untie)
        self._owner = {key: name for name in self.by_name for key in base.keys(name)}
        entries = base.reader.entries
        self.carried = len(entries.keys() - self._owner.keys())
        for key, name in self._owner.items():
            if not entries[key].dtype.is_floating_point:
                raise ValueError(
                    f"{base.name}: {name} is stored as {entries[key].dtype}, a quantised type; pass the same model in "
                    "bfloat16, float16 or float32 as --base"
                )
        sources = {key: key for key in entries} | {key: source for key, (source, _) in self.untied.items()}
        self.plan = {
            key: Entry(entries[source].shape, self._stored_as(key, entries[source].dtype))
            for key, source in sources.items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield everything that is written, by key on disk."""
        done: set[str] = set()
        for key in self.base.reader.entries:
            name = self._owner.get(key)
            if name is None:
                yield key, self._rounded(key, self.base.reader.read(key))
            elif name not in done:
                done.add(name)
                yield from self._merged(name, self.by_name[name])
        for key, (source, edit) in self.untied.items():
            weight = self.base.reader.read(source)
            yield key, self._rounded(key, weight if edit is None else edit.apply(weight))

    def write_config(self, out: Path) -> None:
        """Write the base's configuration; only what is no longer true is replaced."""
        path = self.base.directory / "config.json"
        if self._dtype is None and not self.separated:
            shutil.copyfile(path, out / path.name)
            return
        document = json.loads(path.read_text(encoding="utf-8"))
        parts = [
            document,
            *(document[key] for key in self.base.config.sub_configs if isinstance(document.get(key), dict)),
        ]
        for part in parts:
            if self._dtype is not None and (part is document or "dtype" in part or "torch_dtype" in part):
                part.pop("torch_dtype", None)
                part["dtype"] = str(self._dtype).removeprefix("torch.")
            if self.separated and (part is document or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
        (out / path.name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _settle_tie(self, name: str, other: str, untie: bool) -> None:
        """Decide what becomes of two names that share one tensor, when the adapter changes it under one of them."""
        ours, theirs = self.by_name.get(name), self.by_name.get(other)
        if ours is None and theirs is None:
            return
        if (ours and ours.follows) or (theirs and theirs.follows) or self._agree(name, ours, theirs):
            shared = theirs if theirs is not None and not theirs.follows else ours
            assert shared is not None
            self.by_name[name] = self.by_name[other] = shared  # one key as a rule, and both where both are stored
            return
        if not untie:
            changed = f"{name} and {other} differently" if ours and theirs else f"{other if theirs else name} alone"
            raise ValueError(
                f"the adapter changes {changed}, but {self.base.name} keeps {name} and {other} in one tensor, so that "
                "merging would change both. Pass --untie to write two tensors (a model with tie_word_embeddings: "
                "false), or train the adapter with PEFT's ensure_weight_tying"
            )
        self.separated = True
        stored = {*self.base.keys(name), *self.base.keys(other)}
        if len(stored) == 1:  # and not two tensors already, which only have to be told apart
            (key,) = stored
            missing = other if self.base.untied_key(name) == key else name
            self.untied[self.base.untied_key(missing)] = (key, self.by_name.pop(missing, None))

    def _agree(self, name: str, ours: Edit | None, theirs: Edit | None) -> bool:
        """Whether two edits of one tensor come to the same, but for the order of sums."""
        if ours is None or theirs is None:
            return False
        (key,) = self.base.keys(name)
        weight = self.base.reader.read(key)
        return torch.allclose(ours.apply(weight), theirs.apply(weight), rtol=1e-5, atol=1e-6)

    def _merged(self, name: str, edit: Edit) -> Iterator[tuple[str, Tensor]]:
        """Yield what becomes of one weight of the base, in as many pieces as it is stored in."""
        keys = self.base.keys(name)
        read = self.base.reader.read
        if len(keys) == 1 and self.base.reader.entries[keys[0]].shape == self.base.shapes[name]:
            yield keys[0], self._rounded(keys[0], edit.apply(read(keys[0])))
            return
        if edit.is_sum:
            for key, change in self.base.pieces(name, edit.total()).items():
                yield key, self._rounded(key, change.contiguous().add_(read(key)))
        elif edit.value is not None and not edit.changes:
            for key, piece in self.base.pieces(name, edit.apply(edit.value)).items():
                yield key, self._rounded(key, piece)
        else:
            raise ValueError(
                f"{self.base.name} stores {name} in pieces, into which DoRA, or the whole weights of several adapters, "
                "cannot be merged one by one; use PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()"
            )

    def _stored_as(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """Return the type that a tensor gets: a wider one than most of the base has is meant, and stays."""
        if self._dtype is None or dtype != self.base.dtype or key.endswith(_BALANCE_BIAS):
            return dtype
        return self._dtype

    def _rounded(self, key: str, tensor: Tensor) -> Tensor:
        """Return a tensor in its stored type.

        Raises:
            ValueError: It overflows there.
        """
        dtype = self.plan[key].dtype
        rounded = tensor.to(dtype)
        if dtype == torch.float16 and not torch.isfinite(rounded).all():
            raise ValueError(f"{key} overflows in float16 once merged; pass --dtype bfloat16 or float32")
        return rounded
