"""The mixture of LoRA experts as a tuner of PEFT, and which FFNs it goes to."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsevlm.adapters.lora_experts.config import LoraExpertsConfig
from sparsevlm.adapters.lora_experts.layer import MERGE_REFUSED, LoraExpertsFfn, LoraExpertsLinear
from sparsevlm.adapters.passes import find_parts
from sparsevlm.adapters.tuner import UnmergeableTuner
from sparsevlm.moe.block import SparseMoeBlock
from sparsevlm.surgery import decoder_layers, resolve_layers

FFN = "mlp"
"""Name that transformers gives a layer's FFN."""


def find_ffns(model: nn.Module, config: LoraExpertsConfig) -> dict[str, tuple[int, int]]:
    """Return the FFNs that a config adapts: path -> (decoder layer, width).

    Raises:
        ValueError: There is not one language model, a layer does not exist, or has no FFN of linear layers.
    """
    language, _ = find_parts(model)
    if len(language) != 1:
        raise ValueError(
            f"lora_experts: expected one language model of transformers in {type(model).__name__}, found "
            f"{len(language)} ({', '.join(language) or 'none'}); pass that part itself"
        )
    path, decoder = next(iter(language.items()))
    layers = decoder_layers(decoder)
    start = ".".join(filter(None, [path, next(name for name, module in decoder.named_modules() if module is layers)]))
    found, sparse = {}, []
    for index in resolve_layers(config.layers, len(layers)):
        ffn = getattr(layers[index], FFN, None)
        if isinstance(ffn, SparseMoeBlock):
            sparse.append(index)
            continue
        _check(index, layers[index], ffn)
        found[f"{start}.{index}.{FFN}"] = (index, decoder.config.hidden_size)
    if sparse and not isinstance(config.layers, str):
        raise ValueError(
            f"lora_experts: layer {sparse[0]} holds routed experts already (MoE); leave it out of layers, or choose by "
            "a word, which leaves such layers out"
        )
    if not found:
        raise ValueError(
            f"lora_experts: no dense FFN is left among layers={config.layers!r}: layers "
            f"{', '.join(map(str, sparse))} hold routed experts (MoE) already"
        )
    return found


def _check(index: int, layer: nn.Module, ffn: nn.Module | None) -> None:
    """Refuse what is no FFN of linear layers."""
    inner = ffn.base_layer if isinstance(ffn, LoraExpertsFfn) else ffn
    children = dict(inner.named_children()) if inner is not None else {}
    kinds = (nn.Linear, Conv1D, LoraExpertsLinear)
    others = [
        name
        for name, child in children.items()
        if not isinstance(child, kinds) and any(True for _ in child.parameters())
    ]
    own = [] if inner is None else [name for name, _ in inner.named_parameters(recurse=False)]
    if sum(isinstance(child, kinds) for child in children.values()) >= 2 and not others and not own:
        return
    what = f"holds {[*children, *own]}" if inner is not None else f"has {[name for name, _ in layer.named_children()]}"
    raise ValueError(
        f"lora_experts: layer {index} ({type(layer).__name__}) has no FFN {FFN!r} of linear layers: it {what}; leave "
        "it out of layers"
    )


class LoraExpertsModel(UnmergeableTuner):
    """Puts `LoraExpertsFfn` around FFNs; made by `peft.get_peft_model(model, LoraExpertsConfig(...))`."""

    prefix = "mole_"
    tuner_layer_cls = LoraExpertsFfn  # pyright: ignore[reportAssignmentType]
    merge_refused = MERGE_REFUSED

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._ffns = find_ffns(model, peft_config)
        peft_config.target_modules = list(self._ffns)
        peft_config.routed_layers = [index for index, _ in self._ffns.values()]

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        # PEFT matches by the end of a name; these are whole names, of which another may be the end.
        return key in self._ffns

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key not in self._ffns:
            raise ValueError(
                f"lora_experts: the adapter's weights have {current_key}, which layers={peft_config.layers!r} does not "
                "name in this model; load it onto its own base"
            )
        device = next(target.parameters()).device
        if isinstance(target, LoraExpertsFfn):
            target.update_layer(adapter_name, peft_config)
            layer = target
        else:
            _, width = self._ffns[current_key]
            layer = LoraExpertsFfn(target, adapter_name, peft_config, hidden_size=width, path=current_key)
            setattr(parent, target_name, layer)
        if not any(parameter.is_meta for parameter in layer.parameters()):
            layer.to(device)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
