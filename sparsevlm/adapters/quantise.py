"""Quantising a loaded model in place, so that adapters train on 4- or 8-bit weights (QLoRA).

Linear layers become bitsandbytes' (`quantised_matrix.py`), stacked experts `QuantisedStack`. Token embeddings, the
output head, routers, norms and biases stay as they are. What was quantised is known by the weights' names: with those
and the settings, equal weights are quantised again to equal bits, so that no quantised weight is ever saved.

On the meta device weights are only marked, and count with the bytes that they would have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from math import ceil, prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsevlm.adapters.quantised_stack import Packed, QuantisedStack
from sparsevlm.adapters.targets import parts_of_model

Kind = Literal["nf4", "fp4", "int8"]

_PARTS = {
    "language": ("language.attention", "language.ffn", "moe.experts"),
    "vision": ("vision.attention", "vision.ffn"),
    "connector": ("connector",),
}
_MARK = "quantised_as"
_SETTINGS = "quantisation_settings"
BLOCK, _OUTER_BLOCK = 64, 256


@dataclass(frozen=True)
class Settings:
    """How a model's weights are quantised; ``parent.json`` has them under ``quantization``.

    Attributes:
        kind: Numbers that a weight is rounded to.
        double: The constants of 4 bits are quantised, too.
        compute_dtype: Type that products are computed in: ``auto`` is that of the layer's input, or autocast's.
        dtype: Type of the weights that were quantised, and of all that were not.
        weights: Names of the weights.
    """

    kind: Kind = "nf4"
    double: bool = True
    compute_dtype: str = "auto"
    dtype: str = "float32"
    weights: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        return asdict(self) | {"weights": list(self.weights)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Settings:
        """Read what `to_dict` returned.

        Raises:
            ValueError: It is something else.
        """
        try:
            settings = cls(**record)
            return replace(settings, weights=tuple(settings.weights))
        except TypeError as error:
            raise ValueError(f"the quantisation of an adapter's parent is not described as expected: {error}") from None

    @property
    def chosen_dtype(self) -> torch.dtype | None:
        """The type to compute in, None for ``auto``."""
        return None if self.compute_dtype == "auto" else getattr(torch, self.compute_dtype)


@dataclass(frozen=True)
class Quantised:
    """What was quantised.

    Attributes:
        kind: To what.
        layers: Linear layers.
        stacks: Stacks of experts.
        parameters: Numbers in both.
        before: Their bytes as they were.
        after: Their bytes with all constants.
        left: Other matrices and stacks of the decoder's layers, but for routers: none is left out silently.
    """

    kind: str
    layers: int
    stacks: int
    parameters: int
    before: int
    after: int
    left: tuple[str, ...] = field(default=())

    def describe(self) -> str:
        """Return a line for the console."""
        stacks = f" and {self.stacks} stacks of experts" if self.stacks else ""
        left = f"; left as they are: {', '.join(self.left)}" if self.left else ""
        return (
            f"{self.layers} linear layers{stacks} in {self.kind}: {self.parameters:,} parameters, "
            f"{self.before / 2**20:.1f} -> {self.after / 2**20:.1f} MiB{left}"
        )


def require_bitsandbytes() -> None:
    """Refuse to go on where bitsandbytes is not installed.

    Raises:
        ValueError: It is not.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "an adapter of type 'qlora' needs bitsandbytes, which is not installed: pip install 'sparsevlm[quant]'"
        )


