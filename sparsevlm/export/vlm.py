"""`LlavaForConditionalGeneration` as a home: its configuration for one of our models, or all reasons why it is none."""

from __future__ import annotations

import copy
from typing import Any, Literal

from sparsevlm.connectors.base import parse_connector
from sparsevlm.export.families import NoHomeError, sparse_text_config

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
"""The mlp block's activations in transformers' names."""

WHAT = "no transformers class computes what this model does"


def llava_config(config: Any, tiling: Any = None) -> Any:
    """Return the `LlavaConfig` of a model.

    Args:
        config: `SparseVLMConfig`.
        tiling: How its processor cuts pictures.

    Raises:
        NoHomeError: Something has no home in LLaVA; `reasons` lists all of it.
    """
    from transformers import LlavaConfig

    if config.vision_native is not None:
        raise NoHomeError(
            WHAT,
            [
                "pictures in their own shape (model.vision.resize: native): LLaVA's are squares; set resize to "
                "stretch, crop or pad and train again from the align stage"
            ],
        )
    reasons: list[str] = []
    projector = _projector(config, reasons)
    strategy, image_tokens = _tower(config, reasons)
    text = None
    try:
        text = text_config(config)
    except NoHomeError as error:
        reasons += error.reasons
    if tiling is not None:
        reasons.append(
            f"pictures cut into several frames (model.vision.tiling, {tiling.type!r}): LLaVA takes one frame a "
            "picture; leave tiling out and train again from the align stage"
        )
    if config.lm_head_bias:
        reasons.append(
            "a head with a bias (lm_head_bias): LLaVA's has none; take another language model (model.language.path)"
        )
    if reasons:
        raise NoHomeError(WHAT, reasons)
    vision = copy.deepcopy(config.vision_config)
    vision._name_or_path = ""  # where the tower once was is nobody's business
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=config.image_token_id,
        image_seq_length=image_tokens,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=config.vision_feature_layer,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=config.dtype,
        **projector,
    )


def text_config(config: Any) -> Any:
    """Return the configuration of the language model in transformers: dense as it is, sparse in its family's class.

    Args:
        config: `SparseVLMConfig`.

    Raises:
        NoHomeError: See `sparse_text_config`; or the language model's class is not part of transformers.
    """
    dense = copy.deepcopy(config.text_config)
    dense.tie_word_embeddings = config.tie_word_embeddings
    dense.dtype = config.dtype
    dense._name_or_path = ""
    if not type(dense).__module__.startswith("transformers."):
        raise NoHomeError(
            WHAT,
            [
                f"language model type {dense.model_type!r} has code of its own ({type(dense).__module__}); take one "
                "that transformers knows (model.language.path)"
            ],
        )
    # What only changes training has no bearing on what the exported model computes.
    return dense if config.moe is None else sparse_text_config(dense, config.moe, training=False)


def _projector(config: Any, reasons: list[str]) -> dict[str, Any]:
    """Return LLaVA's projector options; add what does not fit to `reasons`."""
    remedy = "set model.connector: [{type: mlp, depth: 2}] and train again from the align stage"
    specs: list[Any] = parse_connector(config.connector or [])
    mlps = [spec for spec in specs if spec.type == "mlp"]
    others = [spec.type for spec in specs if spec.type != "mlp"]
    if others:
        reasons.append(f"connector block(s) {', '.join(others)}: LLaVA has an mlp alone; {remedy}")
    if len(mlps) != 1:
        reasons.append(f"{len(mlps)} mlp blocks: LLaVA has exactly one; {remedy}")
    width = config.text_config.hidden_size
    for spec in mlps:
        if spec.depth != 2:
            reasons.append(f"mlp of depth {spec.depth}: LLaVA's has two layers; {remedy}")
        if spec.norm != "none":
            reasons.append(f"mlp with norm {spec.norm!r}: LLaVA's has none; {remedy}")
        if (spec.hidden_dim or width) != width or (spec.dim or width) != width:
            reasons.append(
                f"mlp of widths {spec.hidden_dim or spec.dim or width} and {spec.dim or width}: LLaVA's are the "
                f"language model's ({width}); leave hidden_dim and dim of the mlp unset"
            )
        if spec.activation not in ACTIVATIONS:
            reasons.append(f"mlp with activation {spec.activation!r}: known are {', '.join(ACTIVATIONS)}; {remedy}")
    if len(mlps) != 1:
        return {}
    return {"projector_hidden_act": ACTIVATIONS.get(mlps[0].activation), "multimodal_projector_bias": mlps[0].bias}


def _tower(config: Any, reasons: list[str]) -> tuple[Literal["default", "full"], int]:
    """Return LLaVA's select strategy and the tokens of a picture; add what does not fit to `reasons`."""
    from sparsevlm.vision.encoder import default_image_size, feature_dim, num_prefix_tokens, output_grid

    vision, layer, select = config.vision_config, config.vision_feature_layer, config.vision_feature_select
    kind = vision.model_type
    remedy = "take a ViT such as CLIP or SigLIP (model.vision.path)"
    patch = getattr(vision, "patch_size", None)
    if (
        kind == "timm_wrapper"
        or not isinstance(patch, int)
        or not isinstance(getattr(vision, "hidden_size", None), int)
    ):
        reasons.append(f"vision tower {kind!r}: LLaVA takes the hidden states of a ViT, in square patches; {remedy}")
        return "full", 0
    if not type(vision).__module__.startswith("transformers."):
        reasons.append(f"vision tower {kind!r} has code of its own ({type(vision).__module__}); {remedy}")
    trained = default_image_size(vision)
    side = config.image_size or trained
    if side != trained:
        reasons.append(
            f"pictures of {side} pixels for a vision tower made for {trained}: LLaVA does not interpolate position "
            f"embeddings; set model.vision.image_size: {trained}, and no image_size of a stage"
        )
    prefix = num_prefix_tokens(vision)
    h, w = output_grid(vision, side, layer, "patch")
    layers = [layer] if isinstance(layer, int) else layer
    if (h, w) != (side // patch,) * 2 or feature_dim(vision, layer) != len(layers) * vision.hidden_size:
        reasons.append(
            f"vision tower {kind!r}, layer {layer}: {h}x{w} tokens of width {feature_dim(vision, layer)} a picture, "
            f"where LLaVA expects one of width {vision.hidden_size} for each of {side // patch}x{side // patch} "
            f"patches; {remedy}"
        )
    if select == "patch" and prefix > 1:
        reasons.append(
            f"{prefix} prefix tokens (CLS and registers) that are dropped: LLaVA drops one or keeps all; set "
            f"model.vision.select: full, or {remedy}"
        )
    if select == "patch":
        return ("default" if prefix else "full"), h * w
    return "full", prefix + h * w
