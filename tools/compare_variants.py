"""Ways to train the same thing, side by side: accuracy, parameters that train, memory, time and size on disk.

    python tools/compare_variants.py full=runs/openmoji/instruct LoRA=runs/openmoji_lora/lora --steps 12

Accuracy, counts and sizes are read from finished stages. Memory and time are measured now, in one go: each variant's
stage is trained for a few steps in a process of its own, from its own parent, in turn and several times round.
Memory is the peak of the process (resident, libraries and data included), time the median step after the first two.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SKIPPED_STEPS = 2
"""Steps at the start that are not timed: caches fill, threads start."""


@dataclass
class Variant:
    """One way.

    Attributes:
        name: Row of the table.
        stage_dir: Its finished stage.
    """

    name: str
    stage_dir: Path

    @property
    def record(self) -> dict[str, Any]:
        """What the stage says of itself."""
        return json.loads((self.stage_dir / "stage.json").read_text(encoding="utf-8"))

    def accuracy(self, kinds: list[str]) -> float:
        """Return the share of right answers over the core kinds, or those asked for."""
        found = self.record["summary"]["eval"]
        chosen = [kind for name, kind in found.items() if (name in kinds if kinds else kind["core"])]
        if not chosen:
            raise SystemExit(f"{self.stage_dir} has no result for {kinds or 'core kinds'}; it has {', '.join(found)}")
        return sum(kind["accuracy"] * kind["n"] for kind in chosen) / sum(kind["n"] for kind in chosen)

    def bytes_on_disk(self) -> int:
        """Return the size of the weights that the stage left, without a parent's."""
        return sum(file.stat().st_size for file in self.stage_dir.glob("*.safetensors"))


def parse_variant(text: str) -> Variant:
    """Read ``NAME=RUN/STAGE``."""
    name, found, path = text.partition("=")
    if not found or not (Path(path) / "stage.json").is_file():
        raise SystemExit(f"{text!r}: expected NAME=RUN/STAGE with a finished stage in RUN/STAGE")
    return Variant(name, Path(path))


def measure(variant: Variant, steps: int) -> tuple[float, float]:
    """Train a variant's stage for a few steps; return its peak memory in MB and the median seconds of a step."""
    run, stage = variant.stage_dir.parent, variant.stage_dir.name
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory) / "run"
        scratch.mkdir()
        for earlier in run.iterdir():  # finished stages are not trained again
            if earlier.is_dir() and earlier.name != stage and (earlier / "stage.json").is_file():
                (scratch / earlier.name).symlink_to(earlier.resolve())
        overrides = [f"output={scratch}", f"stages.{stage}.steps={steps}", f"stages.{stage}.log_every=1"]
        overrides += [f"stages.{stage}.evals=[]", f"stages.{stage}.save_every={steps}", "report_to=[]"]
        recipe = scratch / "recipe.yaml"
        recipe.write_text(_only_up_to(variant.stage_dir / "recipe.yaml", stage), encoding="utf-8")
        command = [sys.executable, __file__, "--one", str(recipe), *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{variant.name}: {done.stderr[-3000:]}")
        lines = (scratch / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        shutil.rmtree(scratch / stage)
    rows = [json.loads(line) for line in lines]
    seconds = [row["tokens"] / row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    return float(done.stdout.splitlines()[-1]), statistics.median(seconds[SKIPPED_STEPS:])


def _only_up_to(recipe: Path, last: str) -> str:
    """Return a recipe without the stages after one."""
    from sparsevlm.recipe.load import load_recipe, recipe_text

    options = load_recipe(recipe).model_dump(mode="json", exclude={"base"})
    names = list(options["stages"])
    options["stages"] = {name: options["stages"][name] for name in names[: names.index(last) + 1]}
    return recipe_text(options)


def train_one(recipe: str, overrides: list[str]) -> None:
    """Train in this process and print its peak memory in MB."""
    from sparsevlm.train.launch import train

    train(Path(recipe), overrides)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def count(number: float) -> str:
    """Return a number of parameters or bytes in short."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="NAME=RUN/STAGE")
    parser.add_argument("--kind", action="append", default=[], help="kind of question, as EVAL/KIND; default: the core")
    parser.add_argument("--steps", type=int, default=12, help="steps to measure; 0: measure nothing")
    parser.add_argument("--rounds", type=int, default=2, help="times that all variants are measured in turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs="+", metavar="RECIPE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train_one(options.one[0], options.one[1:])
        return
    variants = [parse_variant(text) for text in options.variants]
    rows = [
        {
            "variant": variant.name,
            "accuracy": variant.accuracy(options.kind),
            "trained": variant.record["summary"]["parameters"]["trainable"],
            "total": variant.record["summary"]["parameters"]["total"],
            "bytes": variant.bytes_on_disk(),
        }
        for variant in variants
    ]
    measured: dict[str, list[tuple[float, float]]] = {variant.name: [] for variant in variants}
    for _ in range(options.rounds if options.steps else 0):
        for variant in variants:
            measured[variant.name].append(measure(variant, options.steps))
    for row in rows:
        if found := measured[row["variant"]]:
            row["peak_mb"] = max(memory for memory, _ in found)
            row["seconds_a_step"] = min(seconds for _, seconds in found)
    print("| | held-out accuracy | trained parameters | peak memory | seconds a step | on disk |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        memory = f"{row['peak_mb'] / 1024:.2f} GB" if "peak_mb" in row else ""
        seconds = f"{row['seconds_a_step']:.2f}" if "seconds_a_step" in row else ""
        print(
            f"| {row['variant']} | {row['accuracy']:.1%} | {count(row['trained'])} | {memory} | {seconds} | "
            f"{count(row['bytes'])}B |"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
