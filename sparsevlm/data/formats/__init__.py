"""Data formats, one file each: a row on disk to a conversation.

A format is a class registered with ``@DATA_FORMATS.register("name")`` that extends `DataFormat`: it declares its
options with their defaults in `defaults`, and overrides `sample`. One that makes its own records (generated scenes, a
container that nobody else reads) also overrides `rows`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sparsevlm.data.rows import RowContext, RowStream
from sparsevlm.data.sample import Sample
from sparsevlm.data.sources import open_rows
from sparsevlm.recipe.schema import Source
from sparsevlm.registry import suggest

__all__ = ["DataFormat", "RowContext"]


class DataFormat:
    """Base of all data formats.

    Args:
        options: `options` of the source in the recipe; only the names in `defaults` are known.

    Raises:
        ValueError: An option is unknown; the message lists the known ones.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    """Every option of the format with its default."""

    def __init__(self, **options: Any) -> None:
        unknown = [name for name in options if name not in self.defaults]
        if unknown:
            known = ", ".join(sorted(self.defaults)) or "none"
            faults = ", ".join(f"{name!r}{suggest(name, list(self.defaults))}" for name in unknown)
            raise ValueError(f"{type(self).__name__}: unknown option {faults} (known: {known})")
        self.options: dict[str, Any] = {**self.defaults, **options}

    def rows(self, source: Source, base_dir: Path | None = None) -> Sequence[Any] | Iterable[Any] | RowStream:
        """Return the records of a source, before they are understood.

        The base class reads JSON, JSONL, parquet, folders of pictures and Hugging Face data sets (see
        `sparsevlm.data.sources`). An override may return any sequence (``range(1000)`` for generated records): one with
        a length is shuffled and planned ahead, one without is read as a stream. `limit` is applied by the caller.

        Args:
            source: The source as the recipe gives it.
            base_dir: Directory that relative paths start from; None means the working directory.

        Raises:
            ValueError: The source as a whole cannot be read.
        """
        return open_rows(source, base_dir)

    def sample(self, row: Any, context: RowContext) -> Sample:
        """Return the conversation of one row; media are named, not read.

        Args:
            row: What `rows` holds.
            context: Which row it is; `context.make` fills in identity, `context.resolve` confines media paths.

        Raises:
            BadSampleError: The row cannot be used; the message is the reason (`context.where` is added elsewhere).
        """
        raise NotImplementedError
