"""Features of any transformers vision tower, as one grid of tokens a frame.

A tower's layout (tokens before the grid, grid, width) is never kept in a table: it is read off a forward pass, at run
time from the features themselves and ahead of time from a pass on the meta device, which costs no memory and no
arithmetic. Both go through :func:`_layer_maps`, so that what is counted is what is computed.

Which layer an index means:

* Towers of transformers: ``hidden_states[layer]``. 0 is the embeddings, ``i`` the output of block ``i``, -1 the output
  of the last block *before* a final layer norm, -2 the block before it (LLaVA). Native LLaVA classes index the same
  tuple.
* timm networks (`TimmWrapperModel`): -1 is the network's final feature map, final norm or head convolution included;
  other indices are timm's ``forward_intermediates``: blocks of a ViT, stages of a CNN, counted from 0 (no embeddings).

Legend: F frames, H x W pixels, n tokens a frame, p prefix tokens, h x w grid, C width of a layer, D of all layers.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Layer = int | Sequence[int]
Select = Literal["patch", "full"]


class TowerLayout(NamedTuple):
    """Tokens that a layer gives for one frame: `prefix` tokens (CLS, registers), then an `h` x `w` grid, `dim` wide."""

    prefix: int
    h: int
    w: int
    dim: int


def vision_subconfig(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the tower's own config of a composite one (CLIP, SigLIP), or ``config`` itself."""
    return getattr(config, "vision_config", config)


def default_image_size(vision_config: PreTrainedConfig) -> int:
    """Return the side in pixels that the tower was made for.

    Raises:
        ValueError: The config names none, or sides that differ.
    """
    size = getattr(vision_config, "image_size", None)
    if size is None and vision_config.model_type == "timm_wrapper":
        size = timm_pretrained_cfg(vision_config).get("input_size", (None,))[-1]
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    side = sides.pop()
    if sides or side is None:
        raise ValueError(
            f"vision tower {vision_config.model_type!r}: its config gives image_size {size!r}; "
            "set model.vision.image_size to the side in pixels"
        )
    return int(side)


def let_resize(vision_config: Any) -> None:
    """Have a network of timm that was made for pictures of one size take others too, in place: a ViT by resampling its
    positions. Towers of transformers are asked at every call instead."""
    if vision_config.model_type != "timm_wrapper" or not timm_pretrained_cfg(vision_config).get("fixed_input_size"):
        return
    import timm

    options = {"dynamic_img_size": True, **(vision_config.model_args or {})}
    try:
        with torch.device("meta"):
            network = timm.create_model(vision_config.architecture, pretrained=False, num_classes=0, **options)
    except (TypeError, AssertionError):  # it knows no such option
        return
    if getattr(network, "dynamic_img_size", False):  # else it swallows the option
        vision_config.model_args = options


def timm_pretrained_cfg(vision_config: PreTrainedConfig) -> dict[str, Any]:
    """Return timm's preprocessing facts of a `TimmWrapperConfig`: input_size (C, H, W), mean, std, interpolation."""
    known = getattr(vision_config, "pretrained_cfg", None)
    if known:
        return dict(known)
    import timm

    cfg = timm.get_pretrained_cfg(vision_config.architecture, allow_unregistered=True)
    return {} if cfg is None else cfg.to_dict()


def num_prefix_tokens(vision_config: PreTrainedConfig) -> int:
    """Return how many tokens come before the grid (CLS, distillation, registers)."""
    return _probe(vision_config, default_image_size(vision_config), (-1,))[0].prefix


def output_grid(
    vision_config: PreTrainedConfig, image_size: int, layer: Layer = -1, select: Select = "patch"
) -> tuple[int, int]:
    """Return the ``(h, w)`` grid that a square frame of ``image_size`` pixels leaves the tower with.

    With ``select="full"`` prefix tokens stay, and where the tower has any there is no grid left: ``(1, p + h * w)``.

    Raises:
        ValueError: The tower cannot take frames of that size, or has no such layer.
    """
    layouts = _probe(vision_config, image_size, as_layers(layer))
    _check_same_grid(layouts, layer)
    prefix, h, w, _ = layouts[0]
    return (h, w) if select == "patch" or prefix == 0 else (1, prefix + h * w)


def feature_dim(vision_config: PreTrainedConfig, layer: Layer = -1) -> int:
    """Return the feature width D; layers of a list are concatenated."""
    return sum(layout.dim for layout in _probe(vision_config, default_image_size(vision_config), as_layers(layer)))


