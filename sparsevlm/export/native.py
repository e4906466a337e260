"""Export of a trained model to a class of transformers: renaming and stacking, never arithmetic.

The native model is built on the meta device and given our tensors, so that weights are held once; its own
`save_pretrained` then writes them as transformers writes that class.
"""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsevlm.export import check as checking
from sparsevlm.export.families import FAMILIES, NoHomeError, training_only, zero_weights
from sparsevlm.export.processors import llava_processor, native_tokenizer
from sparsevlm.export.vlm import llava_config, text_config
from sparsevlm.rundir import resolve_model

Format = Literal["auto", "native", "sparsevlm"]


@dataclass(frozen=True)
class Placement:
    """Where a model goes.

    Attributes:
        architecture: Name of the class.
        config: Its configuration; for our own classes `SparseVLMConfig` or `SparseVLMTextConfig`.
        moe: Our config's `moe` field.
        text_only: The language model alone.
        notes: What a user should know about the exported model.
    """

    architecture: str
    config: Any
    moe: dict[str, Any] | None = None
    text_only: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.config if self.text_only and self.native else self.config.text_config

    @property
    def native(self) -> bool:
        """The class is one of transformers."""
        return not self.architecture.startswith("SparseVLM")


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        placement: Where the model went.
        directory: What was written.
        refusal: With format `auto`, why it is no native class; else None.
        comparison: The check's result; None if it was skipped.
    """

    placement: Placement
    directory: Path
    refusal: NoHomeError | None = None
    comparison: checking.Comparison | None = None


def place(config: Any, *, text_only: bool = False, tiling: Any = None) -> Placement:
    """Find the transformers class that computes what a model does, without reading weights.

    Args:
        config: `SparseVLMConfig`.
        text_only: Of the language model alone, vision tower and connector left behind.
        tiling: How its processor cuts pictures.

    Raises:
        NoHomeError: There is none; everything that stands in the way is listed.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.fusion is not None:
        raise NoHomeError("the language model has modules of a fusion in its layers", [_no_fusion(config.fusion)])
    notes = []
    if config.moe is not None:
        families = [family for group in FAMILIES.values() for family in group]
        native_text = text_config(config) if text_only else llava_config(config, tiling).text_config
        family = next(family for family in families if family.model_type == native_text.model_type)
        notes += [f"only for further training: {lost}" for lost in training_only(config.moe, family)]
        if config.dtype not in (None, torch.float32):
            notes.append(
                f"{family.model_type} computes its router in {str(config.dtype).removeprefix('torch.')}, ours in "
                "float32: where two experts are nearly level, it may choose the other one"
            )
    if text_only:
        target = text_config(config)
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(target.model_type)
        if architecture is None:
            raise NoHomeError(
                "the language model has no class of its own in transformers",
                [f"type {target.model_type!r} has no causal language model; export it without --text-only"],
            )
        return Placement(architecture, target, config.moe, text_only=True, notes=notes)
    notes.append("pictures only: LLaVA has no videos, and several views are several pictures to it")
    return Placement("LlavaForConditionalGeneration", llava_config(config, tiling), config.moe, notes=notes)


def _no_fusion(fusion: dict[str, Any]) -> str:
    """Say why a model with a fusion is no native class."""
    return (
        f"fusion {fusion['type']!r}: no class of transformers has a language model with these modules, and they are "
        "part of what it computes; keep it as SparseVLM's own class (--format sparsevlm, without --text-only)"
    )


