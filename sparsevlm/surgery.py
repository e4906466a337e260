"""Find a language model's decoder layers and put other modules in their place.

The one place that knows how decoders are laid out. What is put in must be declared in the config and rebuilt in
`__init__`; context for it travels through layer kwargs, never on modules (recomputation would read the wrong one).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

LayerChoice = str | Sequence[int]
"""A word for a set of layers, or their indices."""

FUSION_MODULES = ("gated_cross_attn", "visual_expert")
"""Names of the submodules that a fusion adds to decoder layers."""

TEXT_TWIN = "text_expert"
"""Name that a module of the language model has beside its twin for visual tokens."""

_FUSION = re.compile(rf"(^|\.)({'|'.join(FUSION_MODULES)})(\.|$)")


def in_fusion(name: str) -> bool:
    """Tell by its name whether a module or parameter is what a fusion added to a decoder layer."""
    return _FUSION.search(name) is not None


def decoder_layers(language_model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers of a transformers language model (with or without a head).

    Args:
        language_model: Any `PreTrainedModel` decoder: its `config.num_hidden_layers` tells the list from others.

    Raises:
        ValueError: No module list, or more than one, has as many entries as the config has layers.
    """
    config = getattr(language_model, "config", None)
    wanted = getattr(config, "num_hidden_layers", None)
    lists = {name: module for name, module in language_model.named_modules() if isinstance(module, nn.ModuleList)}
    depth = min((name.count(".") for name, module in lists.items() if len(module) == wanted), default=0)
    found = [name for name, module in lists.items() if len(module) == wanted and name.count(".") == depth]
    if len(found) != 1:
        sizes = {name: len(module) for name, module in lists.items() if name.count(".") <= 2}
        raise ValueError(
            f"cannot tell the decoder layers of {type(language_model).__name__}: expected one module list of "
            f"config.num_hidden_layers={wanted} entries, found {sizes}"
        )
    return lists[found[0]]


def resolve_layers(choice: LayerChoice, num_layers: int) -> list[int]:
    """Turn a recipe's layer choice into ascending indices.

    Args:
        choice: ``"alternate"`` (0, 2, 4, …, MoE-LLaVA's *sparse*), ``"all"``, ``"first_half"`` (0 … L//2 - 1),
            ``"second_half"`` (L//2 … L - 1), or the indices themselves.
        num_layers: L, decoder layers of the model.

    Raises:
        ValueError: Unknown word, no layer at all, an index twice or outside ``0 … L - 1``.
    """
    named = {
        "alternate": range(0, num_layers, 2),
        "all": range(num_layers),
        "first_half": range(num_layers // 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    if isinstance(choice, str):
        if choice not in named:
            raise ValueError(f"unknown layer choice {choice!r}; it is one of {', '.join(named)} or a list of indices")
        indices = list(named[choice])
    else:
        indices = sorted(choice)
        wrong = [i for i in indices if not 0 <= i < num_layers]
        if wrong or len(set(indices)) != len(indices):
            raise ValueError(
                f"layers {list(choice)}: each index must be between 0 and {num_layers - 1} and named once "
                f"(the model has {num_layers} decoder layers)"
            )
    if not indices:
        raise ValueError(f"layer choice {choice!r} names no layer of a model with {num_layers} decoder layers")
    return indices


def replace_submodules(
    layers: nn.ModuleList,
    indices: Sequence[int],
    factory: Callable[[int, nn.Module], nn.Module],
    name: str = "mlp",
) -> None:
    """Replace the submodule ``name`` of chosen layers, in place.

    Args:
        layers: Decoder layers.
        indices: Which of them.
        factory: ``(index, old module) -> new module``.
        name: Attribute of the layer.

    Raises:
        ValueError: A layer has no such submodule; the message lists what it has. Nothing is replaced then.
    """
    for index in indices:
        if not isinstance(getattr(layers[index], name, None), nn.Module):
            children = [child for child, _ in layers[index].named_children()]
            raise ValueError(
                f"decoder layer {index} ({type(layers[index]).__name__}) has no submodule {name!r}; it has {children}"
            )
    for index in indices:
        setattr(layers[index], name, factory(index, getattr(layers[index], name)))


def prepend_to_layers(
    layers: nn.ModuleList,
    indices: Sequence[int],
    name: str,
    factory: Callable[[int, nn.Module], nn.Module],
) -> None:
    """Run a further module before chosen layers, in place; the layers keep their class and their names.

    The module is the layer's submodule ``name`` and maps the hidden states that the layer would get to those that it
    gets. It runs outside the layer's `forward`, so recomputing the layer does not run it again.

    Args:
        layers: Decoder layers.
        indices: Which of them.
        name: Attribute of the layer that the module becomes.
        factory: ``(index, layer) -> module``.

    Raises:
        ValueError: A layer has an attribute of that name.
    """
    for index in indices:
        if hasattr(layers[index], name):
            raise ValueError(f"decoder layer {index} ({type(layers[index]).__name__}) already has {name!r}")
    for index in indices:
        layers[index].add_module(name, factory(index, layers[index]))
        layers[index].register_forward_pre_hook(partial(_run_before, name), with_kwargs=True)


def _run_before(
    name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run a layer's submodule on the hidden states that the layer is called with."""
    before = getattr(layer, name)
    if args:
        return (before(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": before(kwargs["hidden_states"])}
