"""Where mixture-of-modality adapters go: attentions of the language model and of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsevlm.adapters.mma.config import MmaConfig
from sparsevlm.adapters.mma.layer import Source
from sparsevlm.adapters.passes import find_parts
from sparsevlm.surgery import LayerChoice, decoder_layers, resolve_layers
from sparsevlm.vision.side_by_side_config import ITS_LAYER

ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
"""Names that transformers gives a layer's attention."""


@dataclass(frozen=True)
class Place:
    """One attention to adapt.

    Attributes:
        dim: Width of its input.
        source: What its router reads.
        holds_modality: Whether the modality embedding is kept there.
    """

    dim: int
    source: Source
    holds_modality: bool = False


def find_places(model: nn.Module, config: MmaConfig) -> dict[str, Place]:
    """Return the attentions that a config adapts: path -> place.

    Raises:
        ValueError: A part that layers are named of is missing or there twice, a layer does not exist or its output is
            unused, a layer has no attention, or nothing is left to adapt.
    """
    language, vision = find_parts(model)
    places: dict[str, Place] = {}
    for field, choice, parts in (
        ("layers", config.layers, language),
        ("vision_layers", config.vision_layers, vision),
    ):
        if choice is None or (not parts and choice == "all"):
            continue
        if len(parts) != 1:
            raise ValueError(
                f"mma: {field}={choice!r} needs one part to adapt, but {type(model).__name__} has {len(parts)} "
                f"({', '.join(parts) or 'none'}); set {field}=None or pass the part itself"
            )
        path, part = next(iter(parts.items()))
        if field == "layers":
            source: Source = "token" if config.routing == "token" else "modality"
            chosen = _attentions(path, part, choice, part.config.num_hidden_layers, field)
            hold = source == "modality"
            places |= {name: Place(part.config.hidden_size, source, hold and i == 0) for i, name in enumerate(chosen)}
        else:
            source = "token" if config.routing == "token" else "first"
            chosen = _attentions(path, part, choice, used_layers(model, part), field)
            places |= {name: Place(part.config.hidden_size, source) for name in chosen}
    if not places:
        raise ValueError(
            f"mma: nothing to adapt in {type(model).__name__}: it has {len(language)} language models and "
            f"{len(vision)} vision towers of transformers, layers={config.layers!r}, "
            f"vision_layers={config.vision_layers!r}"
        )
    return places


def used_layers(model: Any, tower: Any) -> int:
    """Return how many layers of a tower the model reads, from its ``vision_feature_layer``."""
    total = getattr(tower.config, "num_hidden_layers", 0)
    own = getattr(tower.config, ITS_LAYER, None)  # of a tower among several
    chosen = getattr(getattr(model, "config", None), "vision_feature_layer", None) if own is None else own
    if chosen is None:
        return total
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    return max(layer if layer >= 0 else total + 1 + layer for layer in chosen)  # hidden_states[0]: the embeddings


def _attentions(path: str, part: nn.Module, choice: LayerChoice, used: int, field: str) -> list[str]:
    """Return the paths of the chosen layers' attentions, lowest layer first."""
    try:
        layers = decoder_layers(part)
        indices = resolve_layers(choice, used)
    except ValueError as error:
        raise ValueError(
            f"mma: {field}={choice!r} does not fit {type(part).__name__}, of which {used} layers are read: {error}. "
            f"Set {field}=None to leave it as it is"
        ) from error
    start = next(name for name, module in part.named_modules() if module is layers)
    found = []
    for index in indices:
        children = [name for name, _ in layers[index].named_children()]
        names = [name for name in ATTENTIONS if name in children]
        if len(names) != 1:
            raise ValueError(
                f"mma: layer {index} of {type(part).__name__} has no attention named {' or '.join(ATTENTIONS)} "
                f"(it has {children}); name the layers to adapt in {field}"
            )
        found.append(".".join(filter(None, [path, start, str(index), names[0]])))
    return found
