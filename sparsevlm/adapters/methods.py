"""Enters our adapter methods in PEFT's tables; imported when PEFT is.

PEFT's own `register_peft_method` takes only names of its closed enumeration, so the tables are written directly: a
string serves as a key as well.
"""

from __future__ import annotations

from typing import Any

from peft import mapping

from sparsevlm.adapters.lora_experts.config import METHOD as LORA_EXPERTS
from sparsevlm.adapters.lora_experts.config import LoraExpertsConfig
from sparsevlm.adapters.lora_experts.model import LoraExpertsModel
from sparsevlm.adapters.mma.config import METHOD as MMA
from sparsevlm.adapters.mma.config import MmaConfig
from sparsevlm.adapters.mma.model import MmaModel
from sparsevlm.adapters.token_lora.config import PARTIAL, SLICE, TokenLoraConfig
from sparsevlm.adapters.token_lora.model import TokenLoraModel


def register() -> None:
    """Make PEFT know the methods: to get, save and load them needs nothing else."""
    # keyed by PEFT's enumeration, as their types say
    configs: Any = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: Any = mapping.PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: Any = mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    for method, config, tuner in (
        (MMA, MmaConfig, MmaModel),
        (LORA_EXPERTS, LoraExpertsConfig, LoraExpertsModel),
        (PARTIAL, TokenLoraConfig, TokenLoraModel),
        (SLICE, TokenLoraConfig, TokenLoraModel),
    ):
        for table, entry in ((configs, config), (tuners, tuner), (prefixes, tuner.prefix)):
            taken = table.setdefault(method, entry)
            assert taken is entry, f"PEFT's tables already have {method}: {taken}"


register()
