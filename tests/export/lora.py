"""Adapters with random weights, made and merged by PEFT, for the tests of merging."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def load_text(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def train(base: Path, out: Path, load: Callable[[Path], Any] = load_text, *, seed: int = 1, **options: Any) -> Path:
    """Write an adapter whose every tensor, and that of every module saved whole, is random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(str(out))
    return out


def merge_with_peft(base: Path, adapter: Path, out: Path, load: Callable[[Path], Any] = load_text) -> Path:
    """Write what PEFT merges in memory."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().save_pretrained(out)
    return out


def weights(directory: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(directory.glob("*.safetensors")) for key, value in load_file(file).items()}


def save_adapter(directory: Path, **options: Any) -> Path:
    """Write a configuration beside one tensor, for what is refused before weights are looked at."""
    import json

    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **options}))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}, directory / "adapter_model.safetensors")
    return directory
