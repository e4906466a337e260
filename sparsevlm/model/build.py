"""From a recipe's parts to a model and its processor."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from sparsevlm.adapters.attach import load_adapter
from sparsevlm.adapters.quantise import Settings, quantise
from sparsevlm.adapters.saved import ADAPTER_CONFIG, QUANTISATION, find_parent, is_adapter, read_parent
from sparsevlm.connectors.base import parse_connector
from sparsevlm.fusion import media_apart
from sparsevlm.model.attention import supports_packed_sdpa
from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig
from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration, add_fusion, build_connector
from sparsevlm.model.parity import check_parity, logits_of, some_tokens
from sparsevlm.model.parts import image_spec, load_tower, part_config, resolve_part, tower_config
from sparsevlm.model.processing_sparsevlm import SparseVLMProcessor
from sparsevlm.recipe import schema
from sparsevlm.vision.encoder import output_grid
from sparsevlm.vision.tokens import MediaKind

TEMPLATES = Path(__file__).resolve().parent / "templates"

_EXPECTED_FAILURES = ("gated_repo", "missing_entries", "connection_errors")
"""Of a look for an adapter on the Hub; loading the model itself then says what is wrong."""


def build_config(model: schema.Model, *, offline_shapes: bool = False) -> SparseVLMConfig:
    """Return the configuration of a recipe's model, before any stage edits it.

    Args:
        model: The recipe's `model` section.
        offline_shapes: Take the shapes of well-known backbones from the package (for `plan`).

    Raises:
        ValueError: A part cannot be loaded or is of no use here.
    """
    vision, layer, select = tower_config(model, offline_shapes)
    text = part_config(model.language.path, model.trust_remote_code, offline_shapes).get_text_config(decoder=True)
    native = model.vision.native
    return SparseVLMConfig(
        vision_config=vision,
        text_config=text,
        connector=model.connector,
        vision_feature_layer=layer,
        vision_feature_select=select,
        image_size=None if model.vision.beside else model.vision.image_size,
        vision_native=None if native is None else native.model_dump(mode="json"),
        image_token_id=text.vocab_size,
        video_token_id=text.vocab_size + 1,
        lm_head_bias=text.model_type in ("phi", "codegen", "gptj"),
        fusion=None if model.fusion is None else model.fusion.model_dump(),
    )


def chat_template(name: str, tokenizer: Any) -> str:
    """Return the Jinja text of a recipe's `chat_template`.

    Raises:
        ValueError: No such template, or one without ``{% generation %}`` markers.
    """
    shipped = {file.stem: file for file in TEMPLATES.glob("*.jinja")}
    if name == "auto":
        text, origin = tokenizer.chat_template, "the tokenizer's chat template"
    elif name in shipped:
        text, origin = shipped[name].read_text(), name
    elif Path(name).is_file():
        text, origin = Path(name).read_text(), name
    else:
        raise ValueError(f"no chat template {name!r}: neither a file nor one of {', '.join(sorted(shipped))}, auto")
    if not text or "generation" not in text.replace("add_generation_prompt", ""):
        what = "is missing" if not text else "has no {% generation %} markers, so targets cannot be told from prompts"
        raise ValueError(
            f"{origin} {what}; set model.language.chat_template to one of {', '.join(sorted(shipped))} or a file"
        )
    return text


def add_tokens(model: schema.Model, tokenizer: Any) -> None:
    """Give a tokenizer the placeholders and the recipe's own tokens, where it does not have them."""
    known = tokenizer.get_vocab()
    fresh = [token for token in (model.image_token, model.video_token) if token not in known]
    if fresh:
        tokenizer.add_tokens(fresh, special_tokens=True)
    extra = [AddedToken(token, normalized=False) for token in model.language.extra_tokens if token not in known]
    if extra:
        tokenizer.add_tokens(extra)


