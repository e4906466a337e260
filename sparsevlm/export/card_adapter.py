"""What a model card says of an adapter: what it is added to, and how both are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsevlm.adapters.saved import PARENT, QUANTISATION, read_parent
from sparsevlm.export.hub_files import Source

if TYPE_CHECKING:
    from sparsevlm.export.hub_adapter import Base

_NAMES = {
    "LORA": "LoRA",
    "MMA": "mixture-of-modality",
    "LORA_EXPERTS": "LoRA-experts",
    "PARTIAL_LORA": "partial LoRA",
    "SLICE_LORA": "slice LoRA",
}


def is_pefts_own(source: Source) -> bool:
    """Tell whether PEFT knows the method of an adapter without this package."""
    from peft import PeftType

    return method_of(source) in PeftType.__members__


def method_of(source: Source) -> str:
    """Return the adapter's method as PEFT writes it: LORA, MMA, …"""
    return str((source.adapter or {}).get("peft_type", ""))


def is_ours(source: Source) -> bool:
    """Tell whether an adapter was trained on a model of this package's class."""
    return source.config.get("model_type") == "sparsevlm"


def adapter_summary(source: Source, base: Base, about: str) -> str:
    """Say what the adapter is; ``about`` says what its base is, empty where that is not known."""
    method, rank = method_of(source), (source.adapter or {}).get("r")
    name = _NAMES.get(method, method.replace("_", "-").lower())
    size = f" of rank {rank}" if rank else ""
    where = (
        "the model in the folder `base` here" if base.beside else f"[{base.repo}](https://huggingface.co/{base.repo})"
    )
    if base.folder and not base.beside:
        where += f" (folder `{base.folder}`)"
    words = f"{'An' if name[:1] in 'aeio' else 'A'} {name} adapter{size} for {where}, without which it is of no use."
    quantised = read_parent(source.model).get(QUANTISATION) if (source.model / PARENT).is_file() else None
    if quantised:
        words += (
            f" It was trained on weights in {quantised['kind']}: `load_model` quantises them in the same way, which "
            "needs bitsandbytes; `load_model(..., quantised=False)` and PEFT take them as they are stored."
        )
    return f"{words} The base: {about[:1].lower()}{about[1:]}" if about else words


def adapter_usage(source: Source, repo: str, revision: str | None, base: Base, ask: str) -> tuple[str, str]:
    """Return code that loads the adapter and asks it something, and what is to be said below it."""
    at = f', revision="{revision}"' if revision else ""
    loaded = _with_peft(source, repo, revision, base)
    if not is_ours(source):
        return f"{loaded}\n{ask}", ""
    code = f'from sparsevlm.model.build import load_model\n\nmodel, processor = load_model("{repo}"{at})\n{ask}'
    text = "`load_model` fetches the base too, and checks by hash that it is the one that the adapter was trained on."
    if not base.folder:
        text += (
            f" Without that check, through PEFT:\n\n```python\nimport sparsevlm  # before PEFT is used\n\n{loaded}\n```"
        )
    return code, text


def _with_peft(source: Source, repo: str, revision: str | None, base: Base) -> str:
    """Return code that loads base and adapter through transformers and PEFT."""
    text_only = bool(source.config) and "vision_config" not in source.config
    auto, reader = ("CausalLM", "Tokenizer") if text_only else ("ImageTextToText", "Processor")
    at, pinned = (f', revision="{name}"' if name else "" for name in (revision, base.revision))
    own = any((source.model / name).is_file() for name in ("processor_config.json", "tokenizer_config.json"))
    reads = f'"{repo}"{at}' if own else f'"{base.repo}"{pinned}'
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import AutoModelFor{auto}, Auto{reader}",
            "",
            f'base = AutoModelFor{auto}.from_pretrained("{base.repo}"{pinned}, dtype="auto")',
            f'model = PeftModel.from_pretrained(base, "{repo}"{at})',
            f"{reader.lower()} = Auto{reader}.from_pretrained({reads})",
        ]
    )
