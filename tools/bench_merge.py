"""Merging on disk against PEFT's merge in memory: the same adapter and base, each in processes of its own.

    python tools/bench_merge.py                                # SmolLM2-135M's shape, random weights
    python tools/bench_merge.py --base DIR --repeats 5 --json merge.json

PEFT's way is `from_pretrained`, `PeftModel.from_pretrained`, `merge_and_unload`, `save_pretrained`; ours is
`sparsevlm merge --no-check`, which PEFT's has no counterpart of. Both write the same bfloat16 weights (compared at the
end of the first round). The ways take turns. Seconds are counted once everything is imported, and from the start of the
process; those of the processor, of all threads, depend less on what else the machine does. Memory is the most that the
process ever held. Of the repeats the median counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("peft", "sparsevlm")

_ROWS = (
    ("seconds", "seconds, imported"),
    ("processor", "… of the processor"),
    ("process", "seconds, whole process"),
    ("peak_mb", "peak memory, MB"),
    ("above_mb", "… above imports, MB"),
)


def write_base(directory: Path) -> None:
    """Write a random model of the shape of SmolLM2-135M in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)


def write_adapter(base: Path, directory: Path, rank: int) -> None:
    """Write a LoRA on all linear layers whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(directory))


def merge(way: str, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Merge once, in this process."""
    if way == "peft":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM._model_mapping[_config_class(base)]  # imports the class
        imported, start, processor = _peak_mb(), time.perf_counter(), time.process_time()
        model = AutoModelForCausalLM.from_pretrained(base)
        merged: Any = PeftModel.from_pretrained(model, str(adapter))
        merged.merge_and_unload().save_pretrained(out)
    else:
        import peft  # noqa: F401

        from sparsevlm.export.merge import merge_adapter

        _config_class(base)
        imported, start, processor = _peak_mb(), time.perf_counter(), time.process_time()
        merge_adapter(str(adapter), out, base=str(base), check=False)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return {"seconds": seconds, "processor": processor, "peak_mb": _peak_mb(), "above_mb": _peak_mb() - imported}


def _peak_mb() -> float:
    """Return the most memory that this process held (Linux; `getrusage` counts the parent's before exec)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def _config_class(base: Path) -> Any:
    from transformers import AutoConfig

    return type(AutoConfig.from_pretrained(base))


def measure(base: Path, adapter: Path, root: Path, repeats: int) -> dict[str, Any]:
    """Run both ways in turn, each in a fresh process."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way in WAYS:
            out = root / way
            shutil.rmtree(out, ignore_errors=True)
            start = time.perf_counter()
            command = [sys.executable, __file__, "--one", way, str(base), str(adapter), str(out)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            whole = time.perf_counter() - start
            runs[way].append(json.loads(done.stdout.splitlines()[-1]) | {"process": whole})
        if repeat == 0:
            _compare(root / "peft", root / "sparsevlm")
    return {way: {key: statistics.median(run[key] for run in found) for key, _ in _ROWS} for way, found in runs.items()}


def _compare(theirs: Path, ours: Path) -> None:
    """Stop if the two ways wrote different models."""
    import torch
    from safetensors.torch import load_file

    first, second = (load_file(directory / "model.safetensors") for directory in (theirs, ours))
    if first.keys() != second.keys():
        raise SystemExit(f"the ways wrote other tensors: {sorted(first.keys() ^ second.keys())[:5]}")
    differ = [key for key in first if not torch.equal(first[key], second[key])]
    print(f"{len(first)} tensors written by both, {len(differ)} of them not bit for bit the same", flush=True)


def print_table(found: dict[str, Any]) -> None:
    print(f"{'':24}{'PEFT':>12}{'sparsevlm':>12}{'ratio':>8}")
    for key, what in _ROWS:
        theirs, ours = found["peft"][key], found["sparsevlm"][key]
        print(f"{what:24}{theirs:>12.2f}{ours:>12.2f}{theirs / ours:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a model directory in one file; default: random weights")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, metavar=("WAY", "BASE", "ADAPTER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, *paths = options.one
        print(json.dumps(merge(way, *map(Path, paths))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = options.base or root / "base"
        if options.base is None:
            write_base(base)
        write_adapter(base, root / "adapter", options.rank)
        found = measure(base, root / "adapter", root, options.repeats)
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