def encode_frames(
    tower: nn.Module,
    pixel_values: Tensor,
    layer: Layer = -1,
    select: Select = "patch",
    chunk: int | None = None,
) -> Tensor:
    """Return the features of frames.

    Args:
        tower: Model of a transformers vision class.
        pixel_values: ``(F, 3, H, W)``, normalised; cast to the tower's dtype. Sizes other than the trained one use the
            tower's own interpolation of position embeddings.
        layer: Hidden layer, or layers whose features are concatenated (see the module's head for what an index means).
        select: ``patch`` drops the p prefix tokens, ``full`` keeps them.
        chunk: Frames that go through the tower at once; None takes all. It bounds memory where no gradient is kept, and
            does not change the result beyond the rounding of differently shaped matrix products.

    Returns:
        ``(F, n, D)``; ``n = h * w`` in raster order, plus p with ``full``.

    Raises:
        ValueError: No such layer, or layers whose grids differ (stages of a CNN).
    """
    assert pixel_values.shape[0] > 0, "no frames"
    layers = as_layers(layer)
    encoded = []
    for frames in pixel_values.split(chunk or pixel_values.shape[0]):
        maps = _layer_maps(tower, frames, layers)
        _check_same_grid([layout for _, layout in maps], layer)
        if select == "patch":
            features = [tokens[:, layout.prefix :] for tokens, layout in maps]
        else:
            features = [tokens for tokens, _ in maps]
        encoded.append(features[0] if len(features) == 1 else torch.cat(features, dim=-1))  # (f, n, D)
    return encoded[0] if len(encoded) == 1 else torch.cat(encoded)


def frame_maps(tower: nn.Module, pixel_values: Tensor, layer: Layer = -1) -> Tensor:
    """Return the features of frames without prefix tokens as maps, ``(F, D, h, w)``; see `encode_frames`."""
    layers = as_layers(layer)
    found = _layer_maps(tower, pixel_values, layers)
    _check_same_grid([layout for _, layout in found], layer)
    features = torch.cat([tokens[:, layout.prefix :] for tokens, layout in found], dim=-1)  # (F, h * w, D)
    return features.transpose(1, 2).unflatten(2, (found[0][1].h, found[0][1].w))


def as_layers(layer: Layer) -> tuple[int, ...]:
    """Return the layers of an option that names one or several."""
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    if not layers:
        raise ValueError("vision layer: an empty list selects no features; name at least one hidden layer")
    return layers


def _check_same_grid(layouts: Sequence[TowerLayout], layer: Layer) -> None:
    if len({layout[:3] for layout in layouts}) > 1:
        grids = ", ".join(f"{layout.h}x{layout.w} after {layout.prefix} prefix tokens" for layout in layouts)
        raise ValueError(
            f"vision layers {list(as_layers(layer))} have different grids ({grids}) and cannot be concatenated; "
            "name layers of one grid"
        )


def _layer_maps(tower: Any, pixel_values: Tensor, layers: Sequence[int]) -> list[tuple[Tensor, TowerLayout]]:
    """Return, for each layer, all its tokens ``(F, p + h * w, C)`` and how they are laid out."""
    config = tower.config
    if not getattr(tower, "takes_float_pixels", False):
        pixel_values = pixel_values.to(tower.dtype)
    is_timm = config.model_type == "timm_wrapper"
    states = (_timm_states if is_timm else _hidden_states)(tower, pixel_values, layers)
    maps = []
    for state in states:
        if state.ndim == 4:  # (F, C, h, w), no prefix
            h, w = state.shape[-2:]
            prefix, tokens = 0, state.flatten(2).transpose(1, 2)  # (F, h * w, C)
        else:
            tokens = state
            if is_timm:
                prefix = getattr(tower.timm_model, "num_prefix_tokens", 0)
                h, w = _square(tokens.shape[1] - prefix, config)
            else:
                prefix, h, w = _split_sequence(tokens.shape[1], config, *pixel_values.shape[-2:])
        maps.append((tokens, TowerLayout(prefix, h, w, tokens.shape[-1])))
    return maps


def _hidden_states(tower: Any, pixel_values: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Return ``hidden_states[layer]`` of a transformers tower; other layers are not kept."""
    kwargs: dict[str, Any] = {"output_hidden_states": list(layers)}
    trained = getattr(tower.config, "image_size", None)
    if (
        isinstance(trained, int)
        and tuple(pixel_values.shape[-2:]) != (trained, trained)
        and "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
    ):
        kwargs["interpolate_pos_encoding"] = True
    outputs = tower(pixel_values, **kwargs, return_dict=True)
    states = getattr(outputs, "hidden_states", None)
    if states is None:
        if tuple(layers) != (-1,):
            raise ValueError(
                f"vision tower {type(tower).__name__} returns no hidden states, so layer {list(layers)} cannot be "
                "taken from it; use layer: -1"
            )
        return [outputs.last_hidden_state]
    wrong = [layer for layer in layers if not -len(states) <= layer < len(states)]
    if wrong:
        raise ValueError(
            f"vision layer {wrong}: {type(tower).__name__} has {len(states)} hidden states "
            f"(0 to {len(states) - 1}, or {-len(states)} to -1)"
        )
    return [states[layer] for layer in layers]


def _timm_states(tower: Any, pixel_values: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Return the final map (-1) or intermediates of a timm network, ``(F, C, h, w)`` or ``(F, p + h * w, C)``."""
    network = tower.timm_model
    earlier = [layer for layer in layers if layer != -1]
    if not earlier:
        return [_channels_first(tower(pixel_values, do_pooling=False).last_hidden_state, network)] * len(layers)
    name = tower.config.architecture
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "feature_info"):
        raise ValueError(
            f"vision layer {list(layers)}: timm's {name} does not give its intermediate layers; use layer: -1"
        )
    count = len(network.feature_info)
    wrong = [layer for layer in earlier if not -count <= layer < count]
    if wrong:
        raise ValueError(
            f"vision layer {wrong}: timm's {name} has {count} feature layers (0 to {count - 1}, or {-count} to -2); "
            "-1 is its final feature map"
        )
    indices = sorted({layer % count for layer in earlier})
    outputs = tower(pixel_values, output_hidden_states=indices, do_pooling=False)  # timm drops prefix tokens here
    assert len(outputs.hidden_states) == len(indices), "timm returned other layers than were asked for"
    states = dict(zip(indices, outputs.hidden_states))
    # The same forward as for the intermediates also ends in the final map, but with its prefix tokens still there.
    final = None
    if -1 in layers:
        final = _channels_first(outputs.last_hidden_state, network)
        if final.ndim == 3:
            final = final[:, getattr(network, "num_prefix_tokens", 0) :]
            final = final.transpose(1, 2).unflatten(2, states[indices[0]].shape[-2:])  # (F, C, h, w)
    return [final if layer == -1 else states[layer % count] for layer in layers]  # type: ignore[misc]