def build_native(model: Any, placement: Placement) -> Any:
    """Return the native model, to be saved; it shares its tensors with ours.

    It does not run: buffers that no checkpoint holds (rotary frequencies) stay on the meta device.

    Args:
        model: `SparseVLMForConditionalGeneration` on the CPU.
        placement: From `place`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForCausalLM if placement.text_only else AutoModelForImageTextToText
    with torch.device("meta"):
        native = auto.from_config(copy.deepcopy(placement.config))
    decoder = native.model.language_model if not placement.text_only else native.base_model
    if not placement.native:  # our text class holds the whole dense one
        decoder = decoder.base_model
    names = {module: name for name, module in native.named_modules()}
    state = _prefixed(names[decoder], model.model.language_model)
    head = native.get_output_embeddings()
    state |= _prefixed(names[head], model.get_output_embeddings())
    if placement.moe is not None:
        for name, shape in zero_weights(placement.text_config, placement.moe).items():
            for layer in placement.moe["layers"]:
                state[f"{names[decoder]}.layers.{layer}.mlp.{name}"] = torch.zeros(shape, dtype=model.dtype)
    if not placement.text_only:
        state |= _prefixed("model.vision_tower", model.model.vision_tower)
        projector = model.model.connector[0].layers
        for index, name in ((0, "linear_1"), (2, "linear_2")):
            state |= _prefixed(f"model.multi_modal_projector.{name}", projector[index])
    native.load_state_dict(state, strict=True, assign=True)
    native.tie_weights()
    native.generation_config = copy.deepcopy(model.generation_config)
    return native.eval()


def export(
    target: str | Path,
    output: str | Path,
    *,
    form: Format = "auto",
    text_only: bool = False,
    check: bool = True,
) -> ExportReport:
    """Write a trained model as a directory that loads by Auto classes.

    The directory appears under its name only when it is complete and checked.

    Args:
        target: Run directory (its last complete stage), model directory or Hub id.
        output: Directory to write; must not exist, or be empty.
        form: `native`: a class of transformers, or an error. `sparsevlm`: our own class. `auto`: native where there is
            one, else our own.
        text_only: The language model alone.
        check: Load the result in a fresh process that cannot import sparsevlm, and compare logits and greedy text.

    Raises:
        NoHomeError: With `native`: no class of transformers computes what the model does.
        ValueError: The source is no SparseVLM model, the output exists, or the check finds a difference.
    """
    from sparsevlm.model.build import load_model

    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already; name a directory that does not, or remove it first")
    path = resolve_model(target)
    placement, refusal = _decide(_read_config(path), form, text_only, None if text_only else _tiling(path))
    model, processor = load_model(path, attention="sdpa")
    model.eval()
    with _written_aside(output) as partial:
        reference = checking.reference(model, processor, partial / "check", text_only=text_only) if check else None
        if placement.native or text_only:
            native: Any = build_native(model, placement)
            _finish_generation(native, processor)
            native.save_pretrained(partial / "model")
            files: Any = native_tokenizer(processor) if text_only else llava_processor(processor, placement.config)
            files.save_pretrained(partial / "model")
            del native
        else:
            model.save_pretrained(partial / "model")
            processor.save_pretrained(partial / "model")
        del model
        gc.collect()  # the check loads the weights once more
        comparison = None
        if reference is not None:
            comparison = checking.compare(partial / "model", reference, native=placement.native)
    return ExportReport(placement, output, refusal, comparison)


def _decide(config: Any, form: Format, text_only: bool, tiling: Any) -> tuple[Placement, NoHomeError | None]:
    """Return where the model goes and, with `auto`, why it is no native class."""
    if form == "sparsevlm":
        return _ours(config, text_only), None
    try:
        return place(config, text_only=text_only, tiling=tiling), None
    except NoHomeError as error:
        if form == "native":
            raise
        return _ours(config, text_only), error


def _ours(config: Any, text_only: bool) -> Placement:
    """Return our own class for a model."""
    if not text_only:
        return Placement("SparseVLMForConditionalGeneration", config, config.moe)
    if config.fusion is not None:
        raise NoHomeError("the language model has modules of a fusion in its layers", [_no_fusion(config.fusion)])
    from sparsevlm.model.configuration_text import SparseVLMTextConfig

    text = copy.deepcopy(config.text_config)
    text._name_or_path = ""
    ours = SparseVLMTextConfig(
        text_config=text, moe=config.moe, tie_word_embeddings=config.tie_word_embeddings, dtype=config.dtype
    )
    return Placement("SparseVLMTextForCausalLM", ours, config.moe, text_only=True)


def _read_config(path: str) -> Any:
    """Return the source's configuration.

    Raises:
        ValueError: It is no SparseVLM model.
    """
    from transformers import AutoConfig

    import sparsevlm.model.configuration_sparsevlm as ours
    from sparsevlm.adapters.saved import is_adapter

    if is_adapter(path):
        raise ValueError(
            f"{path} holds an adapter, not a whole model: merge it into the model it was trained on first "
            f"(sparsevlm merge {path} OUT), then export OUT; one that cannot be merged stays an adapter "
            "(sparsevlm push uploads it)"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"{path}: no model configuration ({str(error).splitlines()[0]})") from None
    if not isinstance(config, ours.SparseVLMConfig):
        raise ValueError(
            f"{path} is a {config.model_type!r} model: there is no tower and no connector of SparseVLM in it to export"
        )
    return config


def _tiling(path: str) -> Any:
    """Return how the source's processor cuts pictures."""
    from sparsevlm.model.processing_sparsevlm import SparseVLMProcessor

    return SparseVLMProcessor.from_pretrained(path).image_spec.tiling


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _finish_generation(native: Any, processor: Any) -> None:
    """Name the padding token, which our chat passes by hand."""
    if native.generation_config.pad_token_id is None:
        native.generation_config.pad_token_id = processor.tokenizer.pad_token_id


@contextmanager
def _written_aside(output: Path) -> Iterator[Path]:
    """Give a scratch directory beside `output`; what is in its `model` takes the name `output` at the end."""
    partial = output.parent / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            output.rmdir()  # empty
        (partial / "model").rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
