"""Pydantic's errors as faults: in words, at the place in the file, with the nearest known name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sparsevlm.recipe.fields import (
    annotation_at,
    describe,
    members,
    option_elsewhere,
    section_at,
    sections_in,
    types_of,
)
from sparsevlm.recipe.section import KEY, OptionPath, view
from sparsevlm.recipe.tree import Fault, Located, Position
from sparsevlm.registry import suggest


def show(value: Any) -> str:
    """Return a value as a message shows it, in YAML's words and not too long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def position_of(tree: Located, path: OptionPath, *, key: bool = False) -> Position:
    """Return where the option at ``path`` stands, or where the nearest section around it does.

    Args:
        tree: The recipe as it was read.
        path: Keys and indices from the root.
        key: Want the key's place, not the value's.
    """
    node = tree
    for part in path:
        child = node.child(part)
        if child is None:
            return node.key_at
        node = child
    return node.key_at if key or isinstance(node.value, dict) else node.at


@dataclass
class _Error:
    """One error of pydantic with union tags taken out of its path."""

    path: OptionPath
    kind: str
    message: str
    union: OptionPath | None  # path of the union whose member raised it
    member: str  # pydantic's tag of that member, "list[str]"
    on_key: bool  # the key of a mapping is wrong, not its value


def _flatten(errors: Sequence[Any], prefix: OptionPath = ()) -> Iterator[tuple[OptionPath, str, str]]:
    """Yield ``(loc, type, message)`` of all errors, those of nested validations at their own place."""
    for error in errors:
        loc = (*prefix, *error["loc"])
        if error["type"] == "nested":
            yield from _flatten(error["ctx"]["errors"], loc)
        else:
            yield loc, error["type"], error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _normalise(loc: OptionPath, kind: str, message: str, tree: Located) -> _Error:
    """Follow ``loc`` through the values given; what leads nowhere is a union's tag or the name of a missing option."""
    path: list[str | int] = []
    union: OptionPath | None = None
    member = ""
    node: Located | None = tree
    for i, part in enumerate(loc):
        if part == KEY:
            return _Error(tuple(path), kind, message, None, "", True)
        child = node.child(part) if node is not None else None
        if child is None and not (kind in ("missing", "cross") and i == len(loc) - 1):
            kind_of = node.child("type") if node is not None else None
            if kind_of is not None and kind_of.value == part:  # chosen by its type: no other member complains
                continue
            union, member = tuple(path), str(part)
            continue
        path.append(part)
        node = child
    return _Error(tuple(path), kind, message, union, member, False)


def _value_at(tree: Located, path: OptionPath) -> Any:
    node: Located | None = tree
    for part in path:
        node = node.child(part) if node is not None else None
    return node.plain() if node is not None else None


def _word(error: _Error, root: type[BaseModel], tree: Located, plain: Any) -> str:
    """Return the message of one error."""
    value = _value_at(tree, error.path)
    if error.kind == "cross":
        return error.message
    if error.kind == "extra_forbidden":
        around = annotation_at(root, error.path[:-1], plain)
        section = section_at(around, _value_at(tree, error.path[:-1]))
        known = list(section.model_fields) if section is not None else []
        hint = suggest(str(error.path[-1]), known)
        other = option_elsewhere(root, error.path[:-1], str(error.path[-1]), plain)
        # A section within this one that has it tells more than a name that looks like it.
        if other is not None and (not hint or other[: len(error.path) - 1] == error.path[:-1]):
            return f"unknown option here: it belongs to {_dotted(other)!r}"
        return f"unknown option{hint or ' (known: ' + ', '.join(known) + ')'}"
    if error.kind in ("union_tag_invalid", "union_tag_not_found"):
        known = [kind for section in sections_in(annotation_at(root, error.path, plain)) for kind in types_of(section)]
        if error.kind == "union_tag_not_found":
            return f"give its type: {', '.join(known)}"
        kind = view(value).get("type")
        return f"unknown type {show(kind)}{suggest(str(kind), known) or ' (known: ' + ', '.join(known) + ')'}"
    if error.kind == "missing":
        return f"missing, expected {describe(annotation_at(root, error.path, plain))}"
    if error.on_key:
        # the annotation of a mapping's keys cannot be reached by path: take it from the mapping's own
        around = annotation_at(root, error.path[:-1], plain)
        keys = next((get_args(member)[0] for member in members(around) if get_origin(member) is dict), str)
        return f"unknown name, expected {_expected(keys, str(error.path[-1]))}"
    if error.kind.endswith(("_type", "_parsing", "_from_float")) or error.kind in ("literal_error", "finite_number"):
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return f"expected a finite number, got {value}"
        return f"expected {_expected(annotation_at(root, error.path, plain), value)}"
    if error.kind.startswith(("greater_than", "less_than")):
        return f"{re.sub('^Input should be', 'must be', error.message)}, got {show(value)}"
    if error.kind == "too_short":
        return "may not be empty"
    return error.message


def _expected(annotation: Any, value: Any) -> str:
    choices = [
        str(choice) for member in members(annotation) if get_origin(member) is Literal for choice in get_args(member)
    ]
    return f"{describe(annotation)}, got {show(value)}{suggest(value, choices) if isinstance(value, str) else ''}"


def faults_of(error: ValidationError, root: type[BaseModel], tree: Located) -> list[Fault]:
    """Return every fault in a validation error.

    Args:
        error: What pydantic raised.
        root: The section that was validated.
        tree: The values that were validated, with their places.
    """
    plain = tree.plain()
    errors = [_normalise(*flat, tree) for flat in _flatten(error.errors())]
    faults: list[Fault] = []
    unions: set[OptionPath] = set()
    for one in errors:
        if one.union is not None:
            # every member of a union complains; only the one of the value's own shape has something to say
            value = _value_at(tree, one.union)
            shape = "list" if isinstance(value, list) else "dict" if isinstance(value, dict) else None
            if shape is None or not any(e.union == one.union and e.member.startswith(shape) for e in errors):
                if one.union not in unions:
                    unions.add(one.union)
                    message = f"expected {_expected(annotation_at(root, one.union, plain), value)}"
                    faults.append(Fault(position_of(tree, one.union), _dotted(one.union), message))
                continue
            if not one.member.startswith(shape):
                continue
        on_key = one.on_key or one.kind == "extra_forbidden"
        path = (*one.path, "type") if one.kind == "union_tag_invalid" else one.path
        faults.append(Fault(position_of(tree, path, key=on_key), _dotted(path), _word(one, root, tree, plain)))
    return faults


def bool_faults(root: type[BaseModel], tree: Located) -> list[Fault]:
    """Return the options that are true or false where a number is wanted (pydantic would take them as 1 and 0)."""
    plain = tree.plain()

    def walk(node: Located, path: OptionPath) -> Iterator[Fault]:
        if isinstance(node.value, dict | list):
            entries = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
            for key, child in entries:
                yield from walk(child, (*path, key))
        elif isinstance(node.value, bool):
            annotation = annotation_at(root, path, plain)
            kinds = members(annotation)
            counts = any(kind in (int, float) or int in map(type, get_args(kind)) for kind in kinds)
            if counts and bool not in kinds:
                yield Fault(node.at, _dotted(path), f"expected {_expected(annotation, node.value)}")

    return list(walk(tree, ()))


def _dotted(path: OptionPath) -> str:
    return ".".join(str(part) for part in path)
