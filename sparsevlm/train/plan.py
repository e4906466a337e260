"""What a recipe would do, found out without weights, GPU or network: `plan` and its table.

Every stage is built on the meta device, so what is counted is the model that would be trained. Faults that need the
model (widths that do not meet, layers that are not there) are reported as the loader reports its own, with their lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsevlm.adapters.attach import AdapterReport
from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration, connector_widths
from sparsevlm.recipe.hub import describe_hub
from sparsevlm.recipe.load import RecipeError
from sparsevlm.recipe.schema import Recipe, Stage
from sparsevlm.train.check import ModelCheck
from sparsevlm.train.connector_cost import measure_connector
from sparsevlm.train.expert_parallel import find_faults, find_model_faults, ranks_of_experts
from sparsevlm.train.flops import Shape, Tower, flops_per_step, measure_tower, memory_per_rank
from sparsevlm.train.media import count_visual, items_of, keeps_apart, parse_medium, visual_tokens
from sparsevlm.train.parts import count_parameters, select_trainable
from sparsevlm.train.prepare import training_dtype
from sparsevlm.vision.tokens import ItemShape

DEFAULT_MEDIA = ("640x480", "16f@640x480")
"""What visual tokens are counted for when nothing is asked for."""


def plan(recipe: Recipe, media: Sequence[str] = (), *, world: int = 1) -> dict[str, Any]:
    """Check a recipe against its model and count what each stage costs.

    Args:
        recipe: A loaded recipe.
        media: Pictures and videos to count visual tokens for, as `parse_medium` reads them. The first also says what
            a row holds when a step's arithmetic is counted.
        world: Ranks that the stages run on.

    Returns:
        ``{"recipe", "stages": [{"name", "trains", "adapter", "lr", "parameters": {"total", "trainable", "activated",
        "language_model": {"total", "activated"}}, "visual_tokens": {medium: tokens}, "tokens_per_step",
        "flops_per_step", "memory_per_rank_bytes", "memory"}], "hub", "notes"}``. `adapter` is None or the line that
        training prints: what the targets match, and the adapter's parameters. `memory` divides the bytes by what they
        hold (`host` comes on top); `hub` says what is uploaded, `notes` what could not be checked. Formulas:
        `sparsevlm.train.flops`.

    Raises:
        RecipeError: What does not fit, each at its line.
        ValueError: A medium that cannot be read.
    """
    counted = [parse_medium(text) for text in media or DEFAULT_MEDIA]
    check = ModelCheck(recipe)
    config = check.config()
    sides = {name: check.image_size(config, name) for name in recipe.stages}
    pictures = {side: check.pictures(config, side) for side in sides.values()}
    check.surroundings()
    check.faults += [*find_faults(recipe, world), *find_model_faults(recipe, world)]
    with torch.device("meta"):
        model = SparseVLMForConditionalGeneration(config)
    packable = check.packing(model)

    stages = []
    tower, measured, adapted = None, 0, False
    for name, stage in recipe.stages.items():
        if not check.edit(model, name, stage):
            continue
        side = sides[name]
        items = items_of(recipe, pictures[side], counted[0])
        if tower is None or stage.adapter is not None or adapted or side != measured:
            native = items if pictures[side].native else None
            tower, measured = measure_tower(model, side, native), side  # it may carry an adapter now, or no longer
        adapted = stage.adapter is not None
        tokens = {medium.name: count_visual(recipe, pictures[side], medium) for medium in counted}
        shape = check.shape(name, stage, pictures[side], counted[0], packable, world)
        entry = _describe(model, tower, items, recipe, name, stage, shape, tokens, world)
        stages.append(entry | {"adapter": _describe_adapter(check.adapters.get(name), recipe)})
    if check.faults:
        raise RecipeError(check.faults)
    if keeps_apart(recipe):
        beside = [f"{m.name}: {visual_tokens(recipe, pictures[max(pictures)], m):,}" for m in counted]
        check.notes.append(f"media stay beside the text, one token each; visual tokens there: {', '.join(beside)}")
    if recipe.feature_cache is not None:
        widest = pictures[max(pictures)]
        items = {medium.name: items_of(recipe, widest, medium) for medium in counted}
        check.notes.append(_cached(recipe, connector_widths(config)[1][0], items))
    uploads = None if recipe.hub is None else describe_hub(recipe.hub, list(recipe.stages))
    return {"recipe": recipe.name, "stages": stages, "hub": uploads, "notes": check.notes}


def _cached(recipe: Recipe, width: int, media: dict[str, list[ItemShape]]) -> str:
    """Return what media take in the feature cache."""
    assert recipe.feature_cache is not None
    exact = recipe.model.dtype == "bfloat16" or all(stage.precision == "fp32" for stage in recipe.stages.values())
    size = training_dtype(recipe).itemsize  # autocast leaves some features, those of a norm, in float32
    numbers = {name: width * sum(item.grid.num_tokens for item in items) for name, items in media.items()}
    listed = ", ".join(f"{name} takes {_bytes(count * size)}" for name, count in numbers.items())
    limit = f"at most {recipe.feature_cache.max_gb:g} GB in all"
    return f"feature cache {recipe.feature_cache.path}: {'' if exact else 'up to so much: '}{listed}; {limit}"


def _describe_adapter(report: AdapterReport | None, recipe: Recipe) -> str | None:
    """Return the line that training prints of an adapter."""
    if report is not None and report.quantised is not None:  # here parts have the type of their files, not training's
        before = report.quantised.parameters * training_dtype(recipe).itemsize
        report = replace(report, quantised=replace(report.quantised, before=before))
    return None if report is None else report.describe()


def _describe(
    model: Any,
    tower: Tower,
    items: list[ItemShape],
    recipe: Recipe,
    name: str,
    stage: Stage,
    shape: Shape,
    tokens: dict[str, int],
    world: int,
) -> dict[str, Any]:
    """Return the entry of one stage, whose edits the model already carries."""
    report = select_trainable(model, stage.trains, stage.optim)
    connector = measure_connector(model, items)
    expert_ranks = ranks_of_experts(recipe, name, world)
    memory = memory_per_rank(model, tower, connector, recipe, stage, shape, world, expert_ranks)
    return {
        "name": name,
        "trains": list(stage.trains),
        "lr": {row.part: row.lr for row in report.parts if row.trainable},
        "parameters": count_parameters(model),
        "visual_tokens": tokens,
        "tokens_per_step": stage.batch.rows * stage.batch.max_length,
        "flops_per_step": flops_per_step(model, tower, connector, stage, shape),
        "memory_per_rank_bytes": sum(size for what, size in memory.items() if what != "host"),
        "memory": memory,
    }


def print_plan(document: dict[str, Any], console: Any = None) -> None:
    """Print a plan as tables.

    Args:
        document: What `plan` returned.
        console: A rich console; default: the terminal.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    stages = document["stages"]
    table = Table(title=f"plan of {document['recipe']}", title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(stage["name"], justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("trains", ["\n".join(f"{part} at {lr:g}" for part, lr in stage["lr"].items()) for stage in stages]),
        ("parameters", [_short(stage["parameters"]["total"]) for stage in stages]),
        ("  trainable", [_short(stage["parameters"]["trainable"]) for stage in stages]),
        ("  activated", [_short(stage["parameters"]["activated"]) for stage in stages]),
        ("  language model", [_short(stage["parameters"]["language_model"]["total"]) for stage in stages]),
        ("    activated", [_short(stage["parameters"]["language_model"]["activated"]) for stage in stages]),
    ]
    for medium in stages[0]["visual_tokens"]:
        rows.append((f"visual tokens, {medium}", [f"{stage['visual_tokens'][medium]:,}" for stage in stages]))
    rows += [
        ("tokens a step, at most", [f"{stage['tokens_per_step']:,}" for stage in stages]),
        ("FLOPs a step, at most", [f"{stage['flops_per_step']:.2e}" for stage in stages]),
        ("memory a rank", [_bytes(stage["memory_per_rank_bytes"]) for stage in stages]),
    ]
    for what in stages[0]["memory"]:
        label = "  in host memory" if what == "host" else f"  {what}"
        if any(stage["memory"][what] for stage in stages):
            rows.append((label, [_bytes(stage["memory"][what]) for stage in stages]))
    for label, cells in rows:
        table.add_row(label, *cells)
    console.print(table)
    for stage in stages:
        if stage["adapter"] is not None:
            trained = f"{stage['parameters']['trainable']:,} parameters train in all"
            console.print(
                f"{stage['name']}: {stage['adapter']}; {trained}", highlight=False, markup=False, soft_wrap=True
            )
    if document["hub"] is not None:
        console.print(f"hub: {document['hub']}", highlight=False, markup=False, soft_wrap=True)
    for note in document["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 100 * size else f"{number / size:.0f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