def _channels_first(state: Tensor, network: Any) -> Tensor:
    """Bring a 4-dimensional map of networks that compute channels last (Swin) to ``(F, C, h, w)``."""
    if state.ndim == 4 and str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC"):
        return state.permute(0, 3, 1, 2)
    return state


def _split_sequence(length: int, config: Any, height: int, width: int) -> tuple[int, int, int]:
    """Return prefix, h and w of a token sequence; prefix tokens come first in every transformers tower."""
    patch = getattr(config, "patch_size", None)
    if patch is not None:
        patch_h, patch_w = (patch, patch) if isinstance(patch, int) else patch
        h, w = height // patch_h, width // patch_w
        if 0 <= length - h * w < min(h * w, 32):  # more would not be prefix tokens but another grid
            return length - h * w, h, w
    return (0, *_square(length, config))  # hierarchical towers (Swin): patches merged, no prefix


def _square(length: int, config: Any) -> tuple[int, int]:
    side = isqrt(length)
    if side * side != length:
        raise ValueError(
            f"vision tower {config.model_type!r} gives {length} tokens a frame, which is no square grid, and its "
            "config names no patch_size to lay them out by"
        )
    return side, side


_LAYOUTS: dict[tuple[str, int, tuple[int, ...]], list[TowerLayout]] = {}
"""Layouts by config, image size and layers: a pure function's results, worth keeping (0.2 s for CLIP-L)."""


def _probe(vision_config: PreTrainedConfig, image_size: int, layers: tuple[int, ...]) -> list[TowerLayout]:
    """Return the layout of each layer, from a forward pass on the meta device."""
    from transformers.initialization import meta_device_safe_creation_ops

    key = (vision_config.to_json_string(use_diff=False), image_size, layers)
    if key not in _LAYOUTS:
        with plain_modules(), torch.device("meta"), meta_device_safe_creation_ops(), torch.no_grad():
            tower = build_tower(vision_config).eval()
            frame = torch.zeros(1, 3, image_size, image_size)
            try:
                maps = _layer_maps(tower, frame, layers)
            except ValueError:
                raise
            except (RuntimeError, AssertionError, TypeError) as error:  # as torch, timm and a foreign signature refuse
                raise ValueError(
                    f"vision tower {type(tower).__name__} cannot take {image_size} x {image_size} pictures: {error}. "
                    "Set model.vision.image_size to a size it takes (a timm ViT takes others with "
                    "model_args: {dynamic_img_size: true} in its config)"
                ) from error
        _LAYOUTS[key] = [layout for _, layout in maps]
    return _LAYOUTS[key]


def build_tower(vision_config: PreTrainedConfig) -> nn.Module:
    """Return an untrained tower; eager attention, which every class has and which needs no device."""
    from transformers import AutoModel

    kwargs: dict[str, Any] = {} if vision_config.model_type == "timm_wrapper" else {"attn_implementation": "eager"}
    # A config whose class came from the Hub was allowed by the user when it was loaded; nothing else is.
    trusted = type(vision_config).__module__.startswith("transformers_modules")
    try:
        return AutoModel.from_config(copy.deepcopy(vision_config), trust_remote_code=trusted, **kwargs)
    except ValueError as error:
        raise ValueError(f"no vision tower can be built from a {type(vision_config).__name__}: {error}") from error


@contextmanager
def plain_modules() -> Iterator[None]:
    """Build modules as torch does, also where ZeRO-3 is on: `zero.Init` would shard the probe's meta weights."""
    from transformers.integrations import deepspeed as integration

    reference: Any = integration._hf_deepspeed_config_weak_ref
    settings = None if reference is None else reference()
    partition: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if settings is not None:
        integration.unset_hf_deepspeed_config()  # else from_config enters zero.Init of its own
    if partition is not None:
        partition.shutdown_init_context()
    try:
        yield
    finally:
        if partition is not None:
            partition.restore_init_context()
        if settings is not None:
            integration.set_hf_deepspeed_config(settings)
