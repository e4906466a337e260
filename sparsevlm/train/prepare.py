"""The model that a stage starts from: the parent's, or fresh from the parts, with the stage's edits applied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.adapters.saved import is_adapter
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train.adapter_start import needs_start, save_adapter_start
from sparsevlm.train.checkpoints import MARKER, mark_complete, read_marker, remove
from sparsevlm.train.fingerprint import stage_inputs

if TYPE_CHECKING:
    from rich.console import Console

    from sparsevlm.data.sample import Encoded

UPCYCLE_TOLERANCE = 1e-5
"""Largest difference of logits between the dense model and the upcycled one in float32, relative to the largest logit
where that is above 1."""

COMPARED_SAMPLES = 4
"""Samples on which the logits before and after are compared."""

KMEANS_SAMPLES = 64
"""Samples on which the inputs of layers are collected, for `router.init: kmeans`."""

START = "start"
"""Directory in a stage's that holds the model it starts from, when several processes are to load it."""

CHECKPOINTS = "checkpoints"
"""Directory in a stage's that holds what an interrupted stage continues from."""

BASE = "base"
"""The same where the stage trains an adapter on that model: it stays, since the adapter needs it."""


def training_dtype(recipe: Recipe) -> Any:
    """Return the type in which a run keeps its weights while training."""
    import torch

    return torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32


def needs_edit(recipe: Recipe, name: str, parent_dir: Path | None) -> bool:
    """Return whether a stage starts from something else than a saved directory as it is."""
    stage = recipe.stages[name]
    edits = (stage.upcycle, stage.image_size, stage.rope_factor)
    return parent_dir is None or any(edit is not None for edit in edits) or is_adapter(parent_dir)


def start_model(recipe: Recipe, name: str, parent_dir: Path | None, console: Console) -> tuple[Any, Any]:
    """Return the model and processor that a stage starts from, on the CPU, before it gets an adapter.

    An adapter of the stage before is merged into the weights that it was trained on.

    Everything drawn at random (connector, routers) depends on the recipe's seed alone, so a stage that is started
    again starts from the same weights.

    Args:
        recipe: The resolved recipe.
        name: The stage.
        parent_dir: Complete directory of the stage before; None for the first.
        console: Where the upcycling report goes.

    Raises:
        ValueError: A part cannot be loaded, or upcycling changes what the model computes.
    """
    import torch
    from transformers import set_seed

    from sparsevlm.adapters.attach import detach
    from sparsevlm.model.build import build_model, cast_weights, load_model, set_attention, set_image_size
    from sparsevlm.model.positions import stretch_positions

    upcycle = recipe.stages[name].upcycle
    adapted = parent_dir is not None and is_adapter(parent_dir)
    dtype = torch.float32 if upcycle is not None or adapted else training_dtype(recipe)
    set_seed(recipe.seed)
    attention = recipe.model.language.attention
    if parent_dir is None:
        model, processor = build_model(recipe.model, dtype)
        set_attention(model, attention)
    else:
        model, processor = load_model(parent_dir, dtype, attention, quantised=False)
    if adapted:
        detach(model, merge=True)
        model.requires_grad_(True)
        console.print(f"{name}: merged the adapter of {parent_dir} into its weights", highlight=False)
    if (size := recipe.stages[name].image_size) is not None:
        processor = set_image_size(model, processor, size)
    if (factor := recipe.stages[name].rope_factor) is not None:
        stretch_positions(model, factor)
    if upcycle is not None:
        _upcycle(model, processor, recipe, name, console)
    if upcycle is not None or adapted:
        cast_weights(model, training_dtype(recipe))
    return model, processor


def _upcycle(model: Any, processor: Any, recipe: Recipe, name: str, console: Console) -> None:
    """Upcycle in place and compare logits before and after on some of the stage's own samples."""
    from sparsevlm.moe.backends import GPU_ONLY
    from sparsevlm.moe.upcycle import measure_difference, upcycle_model
    from sparsevlm.surgery import decoder_layers, resolve_layers
    from sparsevlm.train.data import first_samples
    from sparsevlm.train.summary import short

    spec: Any = recipe.stages[name].upcycle
    layers = resolve_layers(spec.layers, len(decoder_layers(model.model.language_model)))
    clustered = spec.router.init == "kmeans"
    samples = first_samples(recipe, name, processor, count=KMEANS_SAMPLES if clustered else COMPARED_SAMPLES)
    compared = samples[:COMPARED_SAMPLES]
    before = sample_logits(model, processor, compared)
    sources = _branches(model, recipe, name, layers, console) if spec.experts_from else None
    centroids = _centroids(model, processor, spec, layers, samples, recipe.seed) if clustered else None
    report = upcycle_model(model, spec, seed=recipe.seed, sources=sources, centroids=centroids)
    if report.experts_implementation in GPU_ONLY:  # the model is on the CPU here
        model.set_experts_implementation("eager")
    after = sample_logits(model, processor, compared)
    model.set_experts_implementation(report.experts_implementation)
    difference = measure_difference(lambda: before, lambda: after)
    allowed = UPCYCLE_TOLERANCE * max(1.0, float(before.abs().max()))
    console.print(
        f"{name}: layers {', '.join(map(str, report.layers))} -> {report.num_experts} experts, "
        f"top {report.num_experts_per_tok} ({report.experts_implementation}); language model "
        f"{short(report.parameters_before)} -> {short(report.parameters_after)} parameters, "
        f"{short(report.parameters_activated)} activated; logits differ from the dense model's by {difference:.1e} "
        f"on {len(compared)} samples (float32)",
        highlight=False,
    )
    keeps = "is" if report.preserves_function else "is not"
    console.print(f"{name}: the start {keeps} function-preserving: {report.reason}", highlight=False)
    if report.preserves_function and not difference <= allowed:
        raise ValueError(
            f"stage {name!r}: upcycling changed the logits by {difference:.3g} (allowed {allowed:.1g}); the copied "
            "experts do not compute what the dense layers do. Leave out layers or report the language model"
        )


