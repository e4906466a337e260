"""Questions about the package's own synthetic scenes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from sparsevlm.data.sample import Sample
from sparsevlm.data.scenes import QUESTION_KINDS, SPLITS, scene_sample
from sparsevlm.eval.base import EvalTask, Example, as_question
from sparsevlm.eval.metrics import Reference
from sparsevlm.registry import EVAL_TASKS, suggest

if TYPE_CHECKING:
    from sparsevlm.recipe.schema import Eval

SCENES_PATH = "sparsevlm:scenes"


@EVAL_TASKS.register("scenes")
class ScenesTask(EvalTask):
    """Questions about scenes that no training split contains, scored by exact match."""

    split: str = "test"
    """Which scenes."""
    n: int = Field(default=1000, ge=1)
    """Questions; the kinds take turns, so each gets an equal share."""
    kinds: list[str] | None = Field(default=None, min_length=1)
    """Kinds of questions; default: all."""
    seed: int = 0
    """Another seed asks about other scenes of the split."""

    @field_validator("split")
    @classmethod
    def _known_split(cls, split: str) -> str:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}{suggest(split, list(SPLITS))} (known: {', '.join(SPLITS)})")
        return split

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: list[str] | None) -> list[str] | None:
        for kind in kinds or ():
            if kind not in QUESTION_KINDS:
                known = list(QUESTION_KINDS)
                raise ValueError(f"unknown kind {kind!r}{suggest(kind, known)} (known: {', '.join(known)})")
        return kinds

    def examples(self, spec: Eval, base_dir: Path) -> list[Example]:
        """Draw the scenes; see `EvalTask.examples`."""
        if spec.path != SCENES_PATH:
            raise ValueError(
                f"evaluation task 'scenes' makes its own pictures: its path is {SCENES_PATH!r}, got {spec.path!r}"
            )
        count = min(self.n, spec.limit or self.n)
        return [self._example(scene_sample(self.split, i, self.seed, self.kinds)) for i in range(count)]

    def _example(self, sample: Sample) -> Example:
        reference = Reference(tuple(sample.meta["answers"]))
        return Example(as_question(sample), sample.meta["kind"], reference, core=sample.meta["core"])
