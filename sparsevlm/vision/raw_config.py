"""Configuration of the tower without weights; apart from its model, since a model's configuration may hold it."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


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


AutoConfig.register(RawPatchesConfig.model_type, RawPatchesConfig, exist_ok=True)