def _branches(model: Any, recipe: Recipe, name: str, layers: Sequence[int], console: Console) -> Any:
    """Set the weights to the mean of the models that become the experts, and return their FFNs."""
    from sparsevlm.train.branches import mix_branches

    spec: Any = recipe.stages[name].upcycle
    sources, kept = mix_branches(model, spec.experts_from, layers, recipe.model.trust_remote_code)
    console.print(
        f"{name}: experts from {', '.join(spec.experts_from)}; all other weights are their mean"
        + (f", but for {', '.join(kept)}, which they do not have" if kept else ""),
        highlight=False,
    )
    return sources


def _centroids(
    model: Any, processor: Any, spec: Any, layers: Sequence[int], samples: Sequence[Encoded], seed: int
) -> dict[int, Any]:
    """Return the centroids of the chosen layers' inputs on some samples."""
    from sparsevlm.moe.kmeans import router_centroids

    def run(sample: Encoded) -> None:
        sample_logits(model, processor, [sample], keep=1)

    return router_centroids(model.model.language_model, layers, spec.experts, samples, run, seed=seed)


def sample_logits(model: Any, processor: Any, samples: Sequence[Encoded], keep: int = 0) -> Any:
    """Return the logits of each sample by itself, ``(sum of tokens, V)``; with ``keep`` of its last tokens only."""
    import torch

    from sparsevlm.train.data import make_collator

    collate = make_collator(processor, packed=False)
    training = model.training
    model.eval()
    rows = []
    with torch.no_grad():
        for sample in samples:
            batch = collate([[sample]])  # one sample a row: no padding
            batch.pop("labels")
            rows.append(model(**batch, use_cache=False, logits_to_keep=keep).logits[0])
    model.train(training)
    return torch.cat(rows)


def save_start(recipe: Recipe, name: str, parent_dir: Path | None, stage_dir: Path, console: Console) -> Path:
    """Return a directory from which all ranks of a stage load; written once by the launching process.

    Sharded ranks cannot edit the model they load (each holds a part of it), so edits happen here, on the CPU. A stage
    that trains an adapter starts from a directory in any case: the adapter belongs to exactly these weights. What the
    adapter begins with is made here too, where it needs the model or samples.
    """
    directory = _save_model(recipe, name, parent_dir, stage_dir, console)
    if needs_start(recipe, name):
        save_adapter_start(recipe, name, directory, stage_dir / CHECKPOINTS, console)
    return directory


def _save_model(recipe: Recipe, name: str, parent_dir: Path | None, stage_dir: Path, console: Console) -> Path:
    stage = recipe.stages[name]
    edited = needs_edit(recipe, name, parent_dir)
    directory = stage_dir / (START if stage.adapter is None else BASE)
    for written in (stage_dir / START, stage_dir / BASE):
        # Of a recipe that has changed before the first checkpoint; ranks look for these (`prepared_start`).
        if written.exists() and not (edited and written == directory):
            remove(written)
    if not edited:
        assert parent_dir is not None
        return parent_dir
    made_from = {"stage": name, "inputs": stage_inputs(recipe, name), "parent": None}
    if parent_dir is not None:
        made_from["parent"] = (parent_dir / MARKER).read_text() if (parent_dir / MARKER).is_file() else None
    if read_marker(directory) != made_from:
        if directory.exists():
            remove(directory)
        model, processor = start_model(recipe, name, parent_dir, console)
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        mark_complete(directory, made_from)
    return directory


def prepared_start(stage_dir: Path, parent_dir: Path | None) -> Path | None:
    """Return the directory that `save_start` returned."""
    written = (stage_dir / START, stage_dir / BASE)
    return next((place for place in written if read_marker(place) is not None), parent_dir)
