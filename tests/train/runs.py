"""Small recipes on disk, for tests that run whole stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsevlm.train.callbacks import read_metrics
from tests import tiny
from tests.train.toy import COLORS


def write_data(directory: Path, rows: int = 48) -> Path:
    """Write coloured pictures and LLaVA-format questions; every third row is text only."""
    directory.mkdir(parents=True, exist_ok=True)
    for color in COLORS:
        tiny.picture(color).save(directory / f"{color}.png")
    records: list[dict[str, Any]] = []
    for i in range(rows):
        color = COLORS[i % 4]
        record: dict[str, Any] = {"id": str(i)}
        if i % 3:
            record["image"] = f"{color}.png"
        question = "<image>\nwhat color is this ?" if i % 3 else "what is a cat ?"
        answer = f"{color} picture" if i % 2 else f"a big {color} square picture"
        record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(record)
    file = directory / "train.json"
    file.write_text(json.dumps(records))
    return file


def write_recipe(directory: Path, parts: dict[str, str], **changes: Any) -> Path:
    """Write a recipe over `write_data` with the stages `align` and `moe`, or those in `only`.

    `stage` is laid over each stage, everything else over the recipe.
    """
    data = directory / "data" / "train.json"
    if not data.is_file():
        write_data(data.parent)
    batch = {"rows": 4, "rows_per_rank": 1, "workers": 0, "max_length": 64, "packing": True}
    common: dict[str, Any] = {
        "data": ["toy"],
        "steps": 6,
        "batch": batch,
        "log_every": 1,
        "save_every": 2,
        "optim": {"lr": 5e-3},
    }
    stages = {
        "align": {"trains": ["connector"], **common},
        "moe": {"trains": ["moe", "connector"], "upcycle": {"layers": [1], "aux_loss_coef": 0.1}, **common},
    }
    stages = {name: stages[name] | changes.get("stage", {}) for name in changes.pop("only", stages)}
    changes.pop("stage", None)
    recipe = {
        "name": "tiny",
        "output": str(directory / "run"),
        "model": tiny.recipe_model(parts).model_dump(mode="json"),
        "data": {"toy": {"path": str(data), "format": "llava"}},
        "stages": stages,
        "report_to": [],
        **changes,
    }
    file = directory / "recipe.json"  # YAML is a superset
    file.write_text(json.dumps(recipe))
    return file


def metrics(run: Path, stage: str, *keys: str) -> list[tuple[Any, ...]]:
    """The chosen numbers of each line of a stage's metrics."""
    return [tuple(row.get(key) for key in keys) for row in read_metrics(run / stage / "metrics.jsonl")]
