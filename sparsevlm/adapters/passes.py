"""Forward passes of a model's parts, for adapters whose layers must know what runs: hooks around them, their inputs.

Hooks go on every transformers model from the whole down to the part: whichever is called first sees the most.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn


def find_parts(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the language models without head, and the vision towers, of a model: path -> module."""
    # At import it would cost `import sparsevlm` a second.
    from transformers import PreTrainedModel

    language: dict[str, Any] = {}
    vision: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or any(
            path == done or path.startswith(f"{done}." if done else "") for done in (*language, *vision)
        ):
            continue
        if any(hasattr(module.config, name) for name in ("vision_config", "text_config", "towers")):
            continue  # made of several: its parts come later in the walk
        if module.main_input_name == "pixel_values":
            vision[path] = module
        elif module.main_input_name == "input_ids" and module.base_model is module:
            language[path] = module
    return language, vision


def models_to(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """Yield the transformers models from a model down to a part of it, each with the path that is left.

    Plain modules are passed over: what they are called with need not be what the part in them sees.
    """
    from transformers import PreTrainedModel

    steps = path.split(".") if path else []
    for n in range(len(steps) + 1):
        module = model.get_submodule(".".join(steps[:n]))
        if isinstance(module, PreTrainedModel):
            yield module, ".".join(steps[n:])


def add_hooks(module: nn.Module, start: Callable[..., None], end: Callable[..., None]) -> None:
    """Have a module call ``start`` before and ``end`` after its forward pass, also after an error, once a kind."""
    if not any(type(hook) is type(start) for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(start, with_kwargs=True)
        module.register_forward_hook(end, always_call=True)


def remove_hooks(model: nn.Module, belongs: Callable[[Any], bool]) -> None:
    """Take off what `add_hooks` put on."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if belongs(hook)]:
                hooks.pop(key)
                for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                    flags.pop(key, None)


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a module's forward pass by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs}
