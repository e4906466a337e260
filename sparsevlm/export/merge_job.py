"""What one merging reads, what it makes of it, and the plan of what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparsevlm.export.merge_base import Base
from sparsevlm.export.merge_deltas import Edit, Edits
from sparsevlm.export.shards import Entry

if TYPE_CHECKING:
    from sparsevlm.adapters.quantise import Settings

_BALANCE_BIAS = "e_score_correction_bias"
"""Stays in float32, whatever the type of the weights: it moves in steps that 16 bits would lose."""


class Step(NamedTuple):
    """One tensor that is written.

    Attributes:
        key: Where to.
        source: Key of the base's tensor that it comes from.
        edit: What becomes of that; None: it stays.
    """

    key: str
    source: str
    edit: Edit | None


class Job:
    """One merging: what is read, what is made of it, and the plan of what is written.

    Attributes:
        edits: What changes.
        by_name: Name in the base -> what becomes of that weight, ties settled.
        dtype: Type of the result.
        plan: Key on disk -> shape and type, in the order of the base.
        separated: Two tied weights are two tensors now.
        settings: How the base was quantised when the adapter was trained, where it was.
        replayed: Keys of weights that changes are added to as training on quantised ones saw them -> their names.
        untied: Keys of them that the base does not hold -> the one that it holds, and what becomes of that.
        carried: Stored tensors that stay as they are.
    """

    def __init__(
        self,
        base: Base,
        edits: Edits,
        dtype: torch.dtype | None,
        untie: bool,
        settings: Settings | None = None,
        replay: bool = False,
    ) -> None:
        self.base, self.edits = base, edits
        self._dtype, self.dtype = dtype, dtype or base.dtype
        self.separated = False
        self.untied: dict[str, tuple[str, Edit | None]] = {}
        self.by_name = dict(edits.by_name)
        for name, other in base.tied.items():
            self._settle_tie(name, other, untie)
        self._keys = {name: base.keys(name) for name in self.by_name}
        self._owner = {key: name for name, keys in self._keys.items() for key in keys}
        entries = base.reader.entries
        self.settings = settings
        self.replayed: dict[str, str] = {}
        if replay and settings is not None:
            self.replayed = {self._stored_whole(name): name for name in settings.weights}
        self.carried = len(entries.keys() - self._owner.keys() - self.replayed.keys())
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

    def steps(self) -> Iterator[Step]:
        """Yield everything that is written, in the order of the base, one after another."""
        done: set[str] = set()
        for key in self.base.reader.entries:
            name = self._owner.get(key)
            if name is None:
                yield Step(key, key, None)
            elif name not in done:
                done.add(name)
                yield from self._pieces(name, self.by_name[name])
        for key, (source, edit) in self.untied.items():
            yield Step(key, source, edit)

    def tensor(self, step: Step) -> Tensor:
        """Return what is written for a step.

        Raises:
            ValueError: It overflows in its type.
        """
        weight = self.weight(step.source)
        return self.rounded(step.key, weight if step.edit is None else step.edit.apply(weight))

    def weight(self, key: str) -> Tensor:
        """Return a weight of the base that changes are added to: as stored, or as training on quantised ones saw it."""
        weight = self.base.reader.read(key)
        return self.replay(self.replayed[key], weight) if key in self.replayed else weight

    def replay(self, name: str, weight: Tensor) -> Tensor:
        """Quantise and dequantise a weight as for training, in float32."""
        from sparsevlm.adapters.quantise import replayed

        assert self.settings is not None
        return replayed(name, weight, self.settings)

    def _stored_whole(self, name: str) -> str:
        """Return the key of a weight that was quantised for training.

        Raises:
            ValueError: The base has it not, or in pieces.
        """
        keys = self.base.keys(name) if name in self.base.shapes else []
        if len(keys) != 1 or self.base.reader.entries[keys[0]].shape != self.base.shapes[name]:
            raise ValueError(
                f"{self.base.name} does not hold {name}, which was quantised for training, in one tensor; leave "
                "--replay-quantisation out"
            )
        return keys[0]

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
                f"false), or train the adapter with PEFT's ensure_weight_tying on both ({name.removesuffix('.weight')} "
                "in target_modules)"
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

    def _pieces(self, name: str, edit: Edit) -> Iterator[Step]:
        """Yield what becomes of one weight of the base, in as many pieces as it is stored in."""
        keys = self._keys[name]
        if len(keys) == 1 and self.base.reader.entries[keys[0]].shape == self.base.shapes[name]:
            yield Step(keys[0], keys[0], edit)
        elif edit.is_sum:
            for key, change in self.base.pieces(name, edit.total()).items():
                yield Step(key, key, Edit(shift=change.contiguous()))
        elif edit.value is not None and not edit.changes:
            for key, piece in self.base.pieces(name, edit.apply(edit.value)).items():
                yield Step(key, key, Edit(value=piece))
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

    def rounded(self, key: str, tensor: Tensor) -> Tensor:
        """Return a tensor in its stored type.

        Raises:
            ValueError: It overflows there.
        """
        dtype = self.plan[key].dtype
        rounded = tensor.to(dtype)
        if dtype == torch.float16 and not torch.isfinite(rounded).all():
            raise ValueError(f"{key} overflows in float16 once merged; pass --dtype bfloat16 or float32")
        return rounded
