"""Dotted overrides: ``stages.moe.optim.lr=1e-5`` laid over the tree of a recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import get_origin

from sparsevlm.recipe.faults import show
from sparsevlm.recipe.fields import accepts_null, annotation_at
from sparsevlm.recipe.schema import Recipe
from sparsevlm.recipe.section import OptionPath
from sparsevlm.recipe.tree import Fault, Located, Position, RecipeError, read_yaml
from sparsevlm.registry import suggest

_NAMED_SECTIONS = [name for name, field in Recipe.model_fields.items() if get_origin(field.annotation) is dict]
"""Sections whose keys people choose: data, stages, evals."""


class _NoPlaceError(ValueError):
    """An override whose path leads nowhere."""


def null_removes(path: OptionPath, tree: Located) -> bool:
    """Tell whether ``null`` at ``path`` takes the inherited entry away, since it is no value of the option."""
    annotation = annotation_at(Recipe, path, tree.plain())
    return annotation is None or not accepts_null(annotation)


def apply_override(tree: Located, override: str) -> tuple[Located, list[Fault]]:
    """Lay one override over a recipe.

    Args:
        tree: The recipe as it was read; not changed.
        override: ``dotted.path=value``; numbers on the path are places in a list, the value is YAML.

    Returns:
        The new tree, and what is wrong with the override (the tree is the old one then).
    """
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    at = Position(f"override {dotted}")
    try:
        if not equals or not all(dotted.split(".")):
            raise _NoPlaceError("expected dotted.path=value")
        if dotted == "base":
            raise _NoPlaceError("a base cannot be chosen by an override")
        value, faults = read_yaml(text, at.source, at=at)
        path = tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))
        _check_name(tree, path)
        remove = value.value is None and null_removes(path, tree)
        return _place(tree, path, None if remove else replace(value, key_at=at), at), faults
    except _NoPlaceError as error:
        return tree, [Fault(at, "", str(error))]
    except RecipeError as error:
        return tree, list(error.faults)


def _check_name(tree: Located, path: OptionPath) -> None:
    """Refuse an option of a stage, source or evaluation that is not there: a misspelt one would else be a new one."""
    if len(path) < 3 or path[0] not in _NAMED_SECTIONS:
        return
    section = tree.child(path[0])
    known = list(section.value) if section is not None and isinstance(section.value, dict) else []
    if path[1] not in known:
        name = str(path[1])
        raise _NoPlaceError(f"no {name!r} in {path[0]}{suggest(name, known)} (there: {', '.join(known)})")


def _place(
    node: Located | None, path: OptionPath, value: Located | None, at: Position, done: OptionPath = ()
) -> Located:
    """Return ``node`` with ``value`` at ``path``, or without that entry where the value is None."""
    if not path:
        assert value is not None
        return value
    key, rest = path[0], path[1:]
    around = ".".join(str(part) for part in done) or "the recipe"
    node = node if node is not None and node.value is not None else Located(None, at, at)
    if isinstance(node.value, list):
        if not isinstance(key, int) or key >= len(node.value):
            raise _NoPlaceError(f"{around} is a list of {len(node.value)}, it has no item {key!r}")
        if value is None and not rest:
            raise _NoPlaceError(f"items of a list cannot be removed: give the whole list {around}")
        items = list(node.value)
        items[key] = _place(items[key], rest, value, at, (*done, key))
        return replace(node, value=items)
    if node.value is None and isinstance(key, int):
        raise _NoPlaceError(f"{around} is not in the recipe, so it has no item {key}: give the whole list")
    if node.value is not None and not isinstance(node.value, dict):
        raise _NoPlaceError(f"{around} is {show(node.value)}, it has no option {key!r}")
    name = str(key)
    entries = dict(node.value or {})
    if value is None and not rest:
        entries.pop(name, None)
    else:
        entries[name] = _place(entries.get(name), rest, value, at, (*done, name))
    return replace(node, value=entries)
