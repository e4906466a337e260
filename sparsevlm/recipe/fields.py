"""Questions about the recipe's types: which option stands at a path, which names are known there, what it takes."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from sparsevlm.recipe.schema import ConnectorBlock, Eval
from sparsevlm.registry import CONNECTOR_BLOCKS, EVAL_TASKS

_SCALARS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def members(annotation: Any) -> list[Any]:
    """Return what a union consists of, or the annotation alone; without `Annotated` around any of it."""
    if annotation == ConnectorBlock:
        return [annotation]
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [annotation]


def accepts_null(annotation: Any) -> bool:
    """Tell whether ``null`` is a value of the option."""
    return annotation is Any or type(None) in members(annotation)


def section_at(annotation: Any, value: Any) -> type[BaseModel] | None:
    """Return the model whose fields a mapping there has: a recipe section, or the spec of a connector block.

    Of several sections it is the one that the mapping's `type` names.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if ConnectorBlock in members(annotation):
        return CONNECTOR_BLOCKS.get(str(kind)) if kind in CONNECTOR_BLOCKS.names() else None
    sections = sections_in(annotation)
    if len(sections) > 1:  # told apart by their type
        return next((section for section in sections if kind in types_of(section)), None)
    return sections[0] if sections else None


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an option may be."""
    return [member for member in members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]


def types_of(section: type[BaseModel]) -> tuple[str, ...]:
    """Return the values of a section's `type`, for those that are told apart by it."""
    known = section.model_fields.get("type")
    return get_args(known.annotation) if known is not None else ()


def _child(annotation: Any, key: str | int, value: Any) -> Any:
    section = section_at(annotation, value)
    if section is Eval and key == "options":
        task = value.get("task") if isinstance(value, dict) else None
        return EVAL_TASKS.get(str(task)) if task in EVAL_TASKS.names() else None
    if section is not None:
        known = section.model_fields.get(str(key))
        return known.annotation if known is not None else None
    for member in members(annotation):
        origin, args = get_origin(member), get_args(member)
        if origin is dict and isinstance(key, str):
            return args[1]
        if origin in (list, tuple) and isinstance(key, int):
            return args[min(key, len(args) - 1)]
    return None


def annotation_at(root: type[BaseModel], path: Sequence[str | int], plain: Any) -> Any:
    """Return the annotation of the option at ``path``, None where the schema has none.

    Args:
        root: The section that paths start from.
        path: Keys and indices.
        plain: The values given, for blocks whose type decides on their options.
    """
    annotation: Any = root
    for key in path:
        annotation = _child(annotation, key, plain)
        if annotation is None:
            return None
        if isinstance(plain, dict):
            plain = plain.get(key)
        elif isinstance(plain, list) and isinstance(key, int) and key < len(plain):
            plain = plain[key]
        else:
            plain = None
    return annotation


def option_elsewhere(
    root: type[BaseModel], path: Sequence[str | int], name: str, plain: Any
) -> tuple[str | int, ...] | None:
    """Return the path of the nearest section that has an option of that name, None where there is none.

    Sections below the one at ``path`` come first, then those below each section around it. A name that the user chooses
    is written as ``NAME``.

    Args:
        root: The section that paths start from.
        path: Of the section that does not have the option.
        name: The option.
        plain: The values given.
    """
    for depth in range(len(path), -1, -1):
        value = plain
        for key in path[:depth]:
            value = _entry(value, key)
        level = [(tuple(path[:depth]), annotation_at(root, path[:depth], plain), value)]
        for _ in range(3):
            below = [child for at, annotation, given in level for child in _children(at, annotation, given)]
            for at, annotation, given in below:
                section = section_at(annotation, given)
                if section is not None and name in section.model_fields:
                    return at
            level = below
    return None


def _children(
    at: tuple[str | int, ...], annotation: Any, value: Any
) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    """Yield the path, annotation and value of everything directly in a section or a mapping of sections."""
    section = section_at(annotation, value)
    if section is not None:
        for key, known in section.model_fields.items():
            yield (*at, key), known.annotation, _entry(value, key)
        return
    for member in members(annotation):
        if get_origin(member) is dict:
            yield (*at, "NAME"), get_args(member)[1], None


def _entry(value: Any, key: str | int) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def describe(annotation: Any) -> str:
    """Return in words what an option takes: "a whole number or a list of whole numbers"."""
    literals = [value for member in members(annotation) if get_origin(member) is Literal for value in get_args(member)]
    words = [" | ".join(_literal(value) for value in literals)] if literals else []
    words += [_describe_one(member) for member in members(annotation) if get_origin(member) is not Literal]
    return " or ".join(dict.fromkeys(words))


def _literal(value: Any) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _describe_one(member: Any) -> str:
    origin, args = get_origin(member), get_args(member)
    if member in _SCALARS:
        return _SCALARS[member]
    if member == ConnectorBlock:
        return "a connector block"
    if origin is list:
        return f"a list of {_plural(describe(args[0]))}"
    if origin is tuple:
        return f"a list of {len(args)} {_plural(describe(args[0]))}"
    if origin is dict:
        return f"a mapping of names to {_plural(describe(args[1]))}"
    if isinstance(member, type) and issubclass(member, BaseModel):
        return "a mapping"
    return "any value"


def _plural(words: str) -> str:
    if not words.startswith("a "):
        return words
    noun, of, rest = words.removeprefix("a ").partition(" of ")
    return f"{noun}s{of}{rest}"
