"""`scenes`: the synthetic pictures and clips that the package makes on the fly (`path: sparsevlm:scenes`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from sparsevlm.data.formats import DataFormat, RowContext
from sparsevlm.data.sample import Sample
from sparsevlm.data.scenes import KINDS, scene_sample
from sparsevlm.recipe.schema import Source
from sparsevlm.registry import DATA_FORMATS

PATH = "sparsevlm:scenes"


@DATA_FORMATS.register("scenes")
class ScenesFormat(DataFormat):
    """Rows are numbers; each becomes a conversation about one seeded scene. `split` of the source chooses the scenes.

    Options:
        n: Number of rows.
        kinds: Kinds of questions, in equal shares; default: all.
        captions: Share of rows that ask for a description instead.
        turns: Most questions a row, all about the same scene.
        seed: Another seed, other scenes.
    """

    defaults: ClassVar[dict[str, Any]] = {"n": 20_000, "kinds": None, "captions": 0.0, "turns": 1, "seed": 0}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        kinds = self.options["kinds"]
        if kinds is not None and (not isinstance(kinds, list) or not kinds or not set(kinds) <= set(KINDS)):
            raise ValueError(f"scenes: kinds must be a list out of {', '.join(KINDS)}; got {kinds!r}")
        if not 0 <= self.options["captions"] <= 1:
            raise ValueError(f"scenes: captions is a share between 0 and 1, got {self.options['captions']!r}")
        for name in ("n", "turns"):
            if not isinstance(self.options[name], int) or self.options[name] < 1:
                raise ValueError(f"scenes: {name} must be a whole number from 1 on, got {self.options[name]!r}")
        self.split = "train"

    def rows(self, source: Source, base_dir: Path | None = None) -> Sequence[int]:
        """Return the row numbers; nothing is read."""
        if source.path != PATH:
            raise ValueError(f"format scenes makes its own records: path must be {PATH!r}, got {source.path!r}")
        self.split = source.split
        scene_sample(self.split, 0)  # names an unknown split before training starts
        return range(self.options["n"])

    def sample(self, row: int, context: RowContext) -> Sample:
        """Draw the scene of a row and ask about it."""
        share, seed = self.options["captions"], self.options["seed"]
        captions_before = int(row * share)
        if int((row + 1) * share) > captions_before:
            made = scene_sample(self.split, captions_before, seed, ["caption"])
        else:
            # Counted without the caption rows: kinds are taken in turn, and must not fall into step with captions.
            made = scene_sample(self.split, row - captions_before, seed, self.options["kinds"], self.options["turns"])
        return replace(context.make(made.messages, made.meta), where=made.where)
