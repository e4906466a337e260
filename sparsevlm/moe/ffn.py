"""What kind of FFN a decoder layer has, and its weights in the experts' layout.

Legend: H width, I intermediate width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from sparsevlm.surgery import in_fusion

GATED_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Qwen2, Qwen3, Gemma, Mistral, StableLM, …
    ("w1", "w3", "w2"),  # Llama's original names
    ("w2", "w1", "c_proj"),  # Qwen 1
)
"""Names of gate, up and down: shapes cannot tell gate from up."""

ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
"""Config fields that name the FFN's activation."""


@dataclass(frozen=True)
class FfnLayout:
    """How a dense FFN is put together.

    Attributes:
        hidden_size: H.
        intermediate_size: I.
        gated: gate / up / down (fused or not), else up / down.
        bias: Any projection has a bias.
        hidden_act: Name of the activation.
        dropout: Probability of the dropout on its output.
        up: Names of the projections into the intermediate width: gate and up, the fused one, or up.
        down: Name of the projection back.
    """

    hidden_size: int
    intermediate_size: int
    gated: bool
    bias: bool
    hidden_act: str
    dropout: float
    up: tuple[str, ...]
    down: str


def read_layout(ffn: nn.Module, text_config: Any) -> FfnLayout:
    """Look at a dense FFN's projections.

    Args:
        ffn: The `mlp` of a decoder layer.
        text_config: Configuration of the language model; names width and activation.

    Raises:
        ValueError: The FFN is of a kind that cannot become experts; the message names what was found.
    """
    linears = {name: child for name, child in ffn.named_children() if isinstance(child, nn.Linear | Conv1D)}
    shapes = {name: _shape(child) for name, child in linears.items()}
    hidden = text_config.hidden_size

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"cannot turn the FFN {type(ffn).__name__} into experts: {reason}. It holds projections (out x in) "
            f"{ {name: 'x'.join(map(str, shape)) for name, shape in shapes.items()} } at hidden size {hidden}; known "
            "are gate/up/down, fused gate_up/down and up/down"
        )

    others = [
        f"{name} ({type(child).__name__})"
        for name, child in ffn.named_children()
        if name not in linears and (any(True for _ in child.parameters()) or any(True for _ in child.children()))
    ]
    if any(in_fusion(name) for name, _ in ffn.named_children()):
        raise refuse("it has a visual expert; leave its layer out of upcycle.layers, or set model.fusion.ffn: false")
    if others:
        raise refuse(f"it also holds {', '.join(others)}")
    required = [name for name, item in inspect.signature(ffn.forward).parameters.items() if item.default is item.empty]
    if len(required) != 1:
        raise refuse(f"its forward takes {required}, not hidden states alone")

    up: tuple[str, ...]
    if len(linears) == 3:
        match = next((names for names in GATED_NAMES if set(names) == set(linears)), None)
        if match is None:
            raise refuse("the names do not tell the gate from the up projection")
        up, down, gated = match[:2], match[2], True
        intermediate = shapes[up[0]][0]
        expected = [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    elif len(linears) == 2:
        first, down = linears  # in every known FFN the projection back is registered last
        up, intermediate = (first,), shapes[down][1]
        gated = shapes[first][0] == 2 * intermediate
        expected = [((2 if gated else 1) * intermediate, hidden), (hidden, intermediate)]
    else:
        raise refuse(f"it has {len(linears)} projections")
    if [shapes[name] for name in (*up, down)] != expected:
        raise refuse("the shapes do not lead from the hidden size to an intermediate one and back")
    return FfnLayout(
        hidden_size=hidden,
        intermediate_size=intermediate,
        gated=gated,
        bias=any(child.bias is not None for child in linears.values()),
        hidden_act=_activation(ffn, text_config, refuse),
        dropout=_dropout(ffn),
        up=up,
        down=down,
    )


def expert_weights(ffn: nn.Module, layout: FfnLayout) -> dict[str, Tensor]:
    """Return the FFN's weights under the names and in the layout of one expert (no leading E).

    Raises:
        ValueError: A weight is quantised or sharded away.
    """
    up_name = "gate_up_proj" if layout.gated else "up_proj"
    weights = {
        up_name: torch.cat([_weight(ffn, name) for name in layout.up]),  # (2I | I, H)
        "down_proj": _weight(ffn, layout.down),  # (H, I)
    }
    if layout.bias:
        weights[f"{up_name}_bias"] = torch.cat([_bias(ffn, name) for name in layout.up])  # (2I | I,)
        weights["down_proj_bias"] = _bias(ffn, layout.down)  # (H,)
    return weights


def _shape(linear: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a projection; ZeRO-3 keeps the true shape of a sharded weight in `ds_shape`."""
    weight: Any = linear.weight
    shape = getattr(weight, "ds_shape", weight.shape)
    out_first = tuple(shape) if len(shape) == 2 else (0, 0)  # quantised weights are flat
    return out_first[::-1] if isinstance(linear, Conv1D) else out_first  # pyright: ignore


def _weight(ffn: nn.Module, name: str) -> Tensor:
    """Return a projection's weight as (out, in)."""
    linear = ffn.get_submodule(name)
    weight = linear.weight.detach()  # pyright: ignore
    if not weight.is_floating_point() or weight.ndim != 2:
        raise ValueError(
            f"{type(ffn).__name__}.{name}.weight is {weight.dtype} {tuple(weight.shape)}: experts are copied from "
            "full-precision, unsharded weights; load the model unquantised, and under ZeRO-3 gather it first"
        )
    return weight.t() if isinstance(linear, Conv1D) else weight


def _bias(ffn: nn.Module, name: str) -> Tensor:
    """Return a projection's bias, zeros where it has none but another projection does."""
    linear = ffn.get_submodule(name)
    if linear.bias is not None:
        return linear.bias.detach()  # pyright: ignore
    weight = _weight(ffn, name)
    return weight.new_zeros(weight.shape[0])


def _activation(ffn: nn.Module, text_config: Any, refuse: Any) -> str:
    """Return the activation's name, checked against the module that the FFN holds."""
    name = next(
        (value for field in ACTIVATION_FIELDS if isinstance(value := getattr(text_config, field, None), str)), None
    )
    if name is None or name not in ACT2FN:
        raise refuse(f"the config names no known activation (looked at {', '.join(ACTIVATION_FIELDS)}, found {name!r})")
    held = [
        child
        for field in ("act_fn", "activation_fn", "act")
        if isinstance(child := getattr(ffn, field, None), nn.Module)
    ]
    if held and type(held[0]) is not type(ACT2FN[name]):
        raise refuse(f"the config names the activation {name!r} but the FFN holds {type(held[0]).__name__}")
    return name


def _dropout(ffn: nn.Module) -> float:
    """Return the probability of the dropout that closes an FFN (GPT-2's `dropout`, StarCoder2's number)."""
    for child in ffn.children():
        if isinstance(child, nn.Dropout):
            return child.p
    return float(getattr(ffn, "residual_dropout", 0.0))
