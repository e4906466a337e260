"""What an adapter directory says about the model that it was trained on, and how that model is found and recognised.

An adapter directory holds PEFT's `adapter_config.json` and `adapter_model.safetensors`, the processor, `parent.json`
and the completion marker of its stage. Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PARENT = "parent.json"

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLE = 4096  # bytes of a tensor, at its start and in its middle


def is_adapter(directory: str | Path) -> bool:
    """Tell whether a directory holds an adapter instead of a whole model."""
    return (Path(directory) / ADAPTER_CONFIG).is_file()


def weights_hash(directory: Path) -> str:
    """Return what tells the weights of a saved model from others, in time that does not grow with their size.

    The hash covers names, shapes, types and places of all tensors (the headers of the safetensors files) and the first
    and the middle 4 KiB of each tensor; of a stack, of each matrix in it, since adapters may change some experts only.
    Training changes every tensor that it touches, so another run of the same recipe differs; the headers alone would
    be equal.

    Raises:
        ValueError: The directory holds no weights in safetensors.
    """
    if (directory / _INDEX).is_file():
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    elif (directory / _SINGLE).is_file():
        files = [_SINGLE]
    else:
        raise ValueError(f"{directory} holds no model: neither {_SINGLE} nor {_INDEX} is there")
    digest = hashlib.sha256()
    for name in files:
        with (directory / name).open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = handle.read(length)
            digest.update(header)
            tensors = [entry for key, entry in json.loads(header).items() if key != "__metadata__"]
            for first, last in sorted(part for entry in tensors for part in _matrices(entry)):
                for offset in (first, first + (last - first) // 2):
                    handle.seek(8 + length + offset)
                    digest.update(handle.read(min(_SAMPLE, last - offset)))
    return digest.hexdigest()


def _matrices(entry: dict[str, Any]) -> list[tuple[int, int]]:
    """Return where the matrices of a stack begin and end in a file; a tensor of another kind is one part."""
    start, end = entry["data_offsets"]
    parts = entry["shape"][0] if len(entry["shape"]) == 3 else 1
    size = (end - start) // max(parts, 1)
    return [(start + i * size, start + (i + 1) * size) for i in range(parts)]


QUANTISATION = "quantization"
"""Entry of `parent.json` that says how the parent's weights were quantised for training, where they were."""


def write_parent(
    directory: Path, parent: Path, home: Path | None = None, quantisation: dict[str, Any] | None = None
) -> None:
    """Write `parent.json`: where the model is that the adapter was trained on, and its hash.

    Args:
        directory: Where to.
        parent: The model.
        home: Directory that the file is moved to afterwards, where that is another.
        quantisation: How the weights were quantised (`quantise.Settings`), where they were.
    """
    record: dict[str, Any] = {
        "path": str(parent.resolve()),
        "relative": os.path.relpath(parent.resolve(), (home or directory).resolve()),
        "sha256": weights_hash(parent),
    }
    if quantisation is not None:
        record[QUANTISATION] = quantisation
    (directory / PARENT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_parent(directory: Path) -> dict[str, Any]:
    """Return what `parent.json` of an adapter directory says.

    ``{"path", "relative", "sha256"}`` of one that was trained here; of one that was uploaded ``{"sha256"}`` with
    ``"relative"`` where the model lies beside the adapter, or ``"hub": {"repo", "revision", "folder"}``. With
    ``"quantization"`` where it was trained on the model's weights quantised.

    Raises:
        ValueError: It does not say what it was trained on.
    """
    file = directory / PARENT
    if not file.is_file():
        raise ValueError(
            f"{directory} holds an adapter without {PARENT}, which names the model that it was trained on; adapters of "
            "other tools are loaded with PEFT"
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    known = (
        isinstance(record, dict) and "sha256" in record and any(key in record for key in ("path", "relative", "hub"))
    )
    if not known:
        raise ValueError(f"{file}: expected sha256 of a model with its path, relative or hub; was it edited?")
    return record


def parent_name(record: dict[str, Any]) -> str:
    """Return what to call the model of a `parent.json` in a message."""
    if "path" in record:
        return record["path"]
    hub = record.get("hub") or {}
    return "/".join(filter(None, (hub.get("repo"), hub.get("folder")))) or record["relative"]


def find_parent(directory: Path, base: str | Path | None = None) -> Path:
    """Return the directory of the model that an adapter was trained on, having checked that it is that model.

    Args:
        directory: The adapter's.
        base: Look here instead (a directory, or a Hub id); default: where the adapter says, first by the path from the
            adapter's own directory (a run may have been moved), then by the full one, then on the Hub.

    Raises:
        ValueError: It is not there, or holds other weights.
    """
    record = read_parent(directory)
    told = [
        *([directory / record["relative"]] if "relative" in record else []),
        *map(Path, filter(None, [record.get("path")])),
    ]
    places = told if base is None else [Path(base)]
    found = next((place for place in places if place.is_dir()), None)
    if found is None and base is None and "hub" in record:
        found = _download(**record["hub"])
    if found is None:
        named = str(base if base is not None else parent_name(record))
        if named.count("/") != 1 or named.startswith((".", "/", "~")):
            raise ValueError(
                f"the adapter in {directory} was trained on the model in {parent_name(record)}, which is not there"
                + (f" (nor is {base})" if base is not None else "")
                + "; pass the directory that holds it now as base"
            )
        found = _download(named)
    if is_adapter(found):
        raise ValueError(f"{found} holds an adapter itself; pass the whole model that {directory} was trained on")
    if weights_hash(found) != record["sha256"]:
        raise ValueError(
            f"the adapter in {directory} was trained on other weights than those in {found} (their hashes differ); "
            f"those were {parent_name(record)} as it was then. Pass that model as base, or train the adapter anew"
        )
    return found


def _download(repo: str, revision: str | None = None, folder: str | None = None) -> Path:
    """Return a model of the Hub, downloaded if need be; of a folder only that."""
    from huggingface_hub import snapshot_download

    wanted = None if folder is None else [f"{folder}/*"]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted), *filter(None, [folder]))
