"""The model that an adapter is merged into: its class without weights, and its weights by name or by key on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsevlm.export.disk_layout import skeleton, stored_names, tied_names, to_disk, use_saving_layout
from sparsevlm.export.shards import Entry, ShardReader


class Base:
    """A checkpoint, dense or sparse, of transformers or ours, open for reading.

    Args:
        name: What the user called it.
        directory: Where it is.

    Attributes:
        config: Its configuration.
        model_class: Its class.
        shapes: Shape of each parameter and buffer, by name in the model.
        tied: Names that share another parameter: ``{name: the other's name}``.
        reader: Its files.
        dtype: The type that most of its weights have.

    Raises:
        ValueError: It is quantised, no class of it is known, or its files are not all there.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.config = _read_config(name, directory)
        self.model_class = _model_class(name, self.config)
        self._model = self.skeleton()
        use_saving_layout(self._model)
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._model.state_dict().items()}
        self.tied = tied_names(self._model)
        self.reader = ShardReader(directory)
        self._loose: dict[str, str] | None = None
        sizes: dict[torch.dtype, int] = {}
        for entry in self.reader.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.numel
        self.dtype = max(sizes, key=lambda dtype: sizes[dtype])

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    def skeleton(self) -> PreTrainedModel:
        """Return a new model of this class without weights."""
        return skeleton(self.model_class, self.config)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield its modules, without weights."""
        yield from self._model.named_modules()

    def keys(self, name: str) -> list[str]:
        """Return the keys on disk of a parameter: one, or several where it is stored in pieces.

        Of tied parameters, either may be the one that is stored.

        Raises:
            ValueError: The checkpoint does not hold it, or in an older layout of pieces.
        """
        return list(self.pieces(name, torch.empty(self.shapes[name], device="meta")))

    def pieces(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return a tensor of the shape of a parameter as that parameter is stored, by key on disk.

        What transformers does to weights on their way to disk is renaming, cutting, stacking and transposing: a sum of
        two tensors is cut into the sums of their pieces, which is why a change can be cut instead of the weights.

        Raises:
            ValueError: See `keys`.
        """
        entries = self.reader.entries
        pieces = to_disk(self._model, {name: tensor})
        if all(key in entries and entries[key].shape == tuple(piece.shape) for key, piece in pieces.items()):
            return pieces
        key = self._loose_key(name)
        if entries[key].shape != tuple(tensor.shape):
            raise ValueError(
                f"{self.name}: {name} is {entries[key].shape} on disk, but its config says {tuple(tensor.shape)}"
            )
        return {key: tensor}

    def untied_key(self, name: str) -> str:
        """Return the key under which a parameter would be stored that is tied now."""
        (key,) = to_disk(self._model, {name: torch.empty(self.shapes[name], device="meta")})
        return key

    def _loose_key(self, name: str) -> str:
        """Return the key of a parameter in a checkpoint of another layout than today's."""
        if self._loose is None:
            try:
                self._loose = stored_names(self._model, self.reader.entries)
            except ValueError as error:
                raise ValueError(
                    f"{self.name} stores {name} in an older layout; load the model with transformers, save it again "
                    f"with save_pretrained, and pass that directory as --base ({error})"
                ) from error
        others = [a if b == name else b for a, b in self.tied.items() if name in (a, b)]
        for candidate in (name, *others):
            if candidate in self._loose:
                return self._loose[candidate]
        raise ValueError(f"{self.name} does not hold a whole {self.model_class.__name__}: {name} is missing")

    def entry(self, key: str) -> Entry:
        """Return shape and type of what is stored under a key."""
        return self.reader.entries[key]


def _read_config(name: str, directory: Path) -> Any:
    from transformers import AutoConfig

    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"{name}: {directory} holds no config.json; the base is a whole model")
    quantised = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method")
        raise ValueError(
            f"{name} is quantised ({method}): a merged weight would have to be rounded to it again, which loses most "
            "of what the adapter learnt. Pass the same model in bfloat16, float16 or float32 as --base"
        )
    try:
        return AutoConfig.from_pretrained(str(directory))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{name}: no configuration that can be read: {str(error).splitlines()[0]}") from error


def _model_class(name: str, config: Any) -> Any:
    """Return the class that a checkpoint says it is of, or else the one with a language-model head."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    mapped: list[Any] = [
        mapping[type(config)]
        for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
        if type(config) in mapping
    ]
    for architecture in config.architectures or ():
        for found in mapped:
            if found.__name__ == architecture:
                return found
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    if mapped:
        return mapped[0]
    raise ValueError(
        f"{name} is a {config.model_type!r} model ({', '.join(config.architectures or ()) or 'no architecture'}), a "
        "class that neither transformers nor this package has"
    )
