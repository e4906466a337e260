"""Adapters on a model: attached, saved, loaded, taken off again. The only file that touches PEFT's tables.

While an adapter is attached the model is no `PeftModel`: PEFT's layers stand in the place of the adapted ones, all
other names stay. What trains in full beside the adapter (connector, fusion) is trained where it is, and saved as PEFT
saves `modules_to_save`, so that PEFT alone restores it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.adapters.prepared import Prepared
from sparsevlm.adapters.quantise import Quantised, forget_marks, settings_of, unshared
from sparsevlm.adapters.saved import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_parent
from sparsevlm.recipe.adapter import Adapter
from sparsevlm.surgery import FUSION_MODULES

NAME = "default"
"""PEFT's name of the one adapter that a model here has."""

PREPARE = {
    "lora": "lora",
    "qlora": "qlora",
    "mma": "mma.prepare",
    "lora_experts": "lora_experts.prepare",
    "partial_lora": "token_lora.prepare",
    "slice_lora": "token_lora.prepare",
}
"""Type of a recipe's adapter -> module of this folder whose ``prepare(model, spec)`` returns a `Prepared`."""

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter was attached to.

    Attributes:
        type: Kind of adapter, as in the recipe.
        counts: Modules and stacked parameters that each target names.
        modules: Modules that are adapted.
        parameters: Stacked parameters that are adapted.
        trainable: Parameters of the adapter.
        quantised: What of the model was quantised.
    """

    type: str
    counts: dict[str, int]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    trainable: int
    quantised: Quantised | None = None

    def describe(self) -> str:
        """Return one line for the console."""
        each = ", ".join(f"{target} ({count})" for target, count in self.counts.items())
        stacked = f" and {len(self.parameters)} stacked weights" if self.parameters else ""
        quantised = f"; on {self.quantised.describe()}" if self.quantised else ""
        return f"{self.type} on {len(self.modules)} modules{stacked}: {each}; {self.trainable:,} parameters{quantised}"


def has_adapter(model: nn.Module) -> bool:
    """Tell whether an adapter is attached."""
    return bool(getattr(model, "peft_config", None))


def attach(model: Any, spec: Adapter, *, seed: int = 0, start: Mapping[str, Tensor] | None = None) -> AdapterReport:
    """Attach a fresh adapter, in place; also on the meta device, where nothing is drawn.

    Its weights are float32, whatever the model's are, and depend on `seed` alone. The model computes what it did
    before. What trains is chosen afterwards (`train.parts.select_trainable`).

    Args:
        model: A `SparseVLMForConditionalGeneration` without an adapter.
        spec: The recipe's section.
        seed: Of the adapter's weights.
        start: What an adapter begins with that is made before training (`inits.draw_start`). Needed on the real device
            where it is made from data; one that is made from the weights is made here by default.

    Raises:
        ValueError: A target matches nothing (`TargetError`), or cannot be adapted as asked.
    """
    assert not has_adapter(model), "an adapter is attached already"
    prepared = _prepare(model, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, prepared.config)
        if prepared.finish is not None:
            prepared.finish(model, start)
    trainable = sum(parameter.numel() for _, parameter in _weights(model))
    return AdapterReport(
        spec.type, prepared.counts, prepared.modules, prepared.parameters, trainable, prepared.quantised
    )


def _prepare(model: Any, spec: Adapter) -> Prepared:
    """Have the section's type find its places in the model."""
    module = import_module(f"sparsevlm.adapters.{PREPARE[spec.type]}")
    return module.prepare(model, spec)


def _inject(model: Any, config: Any) -> None:
    """Put PEFT's layers in place; nothing trains then."""
    from peft import inject_adapter_in_model

    meta = any(parameter.is_meta for parameter in model.parameters())
    with warnings.catch_warnings():
        # PEFT names the weights of routers by `weight`, and takes them for layers that it knows better.
        warnings.filterwarnings("ignore", message=".*target_parameters.*")
        with _known_as_quantised(model):
            inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=meta)
    for _, parameter in _weights(model):
        parameter.data = parameter.data.float()
    model.requires_grad_(False)
    model.train(model.training)  # PEFT's new layers are in training mode, whatever the model is in
    model._ddp_params_and_buffers_to_ignore = unshared(model)


@contextmanager
def _known_as_quantised(model: Any) -> Iterator[None]:
    """Have PEFT take the layers that know quantised weights.

    It asks the model for what transformers' loader would have set. It is set for no longer: trl would round the
    adapter to bfloat16.
    """
    settings = settings_of(model)
    if settings is None:
        yield
        return
    flag = "is_loaded_in_8bit" if settings.kind == "int8" else "is_loaded_in_4bit"
    setattr(model, flag, True)
    try:
        yield
    finally:
        delattr(model, flag)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapter's own parameters."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if is_adapter_parameter(name))


