"""Configuration of the unified model: everything that the model's `__init__` needs to rebuild itself."""

from __future__ import annotations

import os
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class SparseVLMConfig(PreTrainedConfig):
    """Vision tower, connector, language model and what was done to them.

    Args:
        vision_config: Configuration of the vision tower (any that `AutoModel` builds).
        text_config: Configuration of the language model (any that `AutoModel` builds as a decoder).
        connector: Connector blocks in order, each ``{"type": name, **options}``.
        vision_feature_layer: Hidden layer (or layers, concatenated) of the tower whose features are taken.
        vision_feature_select: ``"patch"`` drops the tower's prefix tokens (CLS, registers), ``"full"`` keeps them.
        image_size: Side in pixels of the frames that the tower is given; default: what it was trained at.
        vision_native: None for square frames, else the recipe's `model.vision.native`: the tower takes packed patches
            of pictures in their own shape.
        image_token_id: Id that stands for one visual token of an image.
        video_token_id: Id that stands for one visual token of a video.
        moe: None for a dense model, else ``{"layers": [...], "num_experts": E, "num_experts_per_tok": k,
            "router_aux_loss_coef": c, ...}``; the text configuration carries the same numbers under the names that
            trl and transformers look for.
        lm_head_bias: The head has a bias (Phi's does).
        fusion: None where visual tokens are soft tokens in the text, else ``{"type": name, **options}`` as in a
            recipe's `model.fusion`.
    """

    model_type = "sparsevlm"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None  # a configuration once built; a dict is taken too
    text_config: Any = None
    connector: list[dict[str, Any]] | None = None
    vision_feature_layer: int | list[int] = -1
    vision_feature_select: Literal["patch", "full"] = "patch"
    image_size: int | None = None
    vision_native: dict[str, Any] | None = None
    image_token_id: int = 0
    video_token_id: int = 1
    moe: dict[str, Any] | None = None
    lm_head_bias: bool = False
    fusion: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.connector is None:
            self.connector = [{"type": "mlp"}]
        # Tying is the language model's property; the head sits on the outer model, so the outer flag must follow.
        if self.text_config is not None and getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the configuration's file as transformers does, and refuse that of another class.

        Transformers only warns, takes the defaults for all that is not there, and builds a model of billions of
        random weights.

        Raises:
            ValueError: The file describes a model of another type.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = config.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type '{found}', not one of SparseVLM's "
                f"('{cls.model_type}'): no tower and no connector of ours; load it with transformers' Auto classes"
            )
        return config, unused


__all__ = ["SparseVLMConfig"]

AutoConfig.register(SparseVLMConfig.model_type, SparseVLMConfig, exist_ok=True)
