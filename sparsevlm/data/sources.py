"""A source of the recipe, opened: its rows through its format, one sample at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sparsevlm.data import hub
from sparsevlm.data.files import JsonlStream, JsonRows
from sparsevlm.data.folder import FolderRows
from sparsevlm.data.rows import ChainedRows, Rows, RowStream
from sparsevlm.recipe.schema import Source

JSON_SUFFIXES = frozenset((".json", ".jsonl", ".ndjson"))
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_rows(source: Source, base_dir: Path | None = None) -> Rows | RowStream:
    """Return the rows of a source: of local files and folders where its path names some, else of the Hub.

    Raises:
        ValueError: Nothing is there, or it cannot be read as a whole.
    """
    named = [source.path] if isinstance(source.path, str) else list(source.path)
    paths = [path for name in named for path in _local(name, base_dir or Path())]
    if not paths:
        return hub.open_hub(source, named[0])
    if source.streaming:
        return _open_stream(source, paths)
    parts = [_open_path(source, path) for path in paths]
    return parts[0] if len(parts) == 1 else ChainedRows(parts)


def _open_path(source: Source, path: Path) -> Rows:
    """Return the rows of one file or folder."""
    if path.is_dir():
        rows = hub.open_folder(source, path) if _holds_tables(path) else FolderRows(path)
    elif _kind(path) == "json":
        rows = JsonRows(path)
    else:
        rows = hub.open_tables(source, [path], _kind(path))
    assert isinstance(rows, Rows)  # not streaming
    return rows


def _open_stream(source: Source, paths: Sequence[Path]) -> RowStream:
    """Return the rows of files of one kind, or of one data set folder, as a stream.

    Raises:
        ValueError: They are of several kinds, or a folder of pictures.
    """
    kinds = {"folder" if path.is_dir() else _kind(path) for path in paths}
    if kinds == {"json"}:
        return JsonlStream(paths)
    if kinds == {"folder"} and len(paths) == 1 and _holds_tables(paths[0]):
        rows = hub.open_folder(source, paths[0])
    elif len(kinds) == 1 and "folder" not in kinds:
        rows = hub.open_tables(source, paths, kinds.pop())
    else:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"{names}: only files of one kind or a folder of tables can be streamed; drop 'streaming'")
    if not isinstance(rows, RowStream):
        raise ValueError(f"{paths[0]} was saved by `datasets` and cannot be streamed; drop 'streaming'")
    return rows


def _kind(path: Path) -> str:
    """Return how a file of records is read: ``json`` or the name of a `datasets` builder."""
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return "json"
    if suffix not in TABLE_SUFFIXES:
        known = " ".join(sorted({*JSON_SUFFIXES, *TABLE_SUFFIXES}))
        raise ValueError(f"cannot read {path}: files of records end in {known}")
    return TABLE_SUFFIXES[suffix]


def _holds_tables(path: Path) -> bool:
    """Return whether a folder is a data set of tables and not one of pictures."""
    return not (path / "metadata.jsonl").is_file() and any(
        p.suffix.lower() in (".parquet", ".arrow") for p in path.rglob("*")
    )


def _local(name: str, base_dir: Path) -> list[Path]:
    """Return the local files or the folder that a name means; nothing when it is a data set id."""
    path = base_dir / Path(name).expanduser()
    if path.exists():
        return [path]
    if any(sign in name for sign in "*?["):
        pattern = Path(name).expanduser()
        start = Path(pattern.anchor) if pattern.anchor else base_dir
        if found := sorted(start.glob(str(pattern.relative_to(pattern.anchor)))):
            return found
    elif _HUB_ID.fullmatch(name) and Path(name).suffix.lower() not in JSON_SUFFIXES | set(TABLE_SUFFIXES):
        return []
    raise ValueError(f"no file or folder {name!r} (looked for {path.absolute()}), nor can it be a data set id")