def weights_to_quantise(model: Any, parts: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the weights that parts mean, in the model's order; also on the meta device.

    Args:
        model: A `SparseVLMForConditionalGeneration`.
        parts: Of `language` (with its experts), `vision`, `connector`.

    Raises:
        ValueError: A part has no weight that can be quantised, or one that cannot be.
    """
    found = []
    for part in parts:
        names = [name for name, its in parts_of_model(model).items() if its in _PARTS[part]]
        weights = []
        for name in names:
            module = None if _is_parameter(model, name) else model.get_submodule(name)
            if module is None:
                weights.append(name)
            elif isinstance(module, nn.Linear):
                weights.append(f"{name}.weight")
            elif hasattr(module, "weight") and module.weight.ndim == 2 and not isinstance(module, nn.Embedding):
                raise ValueError(
                    f"{name} is a {type(module).__name__}, which cannot be quantised; take {part!r} out of 'quantise', "
                    "or use 'type: lora'"
                )
        if not weights:
            raise ValueError(f"'quantise' names {part!r}, but the model has no linear layers there")
        found += weights
    return tuple(found)


def _is_parameter(model: nn.Module, name: str) -> bool:
    prefix, _, last = name.rpartition(".")
    return last in model.get_submodule(prefix)._parameters


@torch.no_grad()
def quantise(model: Any, settings: Settings) -> Quantised:
    """Quantise the weights that the settings name, in place.

    Args:
        model: A model without an adapter. On the meta device its weights are marked only.
        settings: With the names, of `weights_to_quantise`.

    Raises:
        ValueError: bitsandbytes is not installed, or the model has no such weight.
    """
    assert getattr(model, _SETTINGS, None) is None, "the model is quantised already"
    meta = any(parameter.is_meta for parameter in model.parameters())
    if not meta:
        require_bitsandbytes()
    known = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in settings.weights if name not in known]
    if missing:
        raise ValueError(
            f"the model has no weight {missing[0]} ({len(missing)} of those that were quantised are missing)"
        )
    left = tuple(_left_out(model, set(settings.weights)))
    before = after = stacks = parameters = 0
    for name in settings.weights:
        weight = known[name]
        before, parameters = before + weight.nbytes, parameters + weight.numel()
        stacks += weight.ndim == 3
        if meta:
            setattr(weight, _MARK, settings)
            after += packed_bytes(weight.shape, settings)
        else:
            after += _replace(model, name, settings)
    if not meta:
        del known
        setattr(model, _SETTINGS, settings)
    return Quantised(settings.kind, len(settings.weights) - stacks, stacks, parameters, before, after, left)


def _replace(model: nn.Module, name: str, settings: Settings) -> int:
    """Put the quantised form in a weight's place and return its bytes."""
    from sparsevlm.adapters.quantised_matrix import Linear4, Linear8, quantise_matrix

    prefix, _, last = name.rpartition(".")
    owner: Any = model.get_submodule(prefix)
    weight: Any = owner.get_parameter(last)
    if weight.ndim == 3:
        packed = Packed([quantise_matrix(matrix, settings.kind, settings.double) for matrix in weight], weight.shape)
        packed.to(weight.device)
        stack: Any = QuantisedStack
        owner.register_parameter(last, stack(packed, weight.dtype, weight.device))
        owner.compute_dtype = settings.chosen_dtype
        return packed.bytes
    dtype = settings.chosen_dtype
    layer = Linear8(owner, dtype) if settings.kind == "int8" else Linear4(owner, settings.kind, settings.double, dtype)
    above, _, child = prefix.rpartition(".")
    setattr(model.get_submodule(above), child, layer)
    return layer.bytes


def _left_out(model: Any, chosen: set[str]) -> Iterator[str]:
    """Yield matrices and stacks of the decoder's layers that are neither quantised nor a router's."""
    parts = parts_of_model(model)
    if not any(name.startswith("model.language_model.") for name in chosen):
        return
    for name, parameter in model.model.language_model.named_parameters(prefix="model.language_model"):
        part = parts.get(name) or parts.get(name.rpartition(".")[0], "")
        embedding = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        inner = parameter.ndim > 1 and "bias" not in name and not embedding
        if inner and name not in chosen and part != "moe.router":
            yield name


def settings_of(model: Any) -> Settings | None:
    """Return how a model is quantised, None where it is not."""
    return getattr(model, _SETTINGS, None)


def replayed(name: str, weight: Tensor, settings: Settings | dict[str, Any]) -> Tensor:
    """Return a weight as training on the quantised model saw it: quantised and dequantised, in float32.

    Args:
        name: Of the weight in the model, without an adapter's wrappers.
        weight: As the parent's files hold it, ``(out, in)`` or ``(E, out, in)``.
        settings: ``quantization`` of ``parent.json``. A weight that they do not name comes back as it was loaded.
    """
    settings = settings if isinstance(settings, Settings) else Settings.from_dict(settings)
    weight = weight.to(getattr(torch, settings.dtype)).float()
    if name not in settings.weights:
        return weight
    from sparsevlm.adapters.quantised_matrix import quantise_matrix

    matrices = weight if weight.ndim == 3 else weight[None]
    back = [quantise_matrix(m, settings.kind, settings.double).dequantise(torch.float32) for m in matrices]
    return torch.stack(back).reshape(weight.shape)


def packed_bytes(shape: Sequence[int], settings: Settings) -> int:
    """Return the bytes of a quantised weight with its constants.

    4 bits: half a byte a number; 4 bytes a block of 64, or doubly quantised 1 byte a block, 4 bytes 256 blocks and 4
    bytes a matrix. 8 bits: a byte a number and 4 bytes a row. Stacks: each expert by itself.
    """
    experts, (rows, columns) = prod(shape[:-2]), shape[-2:]
    if settings.kind == "int8":
        return experts * rows * (columns + 4)
    blocks = ceil(rows * columns / BLOCK)
    constants = blocks + 4 * ceil(blocks / _OUTER_BLOCK) + 4 if settings.double else 4 * blocks
    return experts * (ceil(rows * columns / 2) + constants)


def quantised_bytes(parameter: Any) -> int | None:
    """Return the bytes of a quantised weight with its constants, also of a marked one; None of any other."""
    if isinstance(parameter, QuantisedStack):
        return parameter.packed.bytes
    mark = getattr(parameter, _MARK, None)
    if mark is not None:
        return packed_bytes(parameter.shape, mark)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        nested = state.state2.absmax.nbytes + state.offset.nbytes if state.nested else 0
        return parameter.nbytes + state.absmax.nbytes + nested
    if parameter.dtype == torch.int8:
        return parameter.nbytes + 4 * parameter.shape[0]
    return None


def forget_marks(model: nn.Module) -> None:
    """Take the marks off a model on the meta device."""
    for parameter in model.parameters():
        if hasattr(parameter, _MARK):
            delattr(parameter, _MARK)


def unshared(model: nn.Module) -> list[str]:
    """Return the names of quantised stacks: no numbers of their own that the first process could give to the others."""
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, QuantisedStack)]
