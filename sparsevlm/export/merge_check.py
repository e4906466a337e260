"""The logits of a merged model beside those of its base with the adapter, which PEFT computes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsevlm.export.check import HALF_TOLERANCE, TOLERANCE, picture
from sparsevlm.export.merge_read import peft_config

if TYPE_CHECKING:
    from sparsevlm.export.merge_adapter import AdapterFolder
    from sparsevlm.export.merge_base import Base
    from sparsevlm.export.merge_job import Job

ROWS, TOKENS = 2, 32
"""Size of the sample of random tokens."""

QUESTION = "What is in the picture?"

_SPECIAL = ("image_token_id", "video_token_id", "image_token_index", "video_token_index", "vision_start_token_id")


@dataclass(frozen=True)
class MergeCheck:
    """How merged and unmerged model compare, both computing in float32.

    Attributes:
        difference: Largest difference of logits.
        mean: Mean difference of logits.
        change: Mean difference that the adapter itself makes to the base's logits.
        largest: Largest logit of the unmerged model.
        sample: What they were given.
        in_memory: The model beside the written one is no base with an adapter on it, but the same sum in float32.
    """

    difference: float
    mean: float
    change: float
    largest: float
    sample: str
    in_memory: bool = False

    def describe(self) -> list[str]:
        """Return lines for the console."""
        compared = "what was written and the same sum in memory" if self.in_memory else "merged and unmerged"
        return [
            f"logits: {compared} differ by at most {self.difference:.1e} (mean {self.mean:.1e}, largest logit "
            f"{self.largest:.1f}); the adapter changes the base's by {self.change:.1e} in the mean",
            f"  compared on {self.sample}, both models in float32",
        ]


@torch.no_grad()
def compare(base: Base, adapter: AdapterFolder, result: Path, dtype: torch.dtype) -> MergeCheck:
    """Load the merged model, then the base with the adapter, in float32, and compare their logits.

    Args:
        base: The base.
        adapter: The adapter.
        result: The directory that was written.
        dtype: Type of its weights: rounding to 16 bits is a difference that is allowed for.

    Raises:
        ValueError: They differ by more than rounding.
    """
    from peft import PeftModel

    samples, what = samples_of(base, result)
    kernel = _kernel(base)
    merged = _logits(_load(base, result, kernel), samples)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's of target_parameters and tied weights, which were looked at
        model = _load(base, base.directory, kernel)
        config = peft_config(adapter, base.tied)
        unmerged: Any = PeftModel.from_pretrained(model, str(adapter.directory), config=config).eval()
    wanted = _logits(unmerged, samples)
    with unmerged.disable_adapter():
        before = _logits(unmerged, samples)
    return judged(merged, wanted, before, what, dtype)


@torch.no_grad()
def compare_combined(job: Job, result: Path) -> MergeCheck:
    """As `compare`, with what is merged put into the base's weights in memory, in float32.

    Args:
        job: The merging.
        result: The directory that was written.

    Raises:
        ValueError: They differ by more than rounding.
    """
    samples, what = samples_of(job.base, result)
    merged = written_logits(job, result, samples)
    before, wanted = logits_in_memory(job, job.replayed.values(), samples)
    return replace(judged(merged, wanted, before, what, job.dtype), in_memory=True)


def written_logits(job: Job, result: Path, samples: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return the logits of what was written."""
    return _logits(_load(job.base, result, _kernel(job.base)), samples)


