"""The adapter sections of a recipe: small trained additions to frozen weights, told apart by `type`.

A file a type. Every section has `mergeable`, which says whether a following stage may start from it: the adapter is
merged into the weights then; and `zero`, the highest stage of DeepSpeed's ZeRO that it was tested with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from sparsevlm.recipe.adapter.lora import Lora
from sparsevlm.recipe.adapter.lora_experts import LoraExperts
from sparsevlm.recipe.adapter.mma import Mma
from sparsevlm.recipe.adapter.qlora import QLora
from sparsevlm.recipe.adapter.selective import PartialLora, SliceLora
from sparsevlm.recipe.section import CrossFault, names, number, view

__all__ = [
    "ADAPTERS", "Adapter", "Lora", "LoraExperts", "Mma", "PartialLora", "QLora", "SliceLora", "adapter_faults",
    "order_faults", "sharding_faults", "trains_beside",
]  # fmt: skip

Adapter = Annotated[Lora | QLora | Mma | LoraExperts | PartialLora | SliceLora, Field(discriminator="type")]
"""What `adapter` of a stage may be."""

ADAPTERS: dict[str, Any] = {
    "lora": Lora,
    "qlora": QLora,
    "mma": Mma,
    "lora_experts": LoraExperts,
    "partial_lora": PartialLora,
    "slice_lora": SliceLora,
}
"""Type -> section."""


def trains_beside(adapter: Any) -> list[str]:
    """Return what trains beside an adapter where nothing is said: the connector, unless it is adapted or quantised."""
    return ["adapter"] if _connector_taken(adapter) else ["adapter", "connector"]


def _connector_taken(adapter: Any) -> str:
    """Return what an adapter does with the connector, such that it cannot train in full."""
    options = view(adapter)
    if "connector" in names(options.get("targets")):
        return "a target of the adapter: train it in full or adapt it"
    return "quantised: train it in full or quantise it" if "connector" in names(options.get("quantise")) else ""


def adapter_faults(trains: list[str], adapter: Any, parts: Sequence[str]) -> Iterator[CrossFault]:
    """Yield what does not go together in `trains` and `adapter` of a stage; ``parts`` are all parts there are."""
    if adapter is None:
        if "adapter" in trains:
            yield ("trains", trains.index("adapter")), "this stage has no 'adapter'; give it one"
        return
    if trains and "adapter" not in trains:
        yield ("trains",), "this stage has an 'adapter' that it does not train: name it"
    for i, part in enumerate(trains):
        if part in parts and part not in ("adapter", "connector", "fusion"):
            yield ("trains", i), f"only connector and fusion can train in full beside an adapter, not {part!r}"
        elif part == "fusion" and "fusion" in names(view(adapter).get("targets")):
            yield ("trains", i), "the fusion is a target of the adapter: train it in full or adapt it, not both"
        elif part == "connector" and (taken := _connector_taken(adapter)):
            yield ("trains", i), f"the connector is {taken}, not both"


def order_faults(stages: dict[str, Any]) -> Iterator[CrossFault]:
    """Yield adapters that no stage can follow and that one follows; paths start at a stage's name."""
    kinds = {name: view(view(stage).get("adapter")).get("type") for name, stage in stages.items()}
    for (name, kind), after in zip(kinds.items(), list(kinds)[1:]):
        if kind in ADAPTERS and not ADAPTERS[kind].mergeable:
            yield (
                (name, "adapter"),
                f"what {kind!r} adds depends on the input and cannot be merged, so stage {after!r} cannot start from "
                "this one; put this stage last",
            )


def sharding_faults(adapter: Any, sharding: Any) -> Iterator[CrossFault]:
    """Yield a sharding that a stage's adapter does not work with; the path starts at the adapter."""
    kind, zero = view(adapter).get("type"), number(view(sharding).get("zero", 0))
    highest = ADAPTERS[kind].zero if kind in ADAPTERS else 3
    if zero is not None and zero > highest:
        yield (
            ("type",),
            f"{kind!r} works up to 'zero: {highest}', and this stage has {zero:g}; set 'sharding: {{zero: {highest}}}' "
            "for this stage",
        )
