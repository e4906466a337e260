"""The evaluations that follow a stage."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.recipe.schema import Eval, Recipe
from sparsevlm.train.checkpoints import write_atomically
from sparsevlm.train.summary import STAGE_FILE

SURVEYED = 64
"""Samples on which a stage's routing is looked at when it ends."""

if TYPE_CHECKING:
    from rich.console import Console

    from sparsevlm.train.trainer import VLMTrainer


def evals_of(recipe: Recipe, name: str) -> dict[str, Eval]:
    """Return the evaluations that follow a stage."""
    chosen = recipe.stages[name].evals
    return {key: recipe.evals[key] for key in (recipe.evals if chosen is None else chosen)}


def eval_specs(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return the evaluations that follow a stage as JSON types."""
    return {key: spec.model_dump(mode="json") for key, spec in evals_of(recipe, name).items()}


def trained_model(trainer: VLMTrainer, recipe: Recipe, stage_dir: Path) -> tuple[Any, Any]:
    """Return a whole model to evaluate: the trainer's own, or the saved one where the trainer's is in shards."""
    if not trainer.is_deepspeed_enabled:
        return trainer.vlm, trainer.processing_class
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else loading would give shards again
    model, processor = load_for_evaluation(recipe, stage_dir)
    return model, processor


def load_for_evaluation(recipe: Recipe, stage_dir: Path) -> tuple[Any, Any]:
    """Load a saved stage onto the accelerator, if there is one."""
    import torch

    from sparsevlm.model.build import load_model

    model, processor = load_model(stage_dir, attention=recipe.model.language.attention)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.nn.Module.to(model, device or "cpu"), processor


def evaluate_stage(recipe: Recipe, name: str, model: Any, processor: Any, stage_dir: Path) -> dict[str, Any]:
    """Run the evaluations that follow a stage; return their results by name."""
    from sparsevlm.eval.run import evaluate

    return {
        key: evaluate(model, processor, spec, predictions_path=stage_dir / "eval" / f"{key}.jsonl")
        for key, spec in evals_of(recipe, name).items()
    }


def survey_stage(recipe: Recipe, name: str, model: Any, processor: Any, stage_dir: Path) -> None:
    """Write a sparse model's routing on some questions of the stage's evaluations, else on some of its training data.

    Nothing is written for a model without routers.
    """
    from sparsevlm.eval.routing import survey_routing
    from sparsevlm.eval.survey import encoded_questions, questions, write_survey
    from sparsevlm.moe.groups import router_groups
    from sparsevlm.train.data import first_records

    if not router_groups(model):
        return
    stage = recipe.stages[name]
    items = list(encoded_questions(processor, questions(evals_of(recipe, name), SURVEYED)))
    if not items:
        each = -(-SURVEYED // len(stage.data))
        samples = [sample for source in stage.data for sample in first_records(source, recipe)[:each]]
        items = list(encoded_questions(processor, samples, stage.batch.max_length))
    document, pictures = survey_routing(model, processor, items)
    write_survey(document, pictures, stage_dir)


def refresh_evals(recipe: Recipe, name: str, stage_dir: Path, console: Console) -> None:
    """Evaluate a finished stage again where the recipe's evaluations changed since; its training stands."""
    record = json.loads((stage_dir / STAGE_FILE).read_text(encoding="utf-8"))
    specs = eval_specs(recipe, name)
    if record.get("eval_specs") == specs:  # stages of older versions do not say
        return
    console.print(f"{name}: the evaluations changed, evaluating again", highlight=False)
    evals = evaluate_stage(recipe, name, *load_for_evaluation(recipe, stage_dir), stage_dir)
    record["summary"]["eval"] = by_kind(evals)
    record |= {"evals": {key: result.report for key, result in evals.items()}, "eval_specs": specs}
    write_atomically(stage_dir / STAGE_FILE, json.dumps(record, indent=2) + "\n")


def by_kind(evals: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Merge results into one table; a kind that several evaluations have gets its evaluation's name in front."""
    times = Counter(kind for result in evals.values() for kind in result)
    return {
        kind if times[kind] == 1 else f"{name}/{kind}": dict(cell)
        for name, result in evals.items()
        for kind, cell in result.items()
    }