def logits_in_memory(
    job: Job, replayed: Iterable[str], samples: list[dict[str, Tensor]], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of the base, and of it with what is merged.

    Args:
        job: The merging.
        replayed: Names of weights that are quantised and dequantised first.
        samples: Inputs.
        dtype: What merged weights are rounded to.
    """
    gc.collect()
    model = _load(job.base, job.base.directory, _kernel(job.base))
    before = _logits(model, samples)
    if job.separated:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
    known: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    done: set[int] = set()
    again = set(replayed)
    for name in [*again, *(name for name in job.by_name if name not in again)]:
        if id(known[name]) not in done:  # two names of one tensor have one edit
            done.add(id(known[name]))
            weight, edit = job.replay(name, known[name]) if name in again else known[name], job.by_name.get(name)
            known[name].copy_((weight if edit is None else edit.apply(weight)).to(dtype))
    return before, _logits(model, samples)


def judged(
    merged: list[Tensor], wanted: list[Tensor], before: list[Tensor], what: str, dtype: torch.dtype
) -> MergeCheck:
    """Compare logits, and refuse a difference that rounding does not explain."""
    differences = torch.cat([(got - want).abs().flatten() for got, want in zip(merged, wanted, strict=True)])
    changes = torch.cat([(want - was).abs().flatten() for want, was in zip(wanted, before, strict=True)])
    found = MergeCheck(
        difference=float(differences.max()),
        mean=float(differences.mean()),
        change=float(changes.mean()),
        largest=max(float(logits.abs().max()) for logits in wanted),
        sample=what,
    )
    if dtype == torch.float32:
        measured, allowed = found.difference, TOLERANCE * max(1.0, found.largest)
    else:
        measured = found.mean
        allowed = HALF_TOLERANCE * float(torch.cat([logits.abs().flatten() for logits in wanted]).mean())
    if not measured <= allowed:
        raise ValueError(
            f"the logits of the merged model differ from those of base and adapter by {measured:.3g} (allowed "
            f"{allowed:.1g}); nothing was kept. With 16-bit weights, --dtype float32 tells whether rounding is the "
            "cause; otherwise please report this adapter"
        )
    return found


def _load(base: Base, directory: Path, kernel: dict[str, str]) -> Any:
    return base.model_class.from_pretrained(str(directory), dtype=torch.float32, **kernel).eval()


def _kernel(base: Base) -> dict[str, str]:
    """Return the kernel of stacked experts that takes every width, and float32 on a CPU."""
    text = base.config.get_text_config(decoder=True)
    native = base.model_class.__module__.startswith("transformers.")
    sparse = any(getattr(text, field, None) for field in ("num_experts", "num_local_experts", "n_routed_experts"))
    return {"experts_implementation": "eager"} if native and sparse else {}


def _logits(model: Any, samples: list[dict[str, Tensor]]) -> list[Tensor]:
    return [model(**sample, use_cache=False).logits.double() for sample in samples]


def samples_of(base: Base, directory: Path) -> tuple[list[dict[str, Tensor]], str]:
    """Return inputs of the model, and what they are: random tokens, and a picture where the model sees."""
    ids = _random_tokens(base.config)
    samples = [{"input_ids": ids}]
    what = f"{ROWS} x {TOKENS} random tokens"
    if "vision_config" not in getattr(base.config, "sub_configs", {}):
        return samples, what
    try:
        samples.append(_seen(directory))
    except OSError:
        return samples, f"{what}, NOT on a picture: {base.name} has no processor for pictures"
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        return samples, f"{what}, NOT on a picture, which its processor does not take ({str(error).splitlines()[:1]})"
    return samples, f"{what} and a picture"


def _seen(directory: Path) -> dict[str, Tensor]:
    """Return a question about the check's picture, by the model's own processor."""
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(str(directory))
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    if "pixel_values" not in inputs:
        raise ValueError("its chat template shows no picture")
    return dict(inputs)


def _random_tokens(config: Any) -> Tensor:
    """Draw ids, none of which stands for a picture."""
    vocabulary: int = config.get_text_config(decoder=True).vocab_size
    special = {getattr(config, field, None) for field in (*_SPECIAL, "vision_end_token_id")}
    usable = torch.tensor([i for i in range(vocabulary) if i not in special])
    generator = torch.Generator().manual_seed(0)
    return usable[torch.randint(len(usable), (ROWS, TOKENS), generator=generator)]
