"""Context variables of a forward pass, carried into the recomputation of its layers.

What holds for one forward pass (which tokens are padding, which are visual) lives in a context variable for that long.
transformers recomputes a checkpointed layer by calling its `forward` again, without the hooks around it and, on GPUs,
in another thread, where the variable is not set. So the function that recomputes carries the values that its own
forward pass saw. Whoever sets such a variable calls `carry_to_recomputation` first, where gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn

_CARRIED: list[ContextVar[Any]] = []
_PLAINLY: ContextVar[bool] = ContextVar("sparsevlm_run_plainly", default=False)


def carried(name: str) -> ContextVar[Any]:
    """Return a new context variable, None at first, that recomputations see as their forward pass did."""
    variable: ContextVar[Any] = ContextVar(name, default=None)
    _CARRIED.append(variable)  # kept here and not by the functions: models are copied, variables cannot be
    return variable


@contextmanager
def setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Set a variable for the length of a block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def not_recomputed() -> Iterator[None]:
    """Keep the activations of the layers that run inside, where they are few or must not run twice."""
    with setting(_PLAINLY, True):
        yield


def carry_to_recomputation(model: nn.Module, what: str, remedy: str) -> list[Any]:
    """Wrap the functions by which a model's layers are checkpointed, wherever they were set, once.

    Args:
        model: It or modules around it may have had gradient checkpointing turned on.
        what: What a recomputation could not know otherwise, for the message.
        remedy: What to do instead.

    Returns:
        The checkpointing functions as transformers set them.

    Raises:
        ValueError: Layers are checkpointed from outside, where nothing can be handed to the recomputation.
    """
    # Not at import: our Auto classes are registered while transformers is importing this module.
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers and getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            f"the layers of {type(model).__name__} are no GradientCheckpointingLayer of transformers, so their "
            f"recomputation cannot know {what}: turn gradient checkpointing off, or {remedy}"
        )
    functions = []
    for layer in layers:
        if not layer.gradient_checkpointing:
            continue
        function = layer._gradient_checkpointing_func
        if not isinstance(function, _Carrying):
            function = layer._gradient_checkpointing_func = _Carrying(function)
        functions.append(function.checkpoint)
    return functions


class _Carrying:
    """A checkpointing function whose recomputations see the values that the forward pass saw."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _PLAINLY.get():
            return function(*args)
        values = [(variable, variable.get()) for variable in _CARRIED]
        return self.checkpoint(partial(_with_values, values, function), *args, **kwargs)


def _with_values(
    values: list[tuple[ContextVar[Any], Any]], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a function with variables set."""
    with ExitStack() as stack:
        for variable, value in values:
            stack.enter_context(setting(variable, value))
        return function(*args, **kwargs)
