"""A tower without weights: the patches themselves are the features (Fuyu, OtterHD).

The connector that follows is Fuyu's linear layer: ``{type: linear}`` over ``3 * patch * patch`` numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sparsevlm.vision.raw_config import RawPatchesConfig


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


AutoModel.register(RawPatchesConfig, RawPatchesModel, exist_ok=True)
