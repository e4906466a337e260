"""Recipes made small: the same structure over tiny parts and data, so that a shipped recipe can be trained in seconds.

A connector block with options that are large by default, or by what a system publishes, has a rule in `BLOCKS`; blocks
without one keep their options.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsevlm.connectors.base import parse_block
from sparsevlm.recipe.schema import Recipe
from tests.data.media_files import write_video
from tests.train.runs import write_data

Options = dict[str, Any]
WIDTH = 32
"""Of the tiny tower and of the tiny language model; the tower sees 4 x 4 patches of 32 px."""
LARGER_SIDE = 48
"""Pixels for recipes that show the tower larger pictures than it was trained on."""
WORDS = 256
"""More than the tiny tokenizer has, whatever is added to it."""
MAX_LENGTH = 256


def _width(options: Options, *names: str) -> Options:
    """Return small numbers for widths that are given in numbers, not derived."""
    return {name: WIDTH for name in names if isinstance(options.get(name), int)}


def _qformer(options: Options, language: str) -> Options:
    local = {"tokenizer": language} if options["tokenizer"] != "language" else {}
    small = {"queries": 3, "dim": 16, "layers": 2, "heads": 2, "ff_dim": 24, "vocab_size": WORDS, "weights": None}
    return small | local


def _resampler(options: Options, language: str) -> Options:
    small = {"latents": 4, "depth": min(options["depth"], 2), "heads": 2, "head_dim": 8}
    limits = {name: min(options[name], 2) for name in ("ff_mult", "time_frames")}
    return small | limits | _width(options, "dim")


def _pool(options: Options, language: str) -> Options:
    return {"size": 2 if isinstance(options["size"], int) else [2, 2]}


def _clusters(options: Options, language: str) -> Options:
    levels = len(options["clusters"])
    neighbours = {"neighbours": [2] * levels} if options["neighbours"] else {}
    return {"clusters": [max(2, 8 >> level) for level in range(levels)], "frames_per_event": 2, **neighbours}


def _context(options: Options, language: str) -> Options:
    qformer = options["qformer"]
    return {"qformer": qformer | _qformer(qformer, language), "grid": min(options["grid"], 2)}


BLOCKS: dict[str, Callable[[Options, str], Options]] = {
    "adaptive_pool": _pool,
    "context_token": _context,
    "dpc_knn": _clusters,
    "dynamic_compressor": lambda options, language: _width(options, "dim"),
    "linear": lambda options, language: _width(options, "dim"),
    "mlp": lambda options, language: _width(options, "dim", "hidden_dim"),
    "perceiver_resampler": _resampler,
    "qformer": _qformer,
    "swiglu_mlp": lambda options, language: _width(options, "dim", "hidden_dim"),
}
"""Block type -> what changes, from all its options and the directory of a tiny tokenizer."""


FUSIONS: dict[str, Options] = {
    "gated_cross_attention": {"every": 1, "heads": 2, "head_dim": 8, "ff_mult": 2},
    "visual_expert": {},  # as large as what it doubles
}
"""Type of a fusion -> options that make it small."""


def shrink_block(block: Options, language: str) -> Options:
    """Return a connector block as small as its rule makes it."""
    rule = BLOCKS.get(block["type"])
    return block if rule is None else block | rule(parse_block(block).model_dump(mode="json"), language)


def write_records(directory: Path) -> Path:
    """LLaVA-format rows: pictures, text alone and a clip in which somebody speaks."""
    file = write_data(directory, rows=12)
    write_video(directory / "clip.mp4", frames=4, fps=2)
    (directory / "clip.srt").write_text("1\n00:00:00,400 --> 00:00:01,000\na big cat\n")
    talk = [{"from": "human", "value": "<video>\nwhat moves ?"}, {"from": "gpt", "value": "a cat"}]
    clip = {"video": "clip.mp4", "subtitles": "clip.srt", "conversations": talk}
    records = json.loads(file.read_text()) + [{"id": f"v{i}", **clip} for i in (0, 1)]
    file.write_text(json.dumps(records))
    return file


def shrink_vision(vision: Options, path: str) -> Options:
    """Return the section `model.vision` over the tiny tower."""
    small = vision | {"path": path}
    if isinstance(vision.get("layer"), list):
        small["layer"] = [1 + i % 2 for i in range(len(vision["layer"]))]
    elif vision.get("layer", -1) < -2:
        small["layer"] = -2
    if vision.get("image_size"):
        small["image_size"] = LARGER_SIDE
    if vision.get("native"):
        small |= shrink_native(vision)
    return small


def shrink_native(vision: Options) -> Options:
    """Return rules for patches of 8 in place of 16: half the sides and fewer pixels. Raw patches keep theirs."""
    native = vision["native"]
    if vision["path"] == "sparsevlm:patches":
        return {"path": vision["path"], "native": native | {"image": native["image"] | {"max_width": 90}}}
    small = {}
    for name, rule in native.items():
        if isinstance(rule, dict):
            pixels = {limit: rule[limit] // 64 for limit in ("min_pixels", "max_pixels") if limit in rule}
            rule = rule | {"multiple": rule["multiple"] // 2} | pixels
        small[name] = rule
    return {"native": small}


def shrink(recipe: Recipe, parts: dict[str, str], records: Path) -> dict[str, Any]:
    """Keep the recipe's structure (connector, stages, what trains, mixture, schedule); make everything in it small."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    raw["output"], raw["report_to"], raw["evals"] = str(records.parent / "run"), [], {}
    model = raw["model"]
    model["vision"] = shrink_vision(model["vision"], parts["vision"])
    model["language"] = model["language"] | {"path": parts["language"]}
    if "connector" in model:
        model["connector"] = [shrink_block(block, parts["language"]) for block in model["connector"]]
    if "fusion" in model:
        model["fusion"] = model["fusion"] | FUSIONS[model["fusion"]["type"]]
    counts = ("min_frames", "max_tokens")
    model["video"] = {k: v for k, v in model.get("video", {}).items() if k not in counts} | {
        "fps": None,
        "max_frames": 3,
    }
    if "long_frames" in model["video"]:
        model["video"]["long_frames"] = 3
    raw["data"] = {name: {"path": str(records), "format": "llava"} for name in raw["data"]}
    raw.pop("sharding", None)
    for stage in raw["stages"].values():
        for gone in ("epochs", "sharding", "save_every", "evals"):
            stage.pop(gone, None)
        stage["steps"] = 2
        if stage.get("image_size"):
            stage["image_size"] = LARGER_SIDE
        packing = stage.get("batch", {}).get("packing", "auto")
        stage["batch"] = {"rows": 2, "rows_per_rank": 1, "max_length": MAX_LENGTH, "workers": 0, "packing": packing}
        stage["log_every"] = 1
        stage.setdefault("optim", {})
        stage["optim"].pop("warmup", None)
    return raw
