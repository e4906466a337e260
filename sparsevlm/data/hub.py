"""Rows of tables and Hugging Face data sets, read through the `datasets` library with its media left encoded."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsevlm.data.rows import Rows, RowStream
from sparsevlm.recipe.schema import Source

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

_STREAM_BATCH = 16
"""Rows that a stream hands over at once."""

_OPEN_SHARDS = 8
"""Shards of a stream that are read in turn."""


class TableRows(Rows):
    """Rows of a data set on disk. Pictures stay encoded (``{"bytes", "path"}``); class labels become their names.

    Args:
        dataset: The data set.
        name: What it is called in messages.
        root: Folder that media paths start from.
        caches: Folders that the library keeps media in.
    """

    def __init__(self, dataset: Dataset, name: str, root: Path | None, caches: tuple[Path, ...] = ()) -> None:
        self._labels = _label_names(dataset.features)
        self._dataset: Any = dataset.with_format("arrow")  # rows as Arrow: nothing is decoded by the library
        self.name, self.root, self.caches = name, root, caches

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._dataset)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """Return one row."""
        return _name_labels(self._dataset[int(index)].to_pylist()[0], self._labels)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._dataset.column_names)

    def column(self, name: str) -> list[Any]:
        """Return a column as a whole."""
        return self._dataset.data.column(name).to_pylist()

    def where(self, index: int) -> str:
        """Return ``name:row 0``."""
        return f"{self.name}:row {index}"

    def folder(self, index: int) -> Path | None:
        """Return the folder of the files."""
        return self.root


class TableStream(RowStream):
    """Rows of a data set that is read as a stream.

    Its shards come in an order that changes with the epoch, some of them interleaved; rows are mixed further where they
    are put into batches. Ranks share the shards where these divide evenly, else every rank takes every so-manieth row.
    """

    def __init__(self, dataset: IterableDataset, name: str, root: Path | None) -> None:
        self._labels = _label_names(dataset.features)
        self._dataset = dataset.decode(False) if dataset.features else dataset
        self.name, self.root = name, root

    def read(
        self, epoch: int, seed: int, rank: int, world: int, limit: int | None = None
    ) -> Iterator[tuple[str, Path | None, Any]]:
        """Yield the rows; see `RowStream.read`."""
        count = max(1, self._dataset.num_shards)
        order = list(range(count)) if limit is not None else np.random.default_rng([seed, epoch]).permutation(count)
        apart = limit is None and count % world == 0
        opened = (self._shard(count, int(shard)) for shard in (order[rank::world] if apart else order))
        rows = _interleave(opened, 1 if limit is not None else _OPEN_SHARDS)
        for row in rows if apart else islice(rows, rank, limit, world):
            yield f"{self.name}:{_identity(row)}", self.root, row

    def _shard(self, count: int, index: int) -> Iterator[dict[str, Any]]:
        # `iter` and not `for`: inside a DataLoader's worker the latter would drop what it takes for others' shards
        for columns in self._dataset.shard(count, index).iter(_STREAM_BATCH):
            for values in zip(*columns.values(), strict=True):
                yield _name_labels(dict(zip(columns, values, strict=True)), self._labels)


def _interleave(iterators: Iterator[Iterator[Any]], width: int) -> Iterator[Any]:
    """Yield from ``width`` iterators in turn; one that ends makes room for the next."""
    opened = deque(islice(iterators, width))
    while opened:
        current = opened.popleft()
        try:
            item = next(current)
        except StopIteration:
            opened.extend(islice(iterators, 1))
            continue
        opened.append(current)
        yield item


def open_tables(source: Source, files: Sequence[Path], builder: str) -> TableRows | TableStream:
    """Return the rows of parquet, Arrow or CSV files.

    Raises:
        ValueError: The files cannot be read.
    """
    options = {"sep": "\t"} if files[0].suffix.lower() == ".tsv" else {}
    names = ", ".join(file.name for file in files)
    load = _loader(builder, split=source.split, streaming=source.streaming, **options)
    return _wrap(_load(lambda: load(data_files=[str(f) for f in files]), names), names, files[0].parent)


def open_folder(source: Source, path: Path) -> TableRows | TableStream:
    """Return the rows of a data set in a folder: saved by `datasets`, or a clone of a Hub repository.

    Raises:
        ValueError: The folder cannot be read.
    """
    from datasets import load_from_disk

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():

        def load() -> Any:
            saved = load_from_disk(str(path))
            return saved[source.split] if isinstance(saved, dict) else saved

    else:
        load = _loader(str(path), name=source.name, split=source.split, streaming=source.streaming)
    return _wrap(_load(load, str(path)), path.name, path)


def open_hub(source: Source, path: str) -> TableRows | TableStream:
    """Return the rows of a data set on the Hugging Face Hub.

    Raises:
        ValueError: There is no such data set, configuration, split or revision, or it cannot be reached.
    """
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    load = _loader(path, name=source.name, split=source.split, revision=source.revision, streaming=source.streaming)
    caches = (config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE)
    rows = _wrap(_load(load, path), f"{path}[{source.split}]", None)
    rows.caches = tuple(Path(cache) for cache in caches)
    return rows


def _loader(path: str, **options: Any) -> Callable[..., Any]:
    from functools import partial

    from datasets import load_dataset

    return partial(load_dataset, path, **{key: value for key, value in options.items() if value is not None})


def _load(load: Callable[[], Any], name: str) -> Any:
    """Run the library's loading; what it raises becomes one `ValueError` that names the source."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"data set {name!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _wrap(dataset: Any, name: str, root: Path | None) -> TableRows | TableStream:
    from datasets import Dataset

    return TableRows(dataset, name, root) if isinstance(dataset, Dataset) else TableStream(dataset, name, root)


def _label_names(features: Features | None) -> dict[str, list[str]]:
    from datasets import ClassLabel

    return {name: list(f.names) for name, f in (features or {}).items() if isinstance(f, ClassLabel) and f.names}


def _name_labels(row: dict[str, Any], labels: dict[str, list[str]]) -> dict[str, Any]:
    for column, names in labels.items():
        value = row.get(column)
        if isinstance(value, int) and 0 <= value < len(names):
            row[column] = names[value]
    return row


def _identity(row: dict[str, Any]) -> str:
    """Return what tells a row of a stream from others, whatever place it comes in: its id, else a digest."""
    if isinstance(row.get("id"), (str, int)):
        return f"id {row['id']}"
    return f"digest {hashlib.blake2b(repr(row).encode('utf-8', 'replace'), digest_size=8).hexdigest()}"
