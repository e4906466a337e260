"""A dense model on disk that is read tensor by tensor under its parameters' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.export.disk_layout import skeleton, stored_names, tied_names
from sparsevlm.export.shards import Entry, ShardReader
from sparsevlm.moe.block import SparseMoeBlock
from sparsevlm.surgery import decoder_layers

_FETCHED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*"]
"""Files of a Hub repository that are fetched: no code, no pickled weights."""

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Config fields by which transformers' sparse models tell their number of experts."""


def fetch(name: str) -> Path:
    """Return the directory of a model: a local one, a run's last stage, a part that the package ships, or the Hub's.

    Raises:
        ValueError: There is no such model, or it cannot be fetched.
    """
    from sparsevlm.model.parts import resolve_part
    from sparsevlm.rundir import resolve_model

    resolved = resolve_model(resolve_part(name))
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(resolved, allow_patterns=_FETCHED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(f"{name}: no such directory, and not fetched from the Hub: {error}") from error


class Source:
    """A dense checkpoint, open for reading.

    Args:
        name: What the user called it.
        directory: Where it is.

    Attributes:
        config: Its configuration.
        model: Its class without weights.
        text_config: Configuration of its language model.
        layers: Name of the list of decoder layers in `model`.
        reader: Its files.

    Raises:
        ValueError: It is no dense causal language model, or vision-language model, that transformers or this package
            builds, or its weights are not all there.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.config = _read_config(directory)
        self.text_config = self.config.get_text_config(decoder=True)
        _refuse_sparse(name, self.config, self.text_config)
        self.model = skeleton(_model_class(name, self.config), self.config)
        self.reader = ShardReader(directory)
        try:
            self._keys = stored_names(self.model, self.reader.entries)
            self._tied = tied_names(self.model)
            self._check()
            layers = decoder_layers(self.decoder)
        except BaseException:
            self.reader.close()
            raise
        self.layers = next(found for found, module in self.model.named_modules() if module is layers)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    @property
    def decoder(self) -> nn.Module:
        """The language model, without weights."""
        base: Any = self.model.base_model
        return getattr(base, "language_model", base)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(decoder_layers(self.decoder))

    @property
    def names(self) -> list[str]:
        """Names of all stored parameters and buffers, in the model's order; of tied ones the first."""
        return [name for name in self.model.state_dict() if name not in self._tied]

    def ffn(self, layer: int) -> nn.Module:
        """Return a layer's FFN without weights.

        Raises:
            ValueError: The layer has no `mlp`, or its weights are of several types.
        """
        module = self.model.get_submodule(f"{self.layers}.{layer}")
        ffn = getattr(module, "mlp", None)
        if not isinstance(ffn, nn.Module):
            children = [child for child, _ in module.named_children()]
            raise ValueError(
                f"decoder layer {layer} ({type(module).__name__}) has no submodule 'mlp'; it has {children}"
            )
        types = {name: self.entry(f"{self.layers}.{layer}.mlp.{name}").dtype for name in ffn.state_dict()}
        if len(set(types.values())) > 1:
            found = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in types.items())
            raise ValueError(
                f"{self.name}: the FFN of decoder layer {layer} is stored in several types ({found}), and experts have "
                "one: load the model with transformers in one dtype and save it again with save_pretrained"
            )
        return ffn

    def entry(self, name: str) -> Entry:
        """Return shape and type of a parameter."""
        return self.reader.entries[self._key(name)]

    def read(self, name: str) -> Tensor:
        """Read a parameter."""
        return self.reader.read(self._key(name))

    def _key(self, name: str) -> str:
        if name not in self._keys:  # a checkpoint may hold either of two tied weights
            others = [a if b == name else b for a, b in self._tied.items() if name in (a, b)]
            name = next((other for other in others if other in self._keys), name)
        return self._keys[name]

    def _check(self) -> None:
        """Refuse a checkpoint that does not hold what its config promises."""
        known = self.model.state_dict()
        paired = set(self._tied) | set(self._tied.values())
        missing = [name for name in known if name not in self._keys and name not in paired]
        missing += [a for a, b in self._tied.items() if a not in self._keys and b not in self._keys]
        kind = type(self.model).__name__
        if missing:
            raise ValueError(
                f"{self.name} does not hold a whole {kind}: {len(missing)} weights are missing "
                f"({', '.join(missing[:4])}{', …' if len(missing) > 4 else ''})"
            )
        for name in known:
            if name in self._keys and self.entry(name).shape != tuple(known[name].shape):
                raise ValueError(
                    f"{self.name}: {name} is {self.entry(name).shape} on disk, but its config says "
                    f"{tuple(known[name].shape)}"
                )
        for a, b in self._tied.items():
            if a in self._keys and b in self._keys and not torch.equal(self.read(a), self.read(b)):
                raise ValueError(
                    f"{self.name}: the config ties {a} to {b}, but the checkpoint holds two different tensors; set "
                    "tie_word_embeddings to false in its config.json"
                )


def _read_config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory))
    except (OSError, KeyError) as error:
        raise ValueError(f"{directory}: no configuration that can be read: {str(error).splitlines()[0]}") from error
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{directory} is quantised; experts are copied from full-precision weights: give that model")
    return config


def _model_class(name: str, config: Any) -> Any:
    """Return the class with a language-model head that a configuration is of."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ValueError(
        f"{name} is a {config.model_type!r} model: neither a causal language model nor a vision-language model"
    )


def _refuse_sparse(name: str, config: Any, text_config: Any) -> None:
    """Refuse a model that has experts already."""
    counts = [value for field in _EXPERT_COUNTS if (value := getattr(text_config, field, None))]
    if getattr(config, "moe", None) or counts:
        experts = counts[0] if counts else config.moe["num_experts"]
        raise ValueError(
            f"{name} ({config.model_type}) is sparse already: it has {experts} experts; give a dense model"
        )


def read_ffn(source: Source, layer: int) -> nn.Module:
    """Return a layer's FFN with its weights."""
    import copy

    ffn = copy.deepcopy(source.ffn(layer))
    assert not isinstance(ffn, SparseMoeBlock)
    weights = {name: source.read(f"{source.layers}.{layer}.mlp.{name}") for name in ffn.state_dict()}
    ffn.load_state_dict(weights, assign=True)
    return ffn