def build_processor(model: schema.Model, config: SparseVLMConfig) -> SparseVLMProcessor:
    """Return the processor of a recipe's model; writes the placeholder ids into `config`."""
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_part(model.language.path), trust_remote_code=model.trust_remote_code
    )
    template = chat_template(model.language.chat_template, tokenizer)
    add_tokens(model, tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    processor = SparseVLMProcessor(
        tokenizer,
        visual=image_spec(model, config).to_dict(),
        connector=list(model.connector),
        video=model.video.model_dump(),
        image_token=model.image_token,
        video_token=model.video_token,
        chat_template=template,
        one_token_media=media_apart(config.fusion),
    )
    config.image_token_id = processor.image_token_id
    config.video_token_id = processor.video_token_id
    return processor


def build_model(
    model: schema.Model, dtype: torch.dtype = torch.float32
) -> tuple[SparseVLMForConditionalGeneration, SparseVLMProcessor]:
    """Load the pretrained parts and put a fresh connector between them.

    Args:
        model: The recipe's `model` section.
        dtype: Type of all weights.

    Raises:
        ValueError: A part cannot be loaded, the widths do not fit, or the language model computes its logits in a way
            that ours would not reproduce (checked on a few tokens).
    """
    config = build_config(model)
    processor = build_processor(model, config)
    trust = {"trust_remote_code": model.trust_remote_code, "dtype": dtype}
    tower = load_tower(model, config, trust)
    source = AutoModelForCausalLM.from_pretrained(resolve_part(model.language.path), config=config.text_config, **trust)
    head: Any = source.get_output_embeddings()
    config.lm_head_bias = getattr(head, "bias", None) is not None
    config.dtype = dtype  # pyright: ignore
    with torch.device("meta"):
        ours = SparseVLMForConditionalGeneration(config)
    ours.model.vision_tower = tower
    ours.model.language_model = source.base_model
    ours.model.connector = build_connector(config)
    for i, (spec, block) in enumerate(zip(parse_connector(config.connector or []), ours.model.connector, strict=True)):
        try:
            spec.load_pretrained(block)
        except ValueError as error:
            raise ValueError(f"model.connector.{i} ({spec.type}): {error}") from error
    ours.model.connector.to(dtype)
    ids = some_tokens(config)
    reference = logits_of(source.eval(), ids)  # of the decoder as it came
    add_fusion(source.base_model, config)
    ours.set_output_embeddings(head)
    ours.tie_weights()
    ours.generation_config = source.generation_config
    ours.eval()
    check_parity(reference, logits_of(ours, ids), f"{model.language.path!r} ({type(source).__name__})")
    size = len(processor.tokenizer)
    if size > config.text_config.vocab_size:
        ours.resize_token_embeddings(size, mean_resizing=False)
    set_attention(ours, model.language.attention)
    return ours, processor


def load_model(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    attention: str = "auto",
    base: str | Path | None = None,
    quantised: bool = True,
    **kwargs: Any,
) -> tuple[SparseVLMForConditionalGeneration, SparseVLMProcessor]:
    """Load a saved model and its processor; of an adapter, the model that it was trained on with the adapter attached.

    Args:
        path: Directory or Hub id of a SparseVLM model, or of an adapter on one.
        dtype: Type of the weights; ``"auto"`` keeps the saved one.
        attention: Attention of the language model, as in the recipe.
        base: Where the model is that an adapter was trained on, if not where the adapter says.
        quantised: Quantise that model as it was in training, where it was; else the adapter is put on its weights as
            they are saved.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        ValueError: The checkpoint lacks weights, or holds some of another shape; an adapter's model is not there or
            not the one that it was trained on.
    """
    adapter = _adapter_directory(path, kwargs.get("revision"))
    if adapter is not None:
        parent = find_parent(adapter, base)
        record = read_parent(adapter).get(QUANTISATION) if quantised else None
        settings = None if record is None else Settings.from_dict(record)
        kept = dtype if settings is None else getattr(torch, settings.dtype)  # equal bits need an equal start
        model, _ = load_model(parent, kept, attention, **{k: v for k, v in kwargs.items() if k != "revision"})
        if settings is not None:
            quantise(model, settings)
            if dtype != "auto":
                cast_weights(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        load_adapter(model, adapter)
        return model.eval(), SparseVLMProcessor.from_pretrained(str(adapter))
    if base is not None:
        raise ValueError(f"{path} holds a whole model; only an adapter is loaded onto a base")
    loaded: Any = SparseVLMForConditionalGeneration.from_pretrained(
        str(path), dtype=dtype, output_loading_info=True, **kwargs
    )
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
        raise ValueError(
            f"{path} does not hold the whole model: {len(lacking)} weights are missing or have another shape "
            f"({', '.join(lacking[:4])}{', …' if len(lacking) > 4 else ''}); they would be random. Was it written to "
            "the end?"
        )
    processor = SparseVLMProcessor.from_pretrained(str(path), revision=kwargs.get("revision") or "main")
    set_attention(model, attention)
    return model, processor


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring a model to a type in place, such that it is what loading its files in that type gives.

    ``model.to(dtype)`` also rounds what no file holds: rotary frequencies, and in bfloat16 the positions of tokens by
    up to 0.4 %.
    """
    kept = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    nn.Module.to(model, dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer


def _adapter_directory(path: str | Path, revision: str | None) -> Path | None:
    """Return the directory of an adapter, downloaded if need be; None where there is none."""
    if Path(path).is_dir():
        return Path(path) if is_adapter(path) else None
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    lenient: dict[str, Any] = {f"_raise_exceptions_for_{what}": False for what in _EXPECTED_FAILURES}
    if cached_file(str(path), ADAPTER_CONFIG, revision=revision, **lenient) is None:
        return None
    return Path(snapshot_download(str(path), revision=revision))


def set_image_size(
    model: SparseVLMForConditionalGeneration, processor: SparseVLMProcessor, size: int
) -> SparseVLMProcessor:
    """Let a model see pictures of another size; its weights stay, and its tower resamples its positions.

    Returns:
        The processor for that size.

    Raises:
        ValueError: The tower, or the connector, cannot take it.
    """
    config = model.config
    grid = output_grid(config.vision_config, size, config.vision_feature_layer, config.vision_feature_select)
    visual = replace(processor.image_spec, image_size=size, patch_grid=grid).to_dict()
    names = list(signature(type(processor).__init__).parameters)[1:]
    options: dict[str, Any] = {name: getattr(processor, name) for name in names}
    options["visual"] = visual
    changed = type(processor)(**options)
    changed.count_visual(MediaKind.IMAGE, size=(size, size))  # refused now, not at a picture
    config.image_size = size
    return changed


def set_attention(model: SparseVLMForConditionalGeneration, name: str) -> str:
    """Choose the language model's attention and return the name chosen; see `schema.Language.attention`."""
    if name == "auto":
        from transformers.utils import is_flash_attn_2_available

        if torch.cuda.is_available() and is_flash_attn_2_available():
            name = "flash_attention_2"
        else:
            name = "packed_sdpa" if supports_packed_sdpa(model.model.language_model) else "sdpa"
    if name == "packed_sdpa" and not supports_packed_sdpa(model.model.language_model):
        raise ValueError(
            f"{type(model.model.language_model).__name__} has attention of its own and cannot use packed_sdpa; "
            "set model.language.attention to auto, sdpa or eager"
        )
    model.model.language_model.set_attn_implementation(name)
    return name


def packs_for_free(attention: str) -> bool:
    """Tell whether an attention implementation keeps packed documents apart without a mask."""
    return attention == "packed_sdpa" or attention.startswith("flash_attention")
