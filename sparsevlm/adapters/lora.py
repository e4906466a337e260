"""LoRA of a recipe as PEFT's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsevlm.adapters.prepared import Prepared
from sparsevlm.adapters.targets import resolve_targets
from sparsevlm.recipe.adapter import Lora
from sparsevlm.recipe.adapter.lora import FROM_DATA, MADE

if TYPE_CHECKING:
    from torch import Tensor

_ADAPTER = "default"


def prepare(model: Any, spec: Lora) -> Prepared:
    """Resolve the targets of a LoRA section.

    Raises:
        ValueError: A target matches nothing (`TargetError`), or cannot be adapted as asked.
    """
    from peft import LoraConfig

    from sparsevlm.adapters.experts import choose_experts
    from sparsevlm.adapters.inits import apply_start, check_layers, draw_start

    targets = resolve_targets(model, spec.targets, shared=spec.experts == "all")
    _check_tied(model, targets.modules)
    if targets.parameters and (spec.dropout or spec.dora or spec.init == "orthogonal"):
        raise ValueError(
            f"{targets.parameters[0]} is a stacked weight or a router's, where PEFT knows no dropout, dora or "
            "orthogonal start; take the target out, or these options"
        )
    if spec.experts != "all":
        _check_experts(model, targets.parameters, spec.experts)
    if spec.init in MADE:
        check_layers(model, targets.modules, targets.parameters, spec)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        init_lora_weights=spec.init if spec.init in ("gaussian", "orthogonal") else True,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
    )

    def finish(model: Any, start: Mapping[str, Tensor] | None) -> None:
        if spec.experts != "all":
            choose_experts(model, spec.experts)
        if spec.init in MADE and not any(parameter.is_meta for parameter in model.parameters()):
            if start is None:
                if spec.init in FROM_DATA:
                    raise ValueError(f"'init: {spec.init}' is made from samples: pass inits.draw_start(...) as start")
                start = draw_start(model, targets.modules, spec)
            apply_start(model, start, spec, _ADAPTER)

    return Prepared(config, targets.counts, targets.modules, targets.parameters, finish=finish)


def _check_experts(model: Any, parameters: tuple[str, ...], chosen: Sequence[int]) -> None:
    """Refuse experts that a stack does not have, and a choice where no stack is adapted."""
    stacks = [model.get_parameter(name) for name in parameters if not name.endswith(".gate.weight")]
    if not stacks:
        raise ValueError("'experts' chooses among stacked experts, but no target matches any: add 'moe.experts'")
    number = min(getattr(stack, "ds_shape", stack.shape)[0] for stack in stacks)
    for expert in chosen:
        if expert >= number:
            raise ValueError(f"'experts' names expert {expert}, but the stacks have {number}: 0 to {number - 1}")


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
