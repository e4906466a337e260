"""Branch-train-mix: several fine-tuned models become the experts of one.

Legend: E experts.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsevlm.model.build import load_model
from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig
from sparsevlm.model.parts import part_config, resolve_part
from sparsevlm.moe.alike import differences
from sparsevlm.moe.ffn import expert_weights, read_layout
from sparsevlm.surgery import decoder_layers

DECODER = "model.language_model."
"""Where a model of ours keeps its decoder."""


def mix_branches(
    model: Any, paths: Sequence[str], layers: Sequence[int], trust_remote_code: bool = False
) -> tuple[dict[int, list[dict[str, Tensor]]], list[str]]:
    """Set a model's weights to the mean of several models', in place, and return the FFNs that become experts.

    Configurations are compared before weights are loaded; then the models are read one at a time, so that two models, a
    sum and the experts are held at once. A language model's file says nothing about tower and connector: those are the
    mean over the models that have them, and stay where none has. Where a language model has no rows for the
    placeholders that we added to the vocabulary, these rows are the model's own.

    Args:
        model: Dense model of ours, with weights.
        paths: Directories or Hub ids, of language models or of dense models of ours.
        layers: Decoder layers that become MoE.
        trust_remote_code: Allow code from the Hub.

    Returns:
        Of each layer the FFN of each path, in the experts' layout; and the model's weights that no path has, by their
        first names (``model.connector``, …).

    Raises:
        ValueError: A path holds no model that can be loaded, a sparse one, or one of another shape or kind.

    Source: Branch-Train-MiX (arXiv:2403.07816) section 3.2. *Deviations*: layers that stay dense also take the mean.
    """
    for path in paths:
        _check_config(path, model.config, trust_remote_code)
    own: dict[str, Tensor] = model.state_dict()
    names = {id(module): name for name, module in model.named_modules()}
    decoder = decoder_layers(model.model.language_model)
    ffns: dict[int, list[dict[str, Tensor]]] = {layer: [] for layer in layers}
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for path in paths:
        state = _load(path, model, trust_remote_code)
        state = _fit(path, state, model, own)
        for layer in layers:
            ffn: Any = decoder[layer].mlp
            branch = copy.deepcopy(ffn)
            prefix = names[id(ffn)] + "."
            branch.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            ffns[layer].append(expert_weights(branch, read_layout(branch, model.config.text_config)))
        for name, value in state.items():
            if value.is_floating_point():
                sums[name] = sums[name].add_(value) if name in sums else value.float().clone()
                counts[name] += 1
    with torch.no_grad():
        for name, total in sums.items():
            own[name].copy_(total / counts[name])
    kept = [name for name, value in own.items() if name not in sums and value.is_floating_point()]
    return ffns, list(dict.fromkeys(".".join(name.split(".")[:2]) for name in kept))


def _check_config(path: str, ours: SparseVLMConfig, trust_remote_code: bool) -> None:
    """Refuse a branch whose configuration is not that of a dense branch of our language model.

    Raises:
        ValueError: So it is.
    """
    config = part_config(path, trust_remote_code)
    if isinstance(config, SparseVLMConfig) and config.moe is not None:
        raise ValueError(f"upcycle.experts_from: {path} is sparse already; name dense models")
    found = differences(ours.text_config, config.get_text_config(decoder=True))
    if found:
        raise ValueError(
            f"upcycle.experts_from: {path} is no branch of the stage's language model: {found}; the experts must "
            "come from fine-tuned copies of one model"
        )


def _load(path: str, model: Any, trust_remote_code: bool) -> Mapping[str, Tensor]:
    """Return a branch's weights under the names that our model has for them.

    Raises:
        ValueError: It can be loaded neither as a model of ours nor as a language model.
    """
    from transformers import AutoModelForCausalLM

    resolved = resolve_part(path)
    if isinstance(part_config(path, trust_remote_code), SparseVLMConfig):
        return load_model(resolved, torch.float32)[0].state_dict()
    try:
        branch: Any = AutoModelForCausalLM.from_pretrained(
            resolved, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"upcycle.experts_from: {path} cannot be loaded as a language model: {str(error).splitlines()[0]}"
        ) from error
    state = {f"{DECODER}{name}": value for name, value in branch.base_model.state_dict().items()}
    state |= {f"lm_head.{name}": value for name, value in branch.get_output_embeddings().state_dict().items()}
    return state


def _fit(path: str, state: Mapping[str, Tensor], model: Any, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a branch's weights, brought to the rows of our vocabulary.

    Raises:
        ValueError: Weights are missing, left over or of another shape.
    """
    whole = any(not name.startswith((DECODER, "lm_head.")) for name in state)
    wanted = {name for name in own if whole or name.startswith((DECODER, "lm_head."))}
    vocabulary = {id(model.get_input_embeddings().weight), *(id(p) for p in model.get_output_embeddings().parameters())}
    rows = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in vocabulary}
    placeholders = {model.config.image_token_id, model.config.video_token_id}
    fitted, faults = {}, [f"{name} is missing" for name in sorted(wanted - state.keys())]
    faults += [f"{name} has no place" for name in sorted(state.keys() - wanted)]
    for name in wanted & state.keys():
        value, ours = state[name], own[name].detach()
        if name in rows and value.shape[1:] == ours.shape[1:] and placeholders >= set(range(len(value), len(ours))):
            value = torch.cat([value, ours[len(value) :].to(value.dtype)])
        if value.shape != ours.shape:
            faults.append(f"{name} is {tuple(value.shape)} (here {tuple(ours.shape)})")
        fitted[name] = value
    first: dict[int, str] = {}  # of the names that a tied weight has
    for name in sorted(fitted):
        other = first.setdefault(own[name].data_ptr(), name)
        if own[name].numel() and not torch.equal(fitted[name], fitted[other]):
            faults.append(f"{other} and {name} are one tied weight here and two there")
    if faults:
        raise ValueError(
            f"upcycle.experts_from: {path} does not fit the stage's model, in {len(faults)} weights: "
            f"{', '.join(sorted(faults)[:4])}{', …' if len(faults) > 4 else ''}"
        )
    return fitted
