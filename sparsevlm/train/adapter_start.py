"""What an adapter begins with that is made from the model or from samples before training, kept beside checkpoints.

It is made once, by the launching process: a decomposition may differ in its last digits, or its signs, from machine to
machine, and a continued stage and all its processes need the very numbers that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.recipe.adapter.lora import FROM_DATA, MADE
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train import checkpoints
from sparsevlm.train.fingerprint import stage_inputs

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

FILE = "adapter_start.safetensors"

SAMPLES = 64
"""Samples that a start is made from, where it is made from data."""


def needs_start(recipe: Recipe, name: str) -> bool:
    """Tell whether the adapter of a stage begins with something that is made before training."""
    return getattr(recipe.stages[name].adapter, "init", "default") in MADE


def save_adapter_start(recipe: Recipe, name: str, parent: Path, root: Path, console: Console) -> None:
    """Make and write the start of a stage's adapter, and print how far the model then is from its parent.

    Args:
        recipe: The resolved recipe.
        name: The stage.
        parent: Directory of the model that the adapter is trained on.
        root: Directory of the stage's checkpoints.
        console: Where to print.

    Raises:
        ValueError: There are checkpoints, but their start is gone; or no start can be made for a layer.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from sparsevlm.adapters.inits import draw_start
    from sparsevlm.adapters.lora import prepare
    from sparsevlm.adapters.saved import weights_hash
    from sparsevlm.model.build import load_model
    from sparsevlm.train.data import first_samples
    from sparsevlm.train.prepare import COMPARED_SAMPLES, sample_logits, training_dtype

    file = root / FILE
    if checkpoints.latest(root) is not None:
        if not file.is_file():
            raise ValueError(
                f"{root} holds checkpoints of stage {name!r}, but not {FILE} that they began with; delete "
                f"{root.parent} to train the stage anew"
            )
        return
    made_from = json.dumps({"inputs": stage_inputs(recipe, name), "parent": weights_hash(parent)}, sort_keys=True)
    if file.is_file():
        with safe_open(file, "pt") as saved:
            if (saved.metadata() or {}).get("made_from") == made_from:
                return
    spec: Any = recipe.stages[name].adapter
    dtype = training_dtype(recipe)
    model, processor = load_model(parent, dtype, recipe.model.language.attention)
    samples = first_samples(recipe, name, processor, SAMPLES if spec.init in FROM_DATA else COMPARED_SAMPLES)

    def run(sample: Any) -> None:
        sample_logits(model, processor, [sample], keep=1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        start = draw_start(model, prepare(model, spec).modules, spec, run, samples)
    difference = _difference(model, processor, spec, start, samples[:COMPARED_SAMPLES])
    console.print(
        f"{name}: the adapter starts from {spec.init}; logits differ from the parent's by {difference:.1e} on "
        f"{min(len(samples), COMPARED_SAMPLES)} samples ({str(dtype).removeprefix('torch.')})",
        highlight=False,
    )
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f".{FILE}.partial"
    save_file(start, partial, metadata={"format": "pt", "made_from": made_from})
    partial.replace(file)


def _difference(model: Any, processor: Any, spec: Any, start: dict[str, Tensor], samples: Sequence[Any]) -> float:
    """Attach the adapter and return the largest difference of a logit."""
    from sparsevlm.adapters.attach import attach
    from sparsevlm.moe.upcycle import measure_difference
    from sparsevlm.train.prepare import sample_logits

    before = sample_logits(model, processor, samples)
    attach(model, spec, start=start)
    after = sample_logits(model, processor, samples)
    return measure_difference(lambda: before, lambda: after)


def read_adapter_start(recipe: Recipe, name: str, root: Path) -> dict[str, Tensor] | None:
    """Return what `save_adapter_start` wrote; None for an adapter that needs nothing of the kind."""
    if not needs_start(recipe, name):
        return None
    from safetensors.torch import load_file

    return load_file(root / FILE)
