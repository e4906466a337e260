"""LoRA of a recipe as PEFT's configuration."""

from __future__ import annotations

from typing import Any

from sparsevlm.adapters.prepared import Prepared
from sparsevlm.adapters.targets import resolve_targets
from sparsevlm.recipe.adapter import Lora


def prepare(model: Any, spec: Lora) -> Prepared:
    """Resolve the targets of a LoRA section.

    Raises:
        ValueError: A target matches nothing (`TargetError`), or cannot be adapted as asked.
    """
    from peft import LoraConfig

    targets = resolve_targets(model, spec.targets)
    _check_tied(model, targets.modules)
    if targets.parameters and (spec.dropout or spec.dora or spec.init == "orthogonal"):
        raise ValueError(
            f"{targets.parameters[0]} is a stacked weight or a router's, where PEFT knows no dropout, dora or "
            "orthogonal start; take the target out, or these options"
        )
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        init_lora_weights=True if spec.init == "default" else spec.init,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
    )
    return Prepared(config, targets.counts, targets.modules, targets.parameters)


def _check_tied(model: Any, modules: tuple[str, ...]) -> None:
    """Refuse an embedding that is also the head: the head would not see the adapter, or see it twice when merged."""
    names = {id(module): name for name, module in model.named_modules()}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[0].weight is ends[1].weight:
        found = [names[id(end)] for end in ends if names[id(end)] in modules]
        if found:
            raise ValueError(
                f"{found[0]} shares its weight with the other end of the model and cannot be adapted alone"
            )
