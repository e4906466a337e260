"""Packed against padded against trl's SFTTrainer: the same model, the same records, three mixes of lengths.

    python tools/bench_packing.py                       # a few minutes on two cores
    python tools/bench_packing.py --width 512 --layers 8 --records 512 --json packing.json

A random vision tower and language model of the given size are trained on conversations of random words, two thirds of
them about a picture. Every way trains on all records once, in batches of as many tokens. Reported are tokens a second
without padding (from the second step on, the fastest of the repeats) and the share of padding among all tokens. `trl`
is its own trainer with its own collator for vision data: it pads, and a batch holds samples of any length, where
`padded` groups samples of like length.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MIXES = {
    "even": "all between 180 and 220 words",
    "varied": "log-normal around 120 words, 16 to 900",
    "skewed": "nine of ten 24 to 64 words, the tenth 600 to 900",
}
WAYS = ("packed", "padded", "trl")
WORDS = 1000
SPECIALS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "user", "assistant", "system", "\n"]


def lengths(mix: str, count: int, seed: int) -> list[int]:
    """Words of each record."""
    random = np.random.default_rng(seed)
    if mix == "even":
        drawn = random.integers(180, 221, count)
    elif mix == "varied":
        drawn = np.clip(random.lognormal(np.log(120), 0.8, count), 16, 900)
    else:
        drawn = np.where(random.random(count) < 0.9, random.integers(24, 65, count), random.integers(600, 901, count))
    return [int(n) for n in drawn]


def write_parts(root: Path, width: int, layers: int) -> dict[str, str]:
    """Write a random tower (64 px, 16 tokens), a random language model and a word tokenizer."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocab = {word: i for i, word in enumerate([*SPECIALS, *(f"w{i}" for i in range(WORDS))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s\w]|\w+"), behavior="removed", invert=True)
    extra = ["<|im_start|>", "<image>", "<video>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>", extra_special_tokens=extra
    )
    heads = max(1, width // 64)
    tower = AutoConfig.for_model(
        "siglip_vision_model", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        image_size=64, patch_size=16,
    )  # fmt: skip
    language = AutoConfig.for_model(
        "llama", vocab_size=len(vocab), hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=vocab["<|im_end|>"], pad_token_id=vocab["<pad>"],
    )  # fmt: skip
    paths = {"vision": root / "vision", "language": root / "language"}
    AutoModel.from_config(tower).save_pretrained(paths["vision"])
    AutoModelForCausalLM.from_config(language).save_pretrained(paths["language"])
    tokenizer.save_pretrained(paths["language"])
    return {name: str(path) for name, path in paths.items()}


def write_records(root: Path, mix: str, count: int) -> list[dict[str, Any]]:
    """Write records in LLaVA's format, with their pictures; return them."""
    from PIL import Image

    random = np.random.default_rng(1)
    rows = []
    for number, words in enumerate(lengths(mix, count, seed=2)):
        text = [f"w{i}" for i in random.integers(0, WORDS, words)]
        asked, answered = " ".join(text[: words // 4]), " ".join(text[words // 4 :])
        row: dict[str, Any] = {"id": number}
        if number % 3:
            row["image"] = f"{mix}-{number}.png"
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / row["image"])
            asked = f"<image>\n{asked}"
        row["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
        rows.append(row)
    (root / f"{mix}.json").write_text(json.dumps(rows))
    return rows


def make_recipe(root: Path, parts: dict[str, str], mix: str, tokens: int, packed: bool, rows: int) -> Any:
    """The recipe of one run; a row is a pack, or one of `rows` padded samples."""
    from sparsevlm.recipe.schema import Recipe

    batch = {"rows": 1 if packed else rows, "rows_per_rank": 1 if packed else rows, "max_length": tokens, "workers": 0}
    return Recipe.model_validate(
        {
            "name": "bench",
            "model": {
                "vision": {"path": parts["vision"], "resize": "stretch"},
                "language": {"path": parts["language"], "chat_template": "chatml"},
            },
            "data": {"records": {"path": str(root / f"{mix}.json"), "format": "llava"}},
            "stages": {
                "train": {
                    "trains": ["connector", "language"],
                    "data": ["records"],
                    "epochs": 1,
                    "batch": {**batch, "packing": packed},
                    "optim": {"lr": 1e-4, "schedule": "constant", "warmup": 0},
                    "log_every": 100_000,
                    "save_every": 100_000,
                }
            },
            "report_to": [],
        }
    )


class Meter:
    """Counts the tokens of each batch that a collator makes, and when each step ended."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.tokens: list[tuple[int, int]] = []  # without padding, with it
        self.ends: list[float] = []

    def __call__(self, rows: Any) -> dict[str, Any]:
        """Collate."""
        batch = self.collator(rows)
        held = batch["input_ids"].numel()
        mask = batch.get("attention_mask")
        self.tokens.append((held if mask is None else int(mask.sum()), held))
        return batch

    def callback(self) -> Any:
        """A trainer callback that notes the end of each step."""
        from transformers import TrainerCallback

        meter = self

        class Clock(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                meter.ends.append(Meter.clock())

        return Clock()

    def result(self) -> dict[str, float]:
        """Tokens a second from the second step on, and the share of padding."""
        if len(self.ends) < 2:
            raise ValueError("one step is too few to measure: raise --records or lower --tokens")
        real, held = (sum(pair[i] for pair in self.tokens[1 : len(self.ends)]) for i in (0, 1))
        seconds = self.ends[-1] - self.ends[0]
        return {
            "tokens_per_second": real / seconds,
            "padding": 1 - real / held,
            "tokens": float(real),
            "seconds": seconds,
        }


def run_ours(recipe: Any, root: Path, packed: bool) -> dict[str, float]:
    """Train with the project's trainer."""
    from sparsevlm.data.collate import Collator
    from sparsevlm.data.stream import plan_rows
    from sparsevlm.model.build import build_model
    from sparsevlm.train.arguments import set_num_steps, training_arguments
    from sparsevlm.train.parts import select_trainable
    from sparsevlm.train.trainer import VLMTrainer

    stage = recipe.stages["train"]
    model, processor = build_model(recipe.model)
    select_trainable(model, stage.trains, stage.optim)
    data = plan_rows(recipe.data, stage, processor.measure, processor.encode, packed=packed, seed=0)
    meter = Meter(Collator(processor.tokenizer.pad_token_id, packed=packed))
    args = training_arguments(recipe, "train", stage_dir=root / "run", world_size=1, sharded=False)
    args.save_strategy = "no"
    set_num_steps(args, stage, data.num_steps)
    trainer = VLMTrainer(
        model, args, processor=processor, dataset=data, collator=meter, optim=stage.optim, stage_dir=root / "run",
        callbacks=[meter.callback()],
    )  # fmt: skip
    trainer.train()
    return meter.result()


def run_trl(recipe: Any, root: Path, records: list[dict[str, Any]], rows: int) -> dict[str, float]:
    """Train with trl's SFTTrainer and its collator for vision data."""
    import torch
    from datasets import Dataset, Features, Image, List, Value
    from trl import SFTConfig, SFTTrainer

    from sparsevlm.model.build import build_model
    from sparsevlm.train.parts import select_trainable

    stage = recipe.stages["train"]
    model, processor = build_model(recipe.model)
    select_trainable(model, stage.trains, stage.optim)
    turn = {"role": Value("string"), "content": Value("string")}
    columns: dict[str, list[Any]] = {"messages": [], "images": []}
    for record in records:
        roles = ("user", "assistant")
        texts = [t["value"].removeprefix("<image>\n") for t in record["conversations"]]
        columns["messages"].append([{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])
        columns["images"].append([str(root / record["image"])] if "image" in record else [])
    dataset = Dataset.from_dict(columns, features=Features({"messages": List(turn), "images": List(Image())}))
    args = SFTConfig(
        output_dir=str(root / "trl"), per_device_train_batch_size=rows, num_train_epochs=1, learning_rate=1e-4,
        lr_scheduler_type="constant", max_length=None, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_strategy="no", use_cpu=not torch.accelerator.is_available(), seed=0, bf16=False,
        activation_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=processor)
    meter = Meter(trainer.data_collator)
    trainer.data_collator = meter
    trainer.add_callback(meter.callback())
    trainer.train()
    return meter.result()


def show(mix: str, rows: int, tokens: int, results: dict[str, dict[str, float]]) -> None:
    """Print the results of one mix."""
    print(f"\n{mix}: {MIXES[mix]}; a step holds {tokens} packed tokens or {rows} padded rows")
    slowest = min(run["tokens_per_second"] for run in results.values())
    base = results.get("trl", {"tokens_per_second": slowest})["tokens_per_second"]
    for way, run in results.items():
        speed = run["tokens_per_second"]
        print(f"  {way:8}{speed:10,.0f} tokens/s  {speed / base:5.2f}x  {run['padding']:6.1%} padding")


def main() -> None:
    """Run all ways on all mixes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="width of the language model")
    parser.add_argument("--layers", type=int, default=4, help="its decoder layers")
    parser.add_argument("--records", type=int, default=192, help="conversations of each mix")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a packed row; padded batches hold as many")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the fastest counts")
    parser.add_argument("--mixes", nargs="+", choices=list(MIXES), default=list(MIXES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds (for a busy machine)")
    options = parser.parse_args()
    if options.cpu_time:
        Meter.clock = staticmethod(time.process_time)
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        parts = write_parts(root, options.width, options.layers)
        for mix in options.mixes:
            records = write_records(root, mix, options.records)
            mean = sum(len(t["value"].split()) for r in records for t in r["conversations"]) / len(records) + 20
            rows = max(2, round(options.tokens / mean))
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
            for _ in range(options.repeats):  # in turn, so that a busy machine slows all of them
                for way in options.ways:
                    recipe = make_recipe(root, parts, mix, options.tokens, way == "packed", rows)
                    trl = way == "trl"
                    run = run_trl(recipe, root, records, rows) if trl else run_ours(recipe, root, way == "packed")
                    runs[way].append(run)
            results[mix] = {way: max(done, key=lambda r: r["tokens_per_second"]) for way, done in runs.items()}
            show(mix, rows, options.tokens, results[mix])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
