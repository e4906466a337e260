"""LoRA sets that a token passes or not by what it is, as a method of PEFT: `get_peft_model(model, TokenLoraConfig(…))`.

One surgery, two uses: visual tokens of the language model (InternLM-XComposer2), slices of a picture in the tower
(Monkey).
"""

# Before our own modules: PEFT's import is what enters them in its tables, and it must find none of them half imported.
import peft  # noqa: F401

from sparsevlm.adapters.token_lora.config import TokenLoraConfig
from sparsevlm.adapters.token_lora.context import use_sets

__all__ = ["TokenLoraConfig", "use_sets"]
