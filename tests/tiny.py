"""Tiny parts that tests build models from: real classes, random weights, a word-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

WORDS = (  # noqa: SIM905
    "what is the color of this picture red green blue yellow a an in it yes no how many one two three four left right "
    "up down square circle big small there and video moves describe answer question ? . , : ! cat dog"
).split()
SPECIALS = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "user", "assistant"]


def make_tokenizer() -> Any:
    """Word-level fast tokenizer with chat and placeholder tokens; the template is `chatml`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from sparsevlm.model.build import TEMPLATES

    vocab = {token: i for i, token in enumerate([*SPECIALS, "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s\w]|\w+"), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<image>", "<video>"],
    )
    fast.chat_template = (TEMPLATES / "chatml.jinja").read_text()
    return fast


def vision_config(kind: str = "clip", **overrides: Any) -> Any:
    """Configuration of a tiny tower: 32 px, patch 8, 4 x 4 grid, width 32, two layers."""
    from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig, ViTConfig

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    } | overrides
    if kind == "dinov2":
        sizes.pop("intermediate_size")
    return {
        "clip": CLIPVisionConfig,
        "siglip": SiglipVisionConfig,
        "vit": ViTConfig,
        "dinov2": Dinov2Config,
    }[kind](**sizes)


def text_config(kind: str = "llama", vocab_size: int = 64, **overrides: Any) -> Any:
    """Configuration of a tiny decoder: width 32, two layers."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 2,
        "eos_token_id": 5,
        "pad_token_id": 0,
    } | overrides
    return AutoConfig.for_model(kind, **sizes)


def save_parts(directory: Path, vision: str = "clip", language: str = "llama", **overrides: Any) -> dict[str, str]:
    """Write `vision/` and `language/` below a directory and return their paths."""
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    paths = {"vision": directory / "vision", "language": directory / "language"}
    AutoModel.from_config(vision_config(vision)).save_pretrained(paths["vision"])
    config = text_config(language, vocab_size=len(tokenizer), **overrides)
    AutoModelForCausalLM.from_config(config).save_pretrained(paths["language"])
    tokenizer.save_pretrained(paths["language"])
    return {name: str(path) for name, path in paths.items()}


def recipe_model(paths: dict[str, str], **fields: Any) -> Any:
    """Recipe section `model` over saved parts."""
    from sparsevlm.recipe.schema import Model

    vision = {"path": paths["vision"], "layer": -2} | fields.pop("vision", {})
    language = {"path": paths["language"]} | fields.pop("language", {})
    connector = fields.pop("connector", [{"type": "mlp", "depth": 2}])
    return Model.model_validate({"vision": vision, "language": language, "connector": connector, **fields})


def picture(color: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", size, color)
