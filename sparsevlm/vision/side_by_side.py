"""Several vision towers that look at one picture: their features side by side, as one tower.

It is a vision model of transformers like any other, so all that is done to a tower (counting, training, adapters,
sharding, keeping features) is done to it as a whole. Each of its towers sees the picture in its own size and colours.

Legend: F frames, S side in pixels of what comes in, h x w grid of all towers, D_i width of tower i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sparsevlm.vision.encoder import Layer, as_layers, frame_maps, output_grid
from sparsevlm.vision.side_by_side_config import ITS_LAYER, SideBySideConfig


def side_by_side(
    configs: Sequence[PreTrainedConfig],
    layers: Sequence[Layer],
    sides: Sequence[int],
    means: Sequence[Sequence[float]],
    stds: Sequence[Sequence[float]],
) -> SideBySideConfig:
    """Return the configuration of towers side by side.

    Raises:
        ValueError: Their grids differ, so that their features do not lie side by side.
    """
    grids = [output_grid(config, side, layer) for config, side, layer in zip(configs, sides, layers, strict=True)]
    if len(set(grids)) > 1:
        found = ", ".join(
            f"{config.model_type} {h} x {w} at {side} pixels"
            for config, (h, w), side in zip(configs, grids, sides, strict=True)
        )
        raise ValueError(
            f"towers side by side need one grid, got {found}; set image_size of the towers so that side / patch size "
            "is the same"
        )
    raw = [
        config.to_dict() | {ITS_LAYER: layer if isinstance(layer, int) else list(layer)}
        for config, layer in zip(configs, layers, strict=True)
    ]
    return SideBySideConfig(
        towers=raw,
        sides=list(sides),
        means=[list(mean) for mean in means],
        stds=[list(std) for std in stds],
        image_size=max(sides),
    )


class SideBySideModel(PreTrainedModel):
    """Towers whose features are concatenated, in the order of the configuration."""

    config_class = SideBySideConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _supports_sdpa = True
    _supports_flash_attn = True
    takes_float_pixels = True
    """Colours are brought from one tower's to another's before anything is rounded."""

    def __init__(self, config: SideBySideConfig) -> None:
        super().__init__(config)
        attention = config._attn_implementation
        known = {} if attention is None else {"attn_implementation": attention}
        # A tower's own configuration says in which type its weights were published, which is not that of this model.
        dtype = config.dtype or torch.get_default_dtype()
        self.towers = nn.ModuleList(
            AutoModel.from_config(each, dtype=dtype, **({} if each.model_type == "timm_wrapper" else known))
            for each in config.configs
        )
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode frames.

        Args:
            pixel_values: ``(F, 3, S, S)`` in the first tower's colours.
            **kwargs: Ignored; what is read of each tower is in its configuration.

        Returns:
            ``last_hidden_state`` as a map, ``(F, sum of D_i, h, w)``.
        """
        config = self.config
        maps = []
        for tower, side, mean, std in zip(self.towers, config.sides, config.means, config.stds, strict=True):
            pixels = _recolour(pixel_values, config.means[0], config.stds[0], mean, std)
            if side != pixels.shape[-1]:
                pixels = nn.functional.interpolate(
                    pixels.float(), (side, side), mode="bicubic", align_corners=False, antialias=True
                )
            maps.append(frame_maps(tower, pixels, getattr(tower.config, ITS_LAYER)))
        return BaseModelOutput(last_hidden_state=torch.cat(maps, dim=1))  # pyright: ignore[reportArgumentType]


def _recolour(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], other: Sequence[float], its_std: Sequence[float]
) -> Tensor:
    """Bring normalised pixels from one tower's colours to another's; the same colours stay bit for bit."""
    if list(mean) == list(other) and list(std) == list(its_std):
        return pixels
    at = {"dtype": torch.float32, "device": pixels.device}
    means, stds, others, its_stds = (torch.tensor(v, **at).view(3, 1, 1) for v in (mean, std, other, its_std))
    return (pixels.float() * stds + means - others) / its_stds


def each_tower(tower: nn.Module, layer: Layer) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Yield the towers that stand side by side with the layers that are read of each; of one tower itself."""
    if isinstance(tower, SideBySideModel):
        for each in tower.towers:
            yield each, as_layers(getattr(each.config, ITS_LAYER))
    else:
        yield tower, as_layers(layer)


AutoModel.register(SideBySideConfig, SideBySideModel, exist_ok=True)
