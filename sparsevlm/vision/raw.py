"""A tower without weights: the patches themselves are the features (Fuyu, OtterHD).

The connector that follows is Fuyu's linear layer: ``{type: linear}`` over ``3 * patch * patch`` numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


@strict
class RawPatchesConfig(PreTrainedConfig):
    """Configuration of `RawPatchesModel`.

    Args:
        patch_size: Side of a patch in pixels.
        image_size: Side of a square picture; only an example, pictures have their own sizes.
    """

    model_type = "sparsevlm_patches"
    patch_size: int = 30
    image_size: int = 300

    @property
    def hidden_size(self) -> int:
        """Numbers of a patch."""
        return 3 * self.patch_size**2


class RawPatchesModel(PreTrainedModel):
    """Returns the patches that it gets."""

    config_class = RawPatchesConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: RawPatchesConfig) -> None:
        super().__init__(config)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """Of the features; nothing is computed here."""
        return torch.float32

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Return patches ``(P, 3 * patch * patch)`` as ``last_hidden_state`` ``(1, P, 3 * patch * patch)``."""
        return BaseModelOutput(last_hidden_state=pixel_values[None])  # pyright: ignore[reportArgumentType]


AutoConfig.register(RawPatchesConfig.model_type, RawPatchesConfig, exist_ok=True)
AutoModel.register(RawPatchesConfig, RawPatchesModel, exist_ok=True)
