"""From the names of a recipe's `targets` to modules and stacked parameters of a model.

A name is a part (`PARTS`) or a pattern: `q_proj` is every layer of that name, `model.language_model.layers.1.*`
whatever it matches (`*`, `?` and `[]` as in file names, over dots too).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsevlm.moe.block import SparseMoeBlock
from sparsevlm.registry import suggest
from sparsevlm.surgery import FUSION_MODULES, TEXT_TWIN, decoder_layers, in_fusion

PARTS: tuple[str, ...] = (
    "language", "language.attention", "language.ffn", "vision", "vision.attention", "vision.ffn", "connector",
    "fusion", "moe.experts", "moe.router",
)  # fmt: skip
"""Targets that are named by part. `language` and `vision` are attention and FFN of theirs together, without what a
fusion put into the layers: that is `fusion`."""

_ATTENTION = re.compile(r"(attn|attention)")
_TWIN = re.compile(rf"\.({TEXT_TWIN}|{FUSION_MODULES[1]})(?=\.|$)")
_LINEAR = (nn.Linear, Conv1D)
_KINDS = (*_LINEAR, nn.Conv2d, nn.Embedding)


class TargetError(ValueError):
    """A target that matches nothing.

    Attributes:
        target: As the recipe names it.
    """

    def __init__(self, target: str, message: str) -> None:
        super().__init__(message)
        self.target = target


@dataclass(frozen=True)
class Targets:
    """What an adapter is attached to.

    Attributes:
        modules: Names of modules, in the model's order.
        parameters: Names of parameters that belong to no linear layer: stacked experts, routers.
        counts: Modules and parameters that each target names, in the recipe's order.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    counts: dict[str, int]


def resolve_targets(model: Any, targets: Sequence[str], *, shared: bool = True) -> Targets:
    """Find what targets mean in a model, also on the meta device.

    Left out are what no gradient would reach: layers of the tower after the one whose features are taken, and its
    pooling head.

    Args:
        model: The model.
        targets: Parts and patterns.
        shared: `moe.experts` means the shared expert too.

    Raises:
        TargetError: A target matches nothing; the message has the nearest names.
    """
    modules = dict(_modules(model))  # name -> part, "" for what only patterns reach
    parameters = dict(_parameters(model))
    chosen: set[str] = set()
    counts = {}
    for target in targets:
        if target in PARTS:
            found = {name for name, part in (modules | parameters).items() if f"{part}.".startswith(f"{target}.")}
            found = found if shared else {name for name in found if modules.get(name) != "moe.experts"}
        else:
            found = {name for name in modules | parameters if _matches(name, target)}
        if not found:
            raise TargetError(target, _nothing(target, modules | parameters))
        counts[target] = len(found)
        chosen |= found
    return Targets(
        tuple(name for name in modules if name in chosen), tuple(name for name in parameters if name in chosen), counts
    )


def parts_of_model(model: Any) -> dict[str, str]:
    """Return the part of every module and stacked weight that can be adapted; "" for what only patterns reach."""
    return dict(_modules(model)) | dict(_parameters(model))


def _matches(name: str, pattern: str) -> bool:
    names = {name, _TWIN.sub("", name)}  # a layer that has a twin for visual tokens, and the twin, go by its name too
    return any(fnmatchcase(known, pattern) or fnmatchcase(known, f"*.{pattern}") for known in names)


def _nothing(target: str, known: dict[str, str]) -> str:
    """Say that a target matches nothing, and what would."""
    parts = sorted({part for part in known.values() if part})
    layers = sorted({name.rpartition(".")[2] for name in known if not name.rpartition(".")[2].isdecimal()})
    if target in PARTS:
        reason = {"moe": "the model has no MoE layers", "vision": "the tower has no linear layers"}
        what = reason.get(target.split(".")[0], "the model has nothing of that part")
        return f"target {target!r} matches nothing: {what} (it has {', '.join(parts)})"
    near = suggest(target, [*PARTS, *layers, *known])
    there = f"parts of this model: {', '.join(parts)}; layers: {', '.join(layers)}"
    return f"target {target!r} matches nothing{near or ''}{' (' if near else '; '}{there}{')' if near else ''}"


def _modules(model: Any) -> Iterator[tuple[str, str]]:
    """Yield every module that can be adapted with the part it belongs to."""
    names = {id(module): name for name, module in model.named_modules()}
    sparse = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SparseMoeBlock))
    language = f"{names[id(decoder_layers(model.model.language_model))]}."
    towers = _towers(model, names)
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS):
            continue
        linear = isinstance(module, _LINEAR)
        if name.startswith("model.vision_tower."):
            place = _in_tower(name, towers)
            if place is not None:
                yield name, f"vision.{_half(place)}" if linear and place else ""
        elif in_fusion(name):
            yield name, "fusion"
        elif name.startswith("model.connector."):
            yield name, "connector" if linear else ""
        elif block := next((prefix for prefix in sparse if name.startswith(prefix)), None):
            shared = name.removeprefix(block).startswith("shared_expert.")
            yield name, "moe.experts" if shared else "moe.router"
        elif name.startswith(language) and linear:
            yield name, f"language.{_half(name.removeprefix(language))}"
        else:
            yield name, ""


def _half(name: str) -> str:
    return "attention" if _ATTENTION.search(name) else "ffn"


class _Tower(NamedTuple):
    """A tower by names.

    Attributes:
        prefix: Of its modules.
        layers: Of the modules in its layers; None for a tower without a list of them.
        used: How many of them are used.
    """

    prefix: str
    layers: str | None
    used: int


def _towers(model: Any, names: dict[int, str]) -> list[_Tower]:
    """Return the tower, or those that stand side by side."""
    from sparsevlm.vision.side_by_side import each_tower  # a model of transformers: brings in all that is registered

    found = []
    for tower, chosen in each_tower(model.model.vision_tower, model.config.vision_feature_layer):
        prefix = f"{names[id(tower)]}."
        try:
            layers = decoder_layers(tower)
        except ValueError:  # convolutional networks and the like: every module counts
            found.append(_Tower(prefix, None, 0))
            continue
        # state 0 is before the layers
        used = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in chosen)
        found.append(_Tower(prefix, f"{names[id(layers)]}.", used))
    return found


def _in_tower(name: str, towers: list[_Tower]) -> str | None:
    """Return a tower module's name within its layer; empty before the layers, None where its output is not used."""
    tower = next((tower for tower in towers if name.startswith(tower.prefix)), None)
    if tower is None:
        return None
    _, prefix, used = tower
    if prefix is None:
        return name.removeprefix(tower.prefix)
    if not name.startswith(prefix):
        return "" if "embed" in name else None
    index, _, inner = name.removeprefix(prefix).partition(".")
    return inner if int(index) < used else None


def _parameters(model: Any) -> Iterator[tuple[str, str]]:
    """Yield stacked weights of experts and the weights of routers, which are no linear layers."""
    for prefix, module in model.named_modules():
        if isinstance(module, SparseMoeBlock):
            if hasattr(module.gate, "weight"):  # not where modality decides
                yield f"{prefix}.gate.weight", "moe.router"
            for name, parameter in module.experts.named_parameters():
                if len(getattr(parameter, "ds_shape", parameter.shape)) == 3:  # of a shard, the whole's
                    yield f"{prefix}.experts.{name}", "moe.experts"
