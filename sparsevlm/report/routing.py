"""Routing as arrays: live, from the lines of metrics.jsonl, and of a finished stage, from routing.json.

Legend: T log lines, L MoE layers, E experts, k experts a token, h x w patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
MODALITIES = ("all", "text", "image", "video")
"""The order in which they are shown."""
MEASURES = ("max_violation", "dead_experts", "dropped_share", "similarity", "logit_rms")
"""One number a layer."""
MOE, LORA_EXPERTS = "moe", "lora_experts"
"""Groups of routers, as files name them: MoE layers, and the LoRA experts of an adapter."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LiveRouting:
    """Routing while training. Numbers that a line lacks are NaN.

    Attributes:
        steps: ``(T,)``.
        layers: ``(L,)`` decoder layers.
        balance: ``(T,)`` the number of the progress line: 1 healthy, near k/E collapsed.
        load: Modality -> ``(T, L, E)`` shares of the assignments.
        entropy: Modality -> ``(T, L)``.
        measures: Name out of `MEASURES` -> ``(T, L)``.
        losses: ``aux_loss`` and its like -> ``(T,)``.
    """

    steps: Array
    layers: list[int]
    balance: Array
    load: dict[str, Array]
    entropy: dict[str, Array]
    measures: dict[str, Array]
    losses: dict[str, Array]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.load["all"].shape[-1]


@dataclass(frozen=True)
class Picture:
    """A picture and where its patches went.

    Attributes:
        file: The PNG; None where it is missing.
        text: What was asked about it.
        grid: h, w.
        experts: ``(L, h, w)`` first choice of each patch, -1 where it was dropped.
    """

    file: Path | None
    text: str
    grid: tuple[int, int]
    experts: NDArray[np.int64]


@dataclass(frozen=True)
class Routing:
    """Routing of a finished model on a sample of data.

    Attributes:
        layers: ``(L,)`` decoder layers.
        num_experts: E.
        top_k: k.
        samples: Samples that were looked at.
        tokens: Modality -> tokens.
        load: Modality -> ``(L, E)`` shares.
        entropy: Modality -> ``(L,)``.
        measures: Name out of `MEASURES`, or ``balance`` -> ``(L,)``.
        similarity: ``(L, E, E)`` cosine between experts' weights; None where it was not measured.
        transitions: Modality -> ``(L - 1, E, E)`` shares of the tokens going from an expert to one of the next layer.
        pathways: Modality -> (expert of each layer, share of the tokens), the commonest first.
        pictures: See `Picture`.
        scoring: How experts are chosen, as in a recipe's `router.scoring`.
    """

    layers: list[int]
    num_experts: int
    top_k: int
    samples: int
    tokens: dict[str, int]
    load: dict[str, Array]
    entropy: dict[str, Array]
    measures: dict[str, Array]
    similarity: Array | None
    transitions: dict[str, Array]
    pathways: dict[str, list[tuple[tuple[int, ...], float]]]
    pictures: list[Picture]
    scoring: str = "softmax"


def live_routing(rows: Sequence[Mapping[str, Any]], group: str = MOE) -> LiveRouting | None:
    """Collect the routing of a group of routers from log lines; None where none has any.

    Lines of older versions hold ``expert_load`` only. What follows from the load (balance, violation, dead experts)
    is then computed from it.
    """
    found = [(row, measured) for row in rows if (measured := _measured(row, group))]
    if not found:
        return None
    names = sorted({name for _, measured in found for name in measured if name.startswith("layer_")}, key=_layer)
    experts = max(len(layer["load"]["all"]) for _, measured in found for layer in _layers(measured).values())
    shape = (len(found), len(names))
    load = {
        key: np.full((*shape, experts), np.nan)
        for key in _modalities(layer["load"] for _, measured in found for layer in _layers(measured).values())
    }
    entropy = {
        key: np.full(shape, np.nan)
        for key in _modalities(
            layer.get("entropy", {}) for _, measured in found for layer in _layers(measured).values()
        )
    }
    measures = {key: np.full(shape, np.nan) for key in MEASURES}
    balance = np.full(shape[0], np.nan)
    for t, (_, measured) in enumerate(found):
        for i, name in enumerate(names):
            layer = measured.get(name)
            if layer is None:
                continue
            for key, shares in layer["load"].items():
                load[key][t, i, : len(shares)] = _numbers(shares)
            for key, value in layer.get("entropy", {}).items():
                entropy[key][t, i] = _number(value)
            shares = load["all"][t, i]
            derived = {"max_violation": shares.max() * experts - 1, "dead_experts": (shares == 0).sum()}
            for key in MEASURES:
                measures[key][t, i] = _number(layer.get(key, derived.get(key)))
        balance[t] = _number(measured["balance"]) if "balance" in measured else load_balance(load["all"][t])
    losses = {
        key: np.array([_number(row.get(key)) for row, _ in found])
        for key in sorted({key for row, _ in found for key in row if key in ("aux_loss", "z_loss", "router_z_loss")})
    }
    return LiveRouting(
        steps=np.array([float(row["step"]) for row, _ in found]),
        layers=[_layer(name) for name in names],
        balance=balance,
        load=load,
        entropy={key: values for key, values in entropy.items() if np.isfinite(values).any()},
        measures={key: values for key, values in measures.items() if np.isfinite(values).any()},
        losses=losses,
    )


