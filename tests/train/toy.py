"""A tiny stage without files: colour questions over plain pictures, some rows text only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import Encoded, Media, Message, Sample
from sparsevlm.recipe.schema import Recipe, Upcycle
from sparsevlm.train.arguments import set_num_steps, training_arguments
from sparsevlm.train.callbacks import MetricsWriter, read_metrics
from sparsevlm.train.parts import select_trainable
from sparsevlm.train.trainer import VLMTrainer
from sparsevlm.vision.tokens import MediaKind
from tests import tiny

COLORS = ["red", "green", "blue", "yellow"]


def toy_sample(i: int) -> Sample:
    """Question `i`; every third is text only, answers differ in length."""
    color = COLORS[i % 4]
    picture = Media(MediaKind.IMAGE, tiny.picture(color))
    question = (picture, "what color is this ?") if i % 3 else ("what is a cat ?",)
    answer = f"{color} picture" if i % 2 else f"a big {color} square picture"
    return Sample((Message("user", question), Message("assistant", (answer,))), id=str(i), source="toy")


class ToyRows(Dataset):
    """Row i = one sample (or `pack` samples)."""

    def __init__(self, processor: Any, num_rows: int, pack: int = 1) -> None:
        self.processor, self.num_rows, self.pack = processor, num_rows, pack

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> list[Encoded]:
        return [self.processor.encode(toy_sample(self.pack * i + k)) for k in range(self.pack)]


def toy_recipe(parts: dict[str, str], steps: int = 6, trains: Any = ("connector", "language"), **stage: Any) -> Recipe:
    """A recipe with one stage `toy`."""
    batch = {"rows": 4, "rows_per_rank": 2, "workers": 0} | stage.pop("batch", {})
    optim = {"lr": 1e-2, "schedule": "constant", "warmup": 0} | stage.pop("optim", {})
    extra = stage.pop("recipe", {})
    return Recipe.model_validate(
        {
            "name": "toy",
            "model": tiny.recipe_model(parts).model_dump(),
            "data": {"toy": {"path": "toy.json", "format": "llava"}},
            "report_to": [],
            "stages": {
                "toy": {
                    "trains": list(trains),
                    "data": ["toy"],
                    "steps": steps,
                    "log_every": 1,
                    "save_every": 1000,
                    "batch": batch,
                    "optim": optim,
                    **stage,
                }
            },
            **extra,
        }
    )


def toy_trainer(
    recipe: Recipe,
    built: tuple[Any, Any],
    directory: Path,
    *,
    packed: bool = True,
    pack: int = 1,
    dataset: Any = None,
    **kwargs: Any,
) -> VLMTrainer:
    """The trainer of a toy recipe over a model and processor; upcycled where the stage says so."""
    from sparsevlm.model.build import set_attention
    from sparsevlm.moe.upcycle import upcycle_model

    model, processor = built
    stage = recipe.stages["toy"]
    set_attention(model, "auto")
    if isinstance(stage.upcycle, Upcycle):
        upcycle_model(model, stage.upcycle)
    select_trainable(model, stage.trains)
    args = training_arguments(recipe, "toy", stage_dir=directory, world_size=1, sharded=False)
    assert stage.steps is not None
    set_num_steps(args, stage, stage.steps)
    return VLMTrainer(
        model,
        args,
        processor=processor,
        dataset=dataset or ToyRows(processor, stage.steps * stage.batch.rows, pack),
        collator=Collator(processor.tokenizer.pad_token_id, packed=packed),
        optim=stage.optim,
        stage_dir=directory,
        callbacks=[MetricsWriter(directory / "metrics.jsonl")],
        **kwargs,
    )


def losses(directory: Path) -> list[float]:
    """Losses in a metrics file."""
    return [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]


def state(model: Any) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
