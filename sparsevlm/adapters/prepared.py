"""What each type of adapter makes of its recipe section, for `attach` to put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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
        finish: Called when PEFT's layers are in place, with the model and the start that `attach` was given.
    """

    config: Any
    counts: dict[str, int]
    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    quantised: Quantised | None = None
    finish: Callable[[Any, Mapping[str, Tensor] | None], None] | None = None
