"""Which modality each token's sample has, for the length of one forward pass.

It lives in a context variable, since it is a property of the forward pass and not of the model (see `recompute`).

Legend: B rows, T tokens a row, P paths, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsevlm.recompute import carried, carry_to_recomputation, not_recomputed, setting

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Modality of a sample without media, with pictures, with video (the last counts as a picture where M is 2)."""


@dataclass(frozen=True)
class ModalityRouting:
    """Mixing weights of one forward pass.

    Attributes:
        ids: ``(B, T)`` modality of each token's sample; None while the weights are being collected.
        weights: Layer -> ``(M, P)``.
        owner: The module whose forward pass it is.
    """

    ids: Tensor | None
    weights: dict[str, Tensor] = field(default_factory=dict)
    owner: nn.Module | None = None

    @property
    def collecting(self) -> bool:
        """Whether the rows that run are the modalities themselves."""
        return self.ids is None

    def record(self, layer: str, weights: Tensor) -> None:
        """Keep a layer's weights, ``(M, P)``."""
        assert layer not in self.weights, f"{layer} ran twice"
        self.weights[layer] = weights

    def mix(self, layer: str, shape: torch.Size) -> Tensor:
        """Return the weights of each token, ``(B, T, P)``."""
        assert self.ids is not None
        if self.ids.shape != shape:
            raise ValueError(
                f"mma: {layer} runs on {tuple(shape)} tokens, but the modalities were given for {tuple(self.ids.shape)}"
            )
        weights = self.weights[layer]
        return weights[self.ids.to(weights.device)]


_ROUTING: ContextVar[ModalityRouting | None] = carried("sparsevlm_mma_routing")
_GIVEN: ContextVar[Tensor | None] = ContextVar("sparsevlm_mma_given", default=None)


@contextmanager
def use_modality(ids: Tensor) -> Iterator[None]:
    """Say the modality of each sample of the forward passes inside, where the inputs do not tell.

    Args:
        ids: ``(B,)`` or, for packed rows, ``(B, T)``; 0 text, 1 image, ….
    """
    with setting(_GIVEN, ids):
        yield


def given_modality() -> Tensor | None:
    """Return what `use_modality` says."""
    return _GIVEN.get()


def running() -> ModalityRouting | None:
    """Return the weights of the forward pass that runs."""
    return _ROUTING.get()


def set_running(routing: ModalityRouting | None) -> None:
    """Start a forward pass, or end it with None."""
    _ROUTING.set(routing)


def current_routing(layer: str) -> ModalityRouting:
    """Return the weights of the forward pass that runs.

    Raises:
        ValueError: None does.
    """
    routing = _ROUTING.get()
    if routing is None:
        raise ValueError(
            f"mma: {layer} runs outside a forward pass of its model, so the samples' modality is unknown. Call the "
            "model, not its layers; and checkpoint layers with model.gradient_checkpointing_enable(), since what wraps "
            "them from outside recomputes them without it"
        )
    return routing


@contextmanager
def collecting() -> Iterator[Mapping[str, Tensor]]:
    """Collect each layer's weights while the modalities themselves, M tokens, run through the decoder."""
    routing = ModalityRouting(ids=None)
    with not_recomputed(), setting(_ROUTING, routing):
        yield routing.weights


def carry_weights(decoder: nn.Module) -> None:
    """Have the recomputations of a decoder's layers see the weights of their forward pass.

    Raises:
        ValueError: Layers are recomputed in a way that the weights cannot travel to.
    """
    functions = carry_to_recomputation(decoder, "the samples' modality", "use an mma adapter with routing='token'")
    if any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions):
        raise ValueError(
            "mma: reentrant gradient checkpointing would run the modalities' graph backward once a layer; use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