def adapter_state(model: Any, state: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Return what an adapter directory holds: tensors under PEFT's names, and the modules saved whole.

    Args:
        model: Model with an adapter, its `requires_grad` as trained: blocks of connector and fusion that train are
            saved whole.
        state: Its state dict, where the model itself holds only shards.
    """
    from peft import get_peft_model_state_dict

    from sparsevlm.adapters.experts import whole_stacks
    from sparsevlm.adapters.inits import as_plain

    whole = dict(model.state_dict() if state is None else state)
    blocks = [
        name
        for name, block in model.named_modules()
        if (name.rpartition(".")[0] == "model.connector" or name.rpartition(".")[2] in FUSION_MODULES)
        and any(p.requires_grad and not is_adapter_parameter(inner) for inner, p in block.named_parameters())
    ]
    tensors = get_peft_model_state_dict(model, whole, NAME, save_embedding_layers=False)
    tensors = whole_stacks(model, as_plain(model, tensors))
    tensors |= {key: value for key, value in whole.items() if key.startswith(tuple(f"{block}." for block in blocks))}
    return {f"{_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in sorted(tensors.items())}, blocks


def save_adapter(
    model: Any, directory: Path, parent: Path, state: Mapping[str, Tensor] | None = None, home: Path | None = None
) -> None:
    """Write an adapter as PEFT writes it, and `parent.json`.

    Args:
        model: As for `adapter_state`.
        directory: Where to; made when it is not there.
        parent: Directory of the whole model that the adapter was trained on.
        state: As for `adapter_state`.
        home: Directory that the files are moved to afterwards, where that is another.
    """
    from safetensors.torch import save_file

    from sparsevlm.adapters.inits import plain_fields

    directory.mkdir(parents=True, exist_ok=True)
    tensors, blocks = adapter_state(model, state)
    config = model.peft_config[NAME]
    fields = plain_fields(model, config.to_dict()) | {
        "base_model_name_or_path": str(parent.resolve()),
        "modules_to_save": blocks or None,
        "inference_mode": True,
    }
    # Sets have another order in every process; equal adapters are to give equal files.
    ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(fields.items())}
    text = json.dumps(ordered, indent=2, default=str)
    (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    settings = settings_of(model)
    write_parent(directory, parent, home, None if settings is None else settings.to_dict())


def load_adapter(model: Any, directory: Path) -> None:
    """Attach a saved adapter to the model that it was trained on, in place; nothing trains then.

    Args:
        model: The parent, already checked (`saved.find_parent`).
        directory: What `save_adapter` wrote.

    Raises:
        ValueError: The file does not hold all the weights that the configuration asks for, or others too.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    config: Any = PeftConfig.from_pretrained(str(directory))
    blocks, config.modules_to_save = list(config.modules_to_save or []), None
    with torch.random.fork_rng(devices=[]):
        _inject(model, config)
    saved = load_file(directory / ADAPTER_WEIGHTS)
    whole = {
        block: {key.removeprefix(f"{_PREFIX}{block}."): saved.pop(key) for key in list(saved)
                if key.startswith(f"{_PREFIX}{block}.")}
        for block in blocks
    }  # fmt: skip
    try:
        for block, tensors in whole.items():
            model.get_submodule(block).load_state_dict(tensors)
        result = set_peft_model_state_dict(model, saved, NAME)
    except RuntimeError as error:  # shapes that differ, or a block's keys
        raise ValueError(f"{directory / ADAPTER_WEIGHTS} does not fit its model: {error}") from error
    wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if is_adapter_parameter(key))]
    if wrong:
        raise ValueError(
            f"{directory / ADAPTER_WEIGHTS} does not hold the adapter that {ADAPTER_CONFIG} describes: {len(wrong)} "
            f"weights are missing or unknown ({', '.join(wrong[:3])})"
        )


@torch.no_grad()
def detach(model: Any, *, merge: bool) -> None:
    """Take the adapter off, in place; with ``merge`` its weights are added to those that it adapted.

    Raises:
        ValueError: The merged weights are not finite, or the model's weights are quantised.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from sparsevlm.adapters.inits import take_back

    if merge and settings_of(model) is not None:
        raise ValueError(
            "an adapter is not merged into quantised weights: load it on the stored ones, with "
            "load_model(..., quantised=False), or use 'sparsevlm merge' on its directory"
        )
    forget_marks(model)
    take_back(model, merged=merge)
    for name, module in reversed(list(model.named_modules())):  # layers within layers first, while their names hold
        if not isinstance(module, BaseTunerLayer) or name.endswith(".base_layer"):
            continue
        layer: Any = module
        while hasattr(layer, "base_layer"):  # one around another, where several stacks of a module are adapted
            if merge:
                layer.merge(safe_merge=True)
            layer = layer.base_layer
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    del model.peft_config
