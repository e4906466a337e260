"""A mixture of LoRA experts as a method of PEFT: `get_peft_model(model, LoraExpertsConfig(...))`."""

# Before our own modules: PEFT's import is what enters them in its tables, and it must find none of them half imported.
import peft  # noqa: F401

from sparsevlm.adapters.lora_experts.config import LoraExpertsConfig

__all__ = ["LoraExpertsConfig"]
