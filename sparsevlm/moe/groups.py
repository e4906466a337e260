"""Groups of routers that are alike: a model's MoE layers, and the LoRA experts of an adapter.

Groups may differ in their numbers of experts, scoring and coefficients, so losses and numbers are taken of each by
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

MOE = "moe"
"""The group of a model's MoE layers."""

Settings = Mapping[str, Any]
"""What a group is judged by: the fields of a model config's `moe` that say it, under the same names."""

_Value = TypeVar("_Value")


def router_groups(model: Any) -> dict[str, Settings]:
    """Return the groups of a model by name: `moe` from its config, the others from its adapters.

    An adapter's configuration has a method ``router_group(adapter_name)`` for it, which returns name and settings.
    """
    groups: dict[str, Settings] = {}
    if getattr(model.config, "moe", None) is not None:
        groups[MOE] = model.config.moe
    adapters: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    for name, config in adapters.items():
        if hasattr(config, "router_group"):
            group, settings = config.router_group(name)
            groups[group] = settings
    return groups


def by_group(names: Sequence[str], *columns: Sequence[_Value]) -> Iterator[tuple[str, tuple[list[_Value], ...]]]:
    """Yield each group that occurs with what its routers have in each column, in the order of their first.

    Args:
        names: Group of each router.
        *columns: Beside them, one value a router.
    """
    for group in dict.fromkeys(names):
        mine = [i for i, name in enumerate(names) if name == group]
        yield group, tuple([column[i] for i in mine] for column in columns)
