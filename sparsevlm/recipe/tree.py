"""YAML as a tree that remembers where every key and value stands, so that a fault can name its line.

The loader reads nodes, not objects: marks are exact, every duplicate key is found, and scalars are those of YAML 1.2
(``1e-4`` is a number, ``yes`` and ``2026-01-01`` are text).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, order=True)
class Position:
    """A place for messages: a file with line and column (from 1), or the override that set the value (line 0)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, order=True)
class Fault:
    """One thing that is wrong with a recipe."""

    at: Position
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.at), self.path, self.message) if part)


class RecipeError(ValueError):
    """Everything that is wrong with a recipe; its text has one line a fault.

    Attributes:
        faults: The faults, in the order of their places.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(sorted(set(faults)))
        super().__init__("\n".join(str(fault) for fault in self.faults))


@dataclass
class Located:
    """A value and where it stands.

    Attributes:
        value: A scalar, or a ``dict`` / ``list`` of further `Located`.
        at: Where the value begins.
        key_at: Where its key stands; the value's own place in lists and at the root.
    """

    value: Any
    at: Position
    key_at: Position

    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> Located | None:
        """Return the entry of a mapping or list, None where there is none."""
        if isinstance(self.value, dict) and isinstance(key, str):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None


@dataclass
class _Reader:
    """Turns composed nodes into `Located`, collecting faults instead of stopping at the first."""

    source: str
    at: Position | None
    yaml: YAML
    faults: list[Fault] = field(default_factory=list)
    open: set[int] = field(default_factory=set)  # nodes being read: an alias to one of them is a cycle

    def position(self, mark: Any) -> Position:
        return self.at or Position(self.source, mark.line + 1, mark.column + 1)

    def read(self, node: Node, path: tuple[str, ...], key_at: Position | None = None) -> Located:
        at = self.position(node.start_mark)
        key_at = key_at or at
        if id(node) in self.open:
            self.fault(at, path, "an alias may not contain itself")
            return Located(None, at, key_at)
        self.open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return Located(self.mapping(node, path), at, key_at)
            if isinstance(node, SequenceNode):
                items = [self.read(child, (*path, str(i))) for i, child in enumerate(node.value)]
                return Located(items, at, key_at)
            value = self.scalar(node, path)
            # the node of an absent value starts wherever the next one does, so a null stands where its key stands
            return Located(value, key_at if value is None else at, key_at)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: MappingNode, path: tuple[str, ...]) -> dict[str, Located]:
        entries: dict[str, Located] = {}
        inherited: dict[str, Located] = {}
        for key_node, value_node in node.value:
            at = self.position(key_node.start_mark)
            if key_node.tag == f"{_TAG}merge":
                # `<<: *anchor` or a list of them; the mapping's own keys win, then earlier anchors
                anchors = value_node.value if isinstance(value_node, SequenceNode) else [value_node]
                for anchor in anchors:
                    merged = self.read(anchor, path)
                    if isinstance(merged.value, dict):
                        inherited = merged.value | inherited
                    else:
                        self.fault(at, path, "'<<' takes a mapping or a list of mappings")
                continue
            if not isinstance(key_node, ScalarNode) or key_node.tag != f"{_TAG}str":
                shown = key_node.value if isinstance(key_node, ScalarNode) else "a collection"
                self.fault(at, path, f"a key must be text, got {shown} (put it in quotes)")
                continue
            key = key_node.value
            if key in entries:
                self.fault(at, (*path, key), f"duplicate key, given before at line {entries[key].key_at.line}")
                continue
            entries[key] = self.read(value_node, (*path, key), at)
        return entries | {key: value for key, value in inherited.items() if key not in entries}

    def scalar(self, node: Node, path: tuple[str, ...]) -> Any:
        tag = str(node.tag).removeprefix(_TAG)
        if tag in ("null", "bool", "int", "float"):
            return self.yaml.constructor.construct_object(node)
        if tag not in ("str", "timestamp", "value", "merge"):  # YAML 1.2's core schema has no dates
            self.fault(self.position(node.start_mark), path, f"YAML tag {node.tag} is not supported")
        return node.value

    def fault(self, at: Position, path: tuple[str, ...], message: str) -> None:
        self.faults.append(Fault(at, ".".join(path), message))


def read_yaml(text: str, source: str, *, at: Position | None = None) -> tuple[Located, list[Fault]]:
    """Parse YAML text.

    Args:
        text: The document.
        source: Its name in messages.
        at: Place of every value, for text that stands in no file.

    Returns:
        The tree and what is wrong with it: duplicate keys, keys that are no text, tags.

    Raises:
        RecipeError: The text is no YAML.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = at or (Position(source, mark.line + 1, mark.column + 1) if mark else Position(source))
        problem = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise RecipeError([Fault(place, "", f"broken YAML: {problem}")]) from None
    except YAMLError as error:  # a character that YAML does not allow
        position = getattr(error, "position", None)
        line = text.count("\n", 0, position) + 1 if position is not None else 1
        place = at or Position(source, line, 1)
        raise RecipeError([Fault(place, "", f"broken YAML: {str(error).splitlines()[0]}")]) from None
    if root is None:
        place = at or Position(source, 1, 1)
        return Located(None, place, place), []
    reader = _Reader(source, at, yaml)
    return reader.read(root, ()), reader.faults


def overlay(
    below: Located,
    above: Located,
    removes: Callable[[tuple[str, ...]], bool] = lambda path: False,
    path: tuple[str, ...] = (),
) -> Located:
    """Return ``above`` laid over ``below``: mappings are merged, everything else is replaced.

    Args:
        below: The tree that is inherited.
        above: The tree that has the last word; its places are kept.
        removes: Tells of a path whether ``null`` there takes the inherited entry away instead of being its value.
        path: Where the two stand.
    """
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        if key not in merged:
            merged[key] = child
        elif child.value is None and removes((*path, key)):
            del merged[key]
        else:
            merged[key] = overlay(merged[key], child, removes, (*path, key))
    return replace(above, value=merged)
