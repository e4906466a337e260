"""A finished run on disk, small and complete, with everything in it that must stay at home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.export.models import make_model, save

MACHINE = "/home/somebody/secret-project"
"""A place that may appear nowhere in what is uploaded."""

STAYS = {
    "checkpoints/step_5/optimizer.pt": b"\x80\x04optimizer",
    "checkpoints/step_5/model.safetensors": b"weights of a checkpoint",
    "tensorboard/events.out.tfevents.1": b"events",
    "eval/scenes.jsonl": b"{}",
    "training_args.bin": b"\x80\x04",
    "data.json": b"[]",
    "notes.txt": b"mine",
    "stage.json": b"",
    "COMPLETE": b"{}",
}
"""Files of a stage that are never uploaded."""

MODEL_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "metrics.jsonl",
    "processor_config.json",
    "recipe.yaml",
    "report.html",
    "routing.json",
    "summary.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""What is uploaded of `make_run`, without card and weights."""


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe as a stage saves it: parents and data from the Hub and from this machine."""
    source = {"format": "llava", "split": "train", "limit": None, "license": None, "media_root": None}
    return {
        "name": "tiny",
        "output": f"{MACHINE}/runs/tiny",
        "model": {
            "vision": {"path": "google/siglip-tiny"},
            "language": {"path": f"{MACHINE}/models/my-llama", "chat_template": "~/templates/mine.jinja"},
        },
        "data": {
            "captions": source | {"path": "liuhaotian/LLaVA-Pretrain", "license": "cc-by-4.0", "limit": 1000},
            "mine": source | {"path": f"{MACHINE}/mine.json", "media_root": f"{MACHINE}/images", "license": "a | b"},
            "unused": source | {"path": "other/unused"},
        },
        "stages": {
            "align": {"trains": ["connector"], "data": ["captions"], "steps": 10, "epochs": None},
            "moe": {"trains": ["moe"], "data": {"captions": 0.25, "mine": 0.75}, "steps": None, "epochs": 1.5},
        },
    } | changes


def row(name: str, **cells: Any) -> dict[str, Any]:
    """A stage's row of summary.json."""
    parameters = {"total": 2000, "trainable": 300, "activated": 1500}
    counts = {"count": {"accuracy": 0.75, "chance": 0.25, "n": 40, "core": True}}
    counts["odd|kind"] = {"accuracy": 0.5, "chance": 0.5, "n": 10, "core": False}
    return {
        "name": name,
        "seconds": 12.5,
        "loss_first": 3.25,
        "loss_last": 0.5,
        "tokens_per_second": 1234.5,
        "parameters": parameters | {"language_model": {"total": 1800, "activated": 1300}},
        "eval": counts,
        "trains": ["connector"] if name == "align" else ["moe"],
    } | cells


def make_run(folder: Path, shard: str | None = None) -> Path:
    """Write a run of two stages; the last one holds a loadable sparse model.

    Args:
        folder: The run directory.
        shard: Largest weight file; None writes a single one.
    """
    stage = folder / "moe"
    ours, processor = make_model(folder.parent / f"{folder.name}-parts", upcycle={"layers": "alternate", "experts": 4})
    ours.config.text_config._name_or_path = f"{MACHINE}/models/my-llama"
    if shard is None:
        save(ours, processor, stage)
    else:
        ours.save_pretrained(stage, max_shard_size=shard)
        processor.save_pretrained(stage)
    for name, data in STAYS.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(data)
    rows = [row("align"), row("moe")]
    with (stage / "recipe.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(recipe(), stream)
    spec = {"scenes": {"task": "scenes", "path": f"{MACHINE}/scenes.json"}}
    record = {"stage": "moe", "finished": "now", "versions": {"torch": "2.0"}, "summary": rows[1], "eval_specs": spec}
    (stage / "stage.json").write_text(json.dumps(record | {"evals": {"scenes": {"kinds": rows[1]["eval"]}}}))
    (stage / "metrics.jsonl").write_text('{"step": 1, "loss": 3.25}\n')
    (stage / "routing.json").write_text('{"layers": [0]}\n')
    (folder / "summary.json").write_text(json.dumps({"stages": rows}))
    (folder / "report.html").write_text(f"<p>run of {MACHINE}/runs/tiny</p>")
    align = folder / "align"
    align.mkdir()
    for name in ("COMPLETE", "config.json"):
        (align / name).write_text("{}")
    (align / "stage.json").write_text(json.dumps({"stage": "align", "summary": rows[0]}))
    return folder


def add_adapter(run: Path, name: str = "lora", section: Any = None) -> Path:
    """Add a complete stage to a run of `make_run` whose adapter, on the model of stage `moe`, is not at its start."""
    import torch

    from sparsevlm.adapters.attach import attach, save_adapter
    from sparsevlm.model.build import load_model
    from sparsevlm.recipe.adapter import Lora
    from sparsevlm.train.parts import select_trainable

    model, processor = load_model(run / "moe")
    attach(model, section or Lora(type="lora", r=4, targets=["language.attention", "moe.experts", "vision"]))
    select_trainable(model, ["adapter", "connector"])
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    stage = run / name
    save_adapter(model, stage, run / "moe")
    processor.save_pretrained(stage)
    with (stage / "recipe.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(recipe(), stream)
    rows = json.loads((run / "summary.json").read_text())["stages"]
    rows.append(row(name, trains=["adapter", "connector"]))
    (run / "summary.json").write_text(json.dumps({"stages": rows}))
    (stage / "stage.json").write_text(json.dumps({"stage": name, "finished": "now", "summary": rows[-1]}))
    (stage / "metrics.jsonl").write_text('{"step": 1, "loss": 3.25}\n')
    (stage / "COMPLETE").write_text("{}")
    return stage
