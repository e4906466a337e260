"""Tensors of published checkpoints that connector blocks begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_tensors(source: str, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Read some tensors of a checkpoint; of one on the Hub, only the files that hold them are downloaded.

    Args:
        source: Directory or Hub id with safetensors.
        rename: Gives the name that a tensor gets here, None for one that is not wanted.

    Raises:
        ValueError: No safetensors there.
    """
    from safetensors import safe_open

    index = _find(source, _INDEX)
    if index is not None:
        places = json.loads(Path(index).read_text())["weight_map"]
        files = sorted({file for name, file in places.items() if rename(name) is not None})
    else:
        files = [_SINGLE]
    found: dict[str, Tensor] = {}
    for file in files:
        path = _find(source, file)
        if path is None:
            raise ValueError(
                f"no weights in {source!r}: it has no {file}; name a directory or a model of the Hub with safetensors"
            )
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                renamed = rename(name)
                if renamed is not None:
                    found[renamed] = opened.get_tensor(name)
    return found


def fill(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a module; all of its weights must be among them, in the right shapes.

    Raises:
        ValueError: They are not; the message names what lacks or differs.
    """
    own = module.state_dict()
    lacking = sorted(own.keys() - tensors.keys())
    other = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if lacking or other:
        faults = ([f"{len(lacking)} are missing ({', '.join(lacking[:3])})"] if lacking else []) + other[:3]
        raise ValueError(f"the weights of {source!r} do not fit the block: {'; '.join(faults)}; match its options")
    module.load_state_dict({name: tensors[name].to(value.dtype) for name, value in own.items()})


def _find(source: str, file: str) -> str | None:
    from transformers.utils import cached_file

    lenient: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    try:
        return cached_file(source, file, **lenient)
    except OSError as error:
        raise ValueError(f"no weights from {source!r}: {str(error).splitlines()[0]}") from error
