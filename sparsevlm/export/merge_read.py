"""From an adapter's tensors to what becomes of each weight of its base.

Which weight a tensor belongs to, at which rank, scaling and orientation, is not worked out here: PEFT attaches the
adapter to a model without weights and sorts the tensors in, as it would for a model in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsevlm.adapters.saved import ADAPTER_WEIGHTS
from sparsevlm.export.merge_adapter import AdapterFolder
from sparsevlm.export.merge_deltas import Edit, Edits, LowRank
from sparsevlm.export.merge_plain import read_plain

if TYPE_CHECKING:
    from sparsevlm.export.merge_base import Base

_NAME = "default"
_PREFIX = "base_model.model."


def read_edits(adapter: AdapterFolder, base: Base) -> Edits:
    """Sort an adapter's tensors to the weights of its base.

    Raises:
        ValueError: The adapter does not fit the base: modules that it has not, shapes, missing or superfluous tensors;
            a tensor is not finite; or a layer is one that cannot be merged on disk.
    """
    config, file = peft_config(adapter, base.tied), load_file(adapter.directory / ADAPTER_WEIGHTS)
    plain = read_plain(config, file, base)
    if plain is not None:
        return plain
    model, tensors = _attach(adapter, base, config, file)
    by_name: dict[str, Edit] = {}

    def edit(name: str) -> Edit:
        assert name in base.shapes, f"{name} is no weight of {base.model_class.__name__}"
        return by_name.setdefault(name, Edit())

    for path, module in model.named_modules():
        name = _own_name(path)
        for part, change in _changes(path, module, adapter, _Taker(path, tensors, adapter, base)):
            change(edit(f"{name}.{part}"))
    for key in list(tensors):  # biases, and embeddings that PEFT saved beside
        name = _own_name(key)
        if name not in base.shapes:
            continue
        by_name.setdefault(name, Edit()).value = _fitting(key, tensors.pop(key), base.shapes[name], adapter, base)
    if tensors:
        raise ValueError(
            f"{adapter.name} holds {len(tensors)} tensors that {base.name} ({base.model_class.__name__}) has no place "
            f"for ({', '.join(sorted(tensors)[:3])}); was it trained on another model? Name that one with --base"
        )
    return Edits.of(by_name)


def peft_config(adapter: AdapterFolder, tied: Mapping[str, str]) -> Any:
    """Return PEFT's configuration of an adapter.

    An adapter of tied embeddings (`ensure_weight_tying`) names one of them once PEFT has saved it, so that PEFT loads
    it without the other. Here both are named again, as when it was trained.

    Args:
        adapter: The adapter.
        tied: Names of weights that share another: ``{name: the other's name}``.
    """
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(adapter.directory))
    if getattr(config, "ensure_weight_tying", False) and isinstance(config.target_modules, set):
        with safe_open(adapter.directory / ADAPTER_WEIGHTS, framework="pt") as file:
            keys = list(file.keys())
        adapted = {key.removeprefix(_PREFIX).partition(".lora_")[0] for key in keys if ".lora_" in key}
        config.target_modules |= {name.removesuffix(".weight") for name in tied} & adapted
    return config


def _attach(
    adapter: AdapterFolder, base: Base, config: Any, file: dict[str, Tensor]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return PEFT's model on the meta device, and the adapter's tensors by their names in it."""
    from peft import PeftModel, set_peft_model_state_dict

    config.inference_mode = True
    sorted_in: dict[str, Tensor] = {}

    def keep(state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        sorted_in.update(state_dict)

    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            model: Any = PeftModel(base.skeleton(), config, _NAME, low_cpu_mem_usage=True)
            model.load_state_dict = keep  # the last thing that PEFT does with them
            set_peft_model_state_dict(model, file, _NAME)
    except KeyError as error:
        raise ValueError(f"{adapter.name} lacks {error}, which its configuration promises; save it again") from error
    except (ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{adapter.name} does not fit {base.name} ({base.model_class.__name__}); was it trained on another model? "
            f"Name that one with --base. PEFT says: {error}"
        ) from error
    broken = [key for key, tensor in sorted_in.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{adapter.name}: {broken[0]} and {len(broken) - 1} more hold values that are not finite")
    return model, sorted_in


def _own_name(path: str) -> str:
    """Return the name in the base of what PEFT's model calls something else."""
    parts = path.removeprefix(_PREFIX).split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


class _Taker:
    """Takes one module's tensors out of the adapter's, checking their shapes."""

    def __init__(self, path: str, tensors: dict[str, Tensor], adapter: AdapterFolder, base: Base) -> None:
        self._path, self._tensors, self._adapter, self.base = path, tensors, adapter, base

    def __call__(self, key: str, shape: tuple[int, ...]) -> Tensor:
        key = f"{self._path}.{key}"
        if key not in self._tensors:
            raise ValueError(f"{self._adapter.name} lacks {key}, which its configuration promises; save it again")
        return _fitting(key, self._tensors.pop(key), shape, self._adapter, self.base)

    def weight_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight of the base."""
        return self.base.shapes[name]


def _fitting(key: str, tensor: Tensor, shape: tuple[int, ...], adapter: AdapterFolder, base: Base) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{adapter.name}: {key} is {tuple(tensor.shape)}, but {base.name} needs {shape}; the adapter was trained "
            "on a model of other sizes (another model, or one with a resized vocabulary): name that one with --base"
        )
    return tensor


_Change = tuple[str, Callable[[Edit], None]]


def _changes(path: str, module: nn.Module, adapter: AdapterFolder, take: _Taker) -> list[_Change]:
    """Return the weights below a module of PEFT that change, and how."""
    from peft.tuners.lora import layer as lora
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    name, anything = _own_name(path), _shape
    if isinstance(module, ModulesToSaveWrapper):
        saved = module.modules_to_save[_NAME].state_dict()
        values = {key: take(f"modules_to_save.{_NAME}.{key}", anything(tensor)) for key, tensor in saved.items()}
        return [(key, _replace(value)) for key, value in values.items()]
    if isinstance(module, TrainableTokensWrapper):
        tokens: Any = module.token_adapter
        if tokens.tied_adapter:
            return [("weight", _follow)]
        wanted = anything(tokens.trainable_tokens_delta[_NAME])
        rows = take(f"token_adapter.trainable_tokens_delta.{_NAME}", wanted)
        return [("weight", _replace_rows(torch.tensor(tokens.token_indices[_NAME]), rows))]
    if not isinstance(module, lora.LoraLayer):
        return []
    layer: Any = module
    scaling = float(layer.scaling[_NAME])
    if isinstance(layer, lora.ParamWrapper):
        shape = take.weight_shape(f"{name}.{layer.parameter_name}")
        a, b = (take(f"lora_{x}.{_NAME}.weight", anything(getattr(layer, f"lora_{x}")[_NAME].weight)) for x in "AB")
        if len(shape) == 2:
            return [(layer.parameter_name, _add(LowRank(a, b, scaling, shape)))]
        experts = shape[0]
        a = a.reshape(experts, -1, a.shape[-1])  # (E, r, in)
        b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (E, out, r)
        transposed = bool(getattr(layer.get_base_layer(), "is_transposed", False))
        return [(layer.parameter_name, _add(LowRank(a, b, scaling, shape, True, transposed)))]
    shape = take.weight_shape(f"{name}.weight")
    if isinstance(layer, lora.Embedding):
        a, b = (
            take(f"lora_embedding_{x}.{_NAME}", anything(getattr(layer, f"lora_embedding_{x}")[_NAME])) for x in "AB"
        )
        transposed = True
    elif isinstance(layer, lora.Linear | lora.Conv1d | lora.Conv2d | lora.Conv3d):
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise ValueError(f"{adapter.name}: {name} is a grouped convolution, for which PEFT defines no merging")
        a, b = (take(f"lora_{x}.{_NAME}.weight", anything(getattr(layer, f"lora_{x}")[_NAME].weight)) for x in "AB")
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
    else:
        raise ValueError(
            f"{adapter.name}: {name} has a LoRA layer of the kind {type(layer).__name__}, which cannot be merged on "
            "disk; use PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()"
        )
    magnitude = None
    if _NAME in layer.lora_magnitude_vector:
        vector = layer.lora_magnitude_vector[_NAME].weight
        magnitude = take(f"lora_magnitude_vector.{_NAME}.weight", anything(vector))
    changes: list[_Change] = [("weight", _add(LowRank(a, b, scaling, shape, False, transposed, magnitude)))]
    if layer.lora_bias.get(_NAME):
        if f"{name}.bias" not in take.base.shapes:
            raise ValueError(f"{adapter.name} has lora_bias, but {name} has no bias to merge it into; keep the adapter")
        bias = take(f"lora_B.{_NAME}.bias", take.weight_shape(f"{name}.bias"))
        changes.append(("bias", _shift(bias.float() * scaling)))
    return changes


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _add(change: LowRank) -> Callable[[Edit], None]:
    return lambda edit: edit.changes.append(change)


def _replace(value: Tensor) -> Callable[[Edit], None]:
    return lambda edit: setattr(edit, "value", value)


def _replace_rows(indices: Tensor, rows: Tensor) -> Callable[[Edit], None]:
    return lambda edit: setattr(edit, "rows", (indices, rows))


def _shift(shift: Tensor) -> Callable[[Edit], None]:
    return lambda edit: setattr(edit, "shift", shift)


def _follow(edit: Edit) -> None:
    edit.follows = True
