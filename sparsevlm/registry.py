"""The three open sets of the project: connector blocks, data formats, evaluation tasks.

A plug-in is one file in the package that a registry names, and a decorator in it. Registries import that package on
first use only, so that importing :mod:`sparsevlm` stays cheap.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any


class UnknownNameError(ValueError):
    """A name that no plug-in registered."""


def suggest(name: str, known: Iterator[str] | list[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


class Registry:
    """Named plug-ins of one kind.

    Args:
        noun: What an entry is, for messages ("connector block").
        package: Dotted package whose modules are imported before the first look-up.
    """

    def __init__(self, noun: str, package: str) -> None:
        self.noun = noun
        self.package = package
        self._entries: dict[str, Any] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[Any], Any]:
        """Class or function decorator that enters the object under ``name``.

        Raises:
            ValueError: ``name`` is taken by another object.
        """

        def enter(entry: Any) -> Any:
            taken = self._entries.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (entry.__module__, entry.__qualname__):
                raise ValueError(
                    f"{self.noun} {name!r} is already registered by {taken.__module__}.{taken.__qualname__}"
                )
            self._entries[name] = entry
            return entry

        return enter

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._loaded = True  # only now: a failed import must fail again, not leave half a registry

    def names(self) -> list[str]:
        """Return all registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def items(self) -> list[tuple[str, Any]]:
        """Return ``(name, entry)`` pairs, sorted by name."""
        self._load()
        return sorted(self._entries.items())

    def get(self, name: str) -> Any:
        """Return the entry of ``name``.

        Raises:
            UnknownNameError: Nothing is registered under ``name``; the message lists what is.
        """
        self._load()
        if name not in self._entries:
            raise UnknownNameError(
                f"unknown {self.noun} {name!r}{suggest(str(name), list(self._entries))} "
                f"(known: {', '.join(self.names())})"
            )
        return self._entries[name]


CONNECTOR_BLOCKS = Registry("connector block", "sparsevlm.connectors")
DATA_FORMATS = Registry("data format", "sparsevlm.data.formats")
EVAL_TASKS = Registry("evaluation task", "sparsevlm.eval.tasks")
