"""Which LoRA set each token or frame passes, for the length of one forward pass.

It lives in a context variable, since it is a property of the forward pass and not of the model (see `recompute`).

Legend: B rows, T tokens a row, F frames, U units: B * T tokens of the language model, or F frames of the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsevlm.adapters.token_lora.config import Part, TokenLoraConfig
from sparsevlm.recompute import carried, setting
from sparsevlm.vision.frames import WHOLE

NONE = -1
"""Set of a token or frame that passes none."""

_REMEDY = "say it: with sparsevlm.adapters.token_lora.use_sets(…)"


class Picked(NamedTuple):
    """The units that pass a set, set after set.

    Attributes:
        index: ``(n,)`` their places among the U.
        sizes: How many of them pass each set.
    """

    index: Tensor
    sizes: list[int]


class Sets:
    """The set of each unit of one forward pass.

    Args:
        shape: ``(B, T)`` tokens or ``(F,)`` frames.
        chosen: Settings of an adapter -> the set of each unit, `NONE` for none; of `shape`.
        owner: The module whose forward pass it is.
    """

    def __init__(
        self, shape: Sequence[int], chosen: Callable[[TokenLoraConfig], Tensor], owner: nn.Module | None = None
    ) -> None:
        self.shape, self.owner = tuple(shape), owner
        self._chosen = chosen
        self._picked: dict[Any, Picked] = {}

    def pick(self, config: TokenLoraConfig, device: torch.device) -> Picked:
        """Return the units that pass the sets of an adapter; worked out once a forward pass."""
        key = (config.choose, config.sets, config.whole, device)
        if key not in self._picked:
            sets = self._chosen(config).reshape(-1)  # (U,)
            each = [(sets == i).nonzero().squeeze(-1) for i in range(config.total_sets)]
            self._picked[key] = Picked(torch.cat(each).to(device), [len(units) for units in each])
        return self._picked[key]


_RUNNING: dict[Part, ContextVar[Sets | None]] = {
    "language": carried("sparsevlm_token_sets"),
    "vision": carried("sparsevlm_frame_sets"),
}


def running(part: Part) -> Sets | None:
    """Return the sets of the part's forward pass that runs."""
    return _RUNNING[part].get()


def set_running(part: Part, sets: Sets | None) -> None:
    """Start a forward pass, or end it with None."""
    _RUNNING[part].set(sets)


def current_sets(part: Part, layer: str) -> Sets:
    """Return the sets of the forward pass that runs.

    Raises:
        ValueError: None does.
    """
    sets = running(part)
    if sets is None:
        unit = "tokens are visual" if part == "language" else "slices its frames are"
        raise ValueError(
            f"token_lora: {layer} runs outside a forward pass of its model, so it is unknown which {unit}. Call the "
            f"model, not its layers, or {_REMEDY}; and checkpoint layers with model.gradient_checkpointing_enable(), "
            "since what wraps them from outside recomputes them without it"
        )
    return sets


@contextmanager
def use_sets(tokens: Tensor | None = None, frames: Tensor | None = None) -> Iterator[None]:
    """Say the sets of the forward passes inside, where the inputs do not tell, or others than they do.

    Args:
        tokens: ``(B, T)`` set of each token of the language model: 0, or -1 for none.
        frames: ``(F,)`` set of each frame of the tower, or -1 for none.
    """
    given: dict[Part, Tensor | None] = {"language": tokens, "vision": frames}
    with ExitStack() as stack:
        for part, ids in given.items():
            if ids is not None:
                stack.enter_context(setting(_RUNNING[part], Sets(ids.shape, _checked(ids))))
        yield


def _checked(ids: Tensor) -> Callable[[TokenLoraConfig], Tensor]:
    """Return given sets for the adapters that have them."""

    def chosen(config: TokenLoraConfig) -> Tensor:
        if ids.numel() and not (int(ids.min()) >= NONE and int(ids.max()) < config.total_sets):
            raise ValueError(
                f"token_lora: use_sets got sets {ids.unique().tolist()}; the adapter has {config.total_sets}, so each "
                f"is {NONE} (none) to {config.total_sets - 1}"
            )
        return ids

    return chosen


def token_sets(module: nn.Module, inputs: Mapping[str, Any]) -> Sets:
    """Return the sets of a model's tokens, from its placeholders.

    Args:
        module: Model that the inputs are for; its config names the placeholders.
        inputs: By name.

    Raises:
        ValueError: The inputs do not tell.
    """
    input_ids = inputs.get("input_ids")
    config = getattr(module, "config", None)
    names = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}
    ids = {
        kind: {getattr(config, name) for name in each if getattr(config, name, None) is not None}
        for kind, each in names.items()
    }
    if input_ids is None or not (ids["image"] or ids["video"]):
        why = "inputs_embeds instead of input_ids" if input_ids is None else "a config that names no image_token_id"
        raise ValueError(f"token_lora: which tokens are visual cannot be told from {why}; {_REMEDY}")

    def chosen(settings: TokenLoraConfig) -> Tensor:
        wanted = ids["image"] | ids["video"] if settings.choose == "visual" else ids[settings.choose]
        passes = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in wanted:
            passes = passes | (input_ids == token)
        return torch.where(passes, 0, NONE)

    return Sets(input_ids.shape, chosen, module)


def frame_sets(module: nn.Module, positions: Sequence[int] | None, frames: int) -> Sets:
    """Return the sets of a tower's frames, from where they are in their pictures.

    Args:
        module: The tower.
        positions: As `vision.frames.frame_positions` has them.
        frames: F, as the tower sees it.

    Raises:
        ValueError: The positions are unknown, or those of other frames.
    """
    if positions is None or len(positions) != frames:
        known = "unknown" if positions is None else f"known for {len(positions)} frames"
        raise ValueError(
            f"token_lora: {type(module).__name__} runs on {frames} frames, and where they are in their pictures is "
            f"{known}; call the whole model, or {_REMEDY}"
        )

    def chosen(settings: TokenLoraConfig) -> Tensor:
        whole = settings.sets if settings.whole == "own" else NONE
        return torch.tensor([whole if p == WHOLE else p % settings.sets for p in positions], dtype=torch.long)

    return Sets((frames,), chosen, module)
