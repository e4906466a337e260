"""Settings of LoRA sets that are chosen per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peft import PeftConfig

PARTIAL, SLICE = "PARTIAL_LORA", "SLICE_LORA"
"""Names in PEFT's tables and in ``adapter_config.json``: one method under the names of its two uses."""

Choose = Literal["visual", "image", "video", "slice"]
Part = Literal["language", "vision"]


@dataclass
class TokenLoraConfig(PeftConfig):
    """Settings of LoRA sets that are chosen per token.

    Args:
        r: Rank.
        alpha: The addition is multiplied by ``alpha / r``.
        dropout: Dropout on the input of the addition, while training.
        choose: Which tokens pass a set. In the language model: ``visual`` placeholders, or only those of ``image`` or
            of ``video``; there is one set. In the vision tower: ``slice``, a set for each position of a frame in its
            picture or video.
        sets: Sets of ``slice``; the frame at position p passes set ``p % sets``.
        whole: Whether a whole picture (the global view of one that is cut up) passes a set of its ``own``, after the
            others, or ``none``. With ``slice`` only.
        target_modules: Names as in PEFT's `LoraConfig`; they are looked for in the part that `choose` is about.
        exclude_modules: Names that are left out.
        modules_to_save: Further modules that train in full and are saved with the adapter (the connector).

    Raises:
        ValueError: A value out of its range.
    """

    r: int = 256
    alpha: float = 256
    dropout: float = 0.05
    choose: Choose = "visual"
    sets: int = 1
    whole: Literal["own", "none"] = "own"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SLICE if self.choose == "slice" else PARTIAL  # type: ignore[assignment]  # PEFT's enum is closed; a plain string is as good a key
        sliced = self.choose == "slice"
        wrong = [
            f"{name} is {getattr(self, name)!r}, expected {expected}"
            for name, expected, right in (
                ("r", "1 or more", self.r >= 1),
                ("alpha", "more than 0", self.alpha > 0),
                ("dropout", "at least 0 and less than 1", 0 <= self.dropout < 1),
                ("choose", "visual, image, video or slice", self.choose in ("visual", "image", "video", "slice")),
                (
                    "sets",
                    "1 or more" if sliced else "1 (choose='slice' has more)",
                    self.sets >= 1 if sliced else self.sets == 1,
                ),
                ("whole", "own or none", self.whole in ("own", "none")),
            )
            if not right
        ]
        if wrong:
            raise ValueError("TokenLoraConfig: " + "; ".join(wrong))

    @property
    def part(self) -> Part:
        """Part of the model whose layers are adapted."""
        return "vision" if self.choose == "slice" else "language"

    @property
    def total_sets(self) -> int:
        """Sets of a layer."""
        return self.sets + (self.choose == "slice" and self.whole == "own")
