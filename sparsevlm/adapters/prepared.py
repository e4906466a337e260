"""What each type of adapter makes of its recipe section, for `attach` to put in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsevlm.adapters.quantise import Quantised


@dataclass(frozen=True)
class Prepared:
    """An adapter that fits a model.

    Attributes:
        config: PEFT's configuration.
        counts: Modules and stacked parameters that each target names.
        modules: Modules that are adapted.
        parameters: Stacked parameters that are adapted.
        quantised: What was quantised in the model before.
    """

    config: Any
    counts: dict[str, int]
    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    quantised: Quantised | None = None