def load_balance(load: Array) -> float:
    """Return the least balanced layer's ``exp(entropy of load) / E``: 1 when all experts get the same.

    Args:
        load: ``(L, E)`` shares.
    """
    logs = np.log(np.where(load > 0, load, 1.0))
    return float(np.exp(-(load * logs).sum(-1)).min() / load.shape[-1])


def _measured(row: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Return a group's part of a log line; that of MoE layers also of one in the older layout."""
    if isinstance(row.get(group), Mapping):
        measured = dict(row[group])
        # A layer that is written as a plain list of shares, or without any, says nothing more.
        return measured if _layers(measured) else {}
    if group != MOE:
        return {}
    return {name: {"load": {"all": shares}} for name, shares in row.get("expert_load", {}).items()}


def _layers(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: layer for name, layer in measured.items() if name.startswith("layer_") and "all" in layer.get("load", {})
    }


def _layer(name: str) -> int:
    return int(name.removeprefix("layer_"))


def _modalities(parts: Any) -> list[str]:
    found = {key for part in parts for key in part}
    return [key for key in MODALITIES if key in found] + sorted(found - set(MODALITIES))


def read_routing(document: Mapping[str, Any], folder: Path) -> Routing:
    """Turn the document of a routing.json into arrays.

    Args:
        document: Its content.
        folder: Where it lies; the files of its pictures are relative to it and may not leave it.

    Raises:
        ValueError: Another format, or numbers that do not fit together.
    """
    if document.get("format") != FORMAT:
        raise ValueError(f"format {document.get('format')!r}, expected {FORMAT}: written by another version")
    try:
        layers, experts = [int(layer) for layer in document["layers"]], int(document["num_experts"])
        shape = (len(layers), experts)
        load = {key: _array(f"load.{key}", document["load"][key], shape) for key in _modalities([document["load"]])}
        entropy = document.get("entropy", {})
        similarity = document.get("similarity")
        transitions = document.get("transitions", {})
        pathways = document.get("pathways", {})
        return Routing(
            layers=layers,
            num_experts=experts,
            top_k=int(document["num_experts_per_tok"]),
            samples=int(document.get("samples", 0)),
            tokens={key: int(document["tokens"][key]) for key in _modalities([document.get("tokens", {})])},
            load=load,
            entropy={key: _array("entropy", entropy[key], shape[:1]) for key in _modalities([entropy])},
            measures={
                key: _array(key, document[key], shape[:1])
                for key in ("balance", *MEASURES)
                if _one_a_layer(document, key)
            },
            similarity=None if similarity is None else _array("similarity", similarity, (*shape, experts)),
            transitions={
                key: _shares(_array("transitions", transitions[key], (len(layers) - 1, experts, experts)))
                for key in _modalities([transitions])
                if len(layers) > 1 and transitions[key]
            },
            pathways={
                key: [(tuple(int(e) for e in path["experts"]), float(path["share"])) for path in pathways[key]]
                for key in _modalities([pathways])
            },
            pictures=[_picture(entry, folder, shape[0]) for entry in document.get("pictures", [])],
            scoring=str(document.get("scoring", "softmax")),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not what sparsevlm writes: {type(error).__name__} {error}") from None


def _one_a_layer(document: Mapping[str, Any], key: str) -> bool:
    """The similarity is a matrix a layer here."""
    return key != "similarity" and document.get(key) is not None


def _picture(entry: Mapping[str, Any], folder: Path, layers: int) -> Picture:
    rows, columns = (int(n) for n in entry["grid"])
    file = (folder / entry["file"]).resolve()
    inside = file.is_relative_to(folder.resolve()) and file.is_file()
    experts = np.asarray(entry["experts"], dtype=np.int64)
    if experts.shape != (layers, rows * columns):
        raise ValueError(f"pictures: {experts.shape} experts for {layers} layers and a {rows} x {columns} grid")
    return Picture(
        file if inside else None, str(entry.get("text", "")), (rows, columns), experts.reshape(-1, rows, columns)
    )


def _array(name: str, values: Any, shape: tuple[int, ...]) -> Array:
    try:
        array = np.asarray(values, dtype=np.float64)  # None becomes NaN
    except ValueError:
        raise ValueError(f"{name}: rows of different lengths") from None
    if array.shape != shape:
        raise ValueError(f"{name}: expected the shape {shape}, got {array.shape}")
    return array


def _shares(counts: Array) -> Array:
    """Divide the counts of each gap between layers by their sum."""
    return counts / np.maximum(counts.sum((1, 2), keepdims=True), 1)


def _numbers(values: Sequence[Any]) -> Array:
    return np.array([_number(value) for value in values])


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
