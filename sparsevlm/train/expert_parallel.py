"""Expert parallelism: the experts of an MoE layer spread over ranks by DeepSpeed's AutoEP, routed by our own router.

AutoEP finds the MoE blocks by name and replaces each by a layer that holds E / R of its E experts and exchanges tokens
with the R - 1 ranks that hold the others. What it would do differently from our block, without saying so, is put
right after the replacement (`adopt`): its router is made to call ours, so that scores, precision, ties, padding and
what is recorded for the balancing loss stay the same, and its experts follow autocast.

Legend: S tokens, H width, I intermediate width, E experts, R ranks that share them, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparsevlm.recipe.load import Fault, option_fault
from sparsevlm.recipe.moe import Upcycle
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train.parts import is_trained

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsevlm.moe.ffn import FfnLayout
    from sparsevlm.moe.router import TopKRouter

BLOCKS = r"model\.language_model\.(\w+\.)*\d+\.mlp"
"""Full names of what may be an MoE block. AutoEP passes over those that hold no experts."""

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"}
"""Activations of a gated FFN that AutoEP's experts know, and its names for the pair of gate and up."""

_EXPERTS = "model.language_model.layers.0.mlp.experts.down_proj"  # stands for all experts
_ALIGNMENT = 8  # of H and I for torch's grouped matrix product


def ranks_of_experts(recipe: Recipe, name: str, num_processes: int) -> int:
    """Return over how many ranks a stage's experts are spread; 1 where they are not.

    Like all sharding it is left out on one process, so that the same recipe runs on a laptop. It is also left out
    where the stage's model is dense or its experts are frozen: there is nothing that would need it.
    """
    if num_processes == 1 or _upcycling(recipe, name) is None:
        return 1
    stage = recipe.stages[name]
    return recipe.sharding_of(stage).expert_parallel if is_trained(_EXPERTS, stage.trains) else 1


def _upcycling(recipe: Recipe, name: str) -> tuple[str, Upcycle] | None:
    """Return the upcycling that a stage's model has gone through, and the stage that has it."""
    found = None
    for key, stage in recipe.stages.items():
        if stage.upcycle is not None:
            found = key, stage.upcycle
        if key == name:
            break
    return found


def find_faults(recipe: Recipe, num_processes: int) -> list[Fault]:
    """Return what keeps a recipe's experts from being spread, each at its line."""
    faults: list[Fault] = []
    seen: set[str] = set()
    for name, stage in recipe.stages.items():
        ranks = ranks_of_experts(recipe, name, num_processes)
        upcycling = _upcycling(recipe, name)
        if ranks == 1 or upcycling is None:
            continue
        at = ("stages", name) if stage.sharding is not None else ()
        key, spec = upcycling
        number = spec.experts * spec.granularity
        if num_processes % ranks:
            message = (
                f"{num_processes} processes do not divide into groups of {ranks}; set a divisor of {num_processes}"
            )
            faults.append(option_fault(recipe, (*at, "sharding", "expert_parallel"), message))
        if number % ranks:
            message = f"{ranks} ranks cannot share {number} experts (stage {key!r}) equally; set a divisor of {number}"
            faults.append(option_fault(recipe, (*at, "sharding", "expert_parallel"), message))
        if key not in seen:
            faults += [
                option_fault(recipe, ("stages", key, "upcycle", *option), f"{message}, or set expert_parallel: 1")
                for option, message in _unsupported(spec)
            ]
        seen.add(key)
    return faults


def _unsupported(spec: Upcycle) -> list[tuple[tuple[str, ...], str]]:
    """Return the options that expert parallelism cannot do."""
    found: list[tuple[tuple[str, ...], str]] = []
    if spec.shared_expert != "none":
        found.append((("shared_expert",), "expert parallelism knows no shared expert: set shared_expert: none"))
    if spec.router.scoring == "modality":
        found.append((("router", "scoring"), "expert parallelism needs a learned router: take another scoring"))
    if spec.router.bias_update_rate:
        found.append((("router", "bias_update_rate"), "expert parallelism knows no balance bias: set it to 0"))
    for option in ("capacity_factor", "eval_capacity_factor"):
        if getattr(spec.router, option) is not None:
            message = "expert parallelism is dropless: an expert's tokens come from several ranks; leave it out"
            found.append((("router", option), message))
    return found


def layout_reason(layout: FfnLayout) -> str | None:
    """Return why experts copied from an FFN cannot be spread; None if they can."""
    if not layout.gated:
        return "expert parallelism needs gated FFNs (gate, up, down), and this language model's are plain"
    if layout.bias:
        return "expert parallelism knows no biases, and this language model's FFNs have some"
    if layout.dropout:
        return f"expert parallelism knows no dropout, and this language model's FFNs have one of {layout.dropout}"
    if layout.hidden_act not in ACTIVATIONS:
        return (
            f"expert parallelism knows the activations {', '.join(ACTIVATIONS)}, and this language model's FFNs use "
            f"{layout.hidden_act}"
        )
    return None


def find_model_faults(recipe: Recipe, num_processes: int) -> list[Fault]:
    """Return what the language model's FFNs have that keeps experts from being spread; needs the parts' configs."""
    spread = [name for name in recipe.stages if ranks_of_experts(recipe, name, num_processes) > 1]
    if not spread:
        return []
    import torch
    from transformers import AutoModel

    from sparsevlm.model.build import build_config
    from sparsevlm.moe.ffn import read_layout
    from sparsevlm.surgery import decoder_layers, resolve_layers

    upcycling = _upcycling(recipe, spread[0])
    assert upcycling is not None
    text_config: Any = build_config(recipe.model, offline_shapes=True).text_config
    with torch.device("meta"):
        layers = decoder_layers(AutoModel.from_config(text_config))
    for index in resolve_layers(upcycling[1].layers, len(layers)):
        reason = layout_reason(read_layout(layers[index].mlp, text_config))  # pyright: ignore
        if reason is not None:
            return [option_fault(recipe, ("model", "language", "path"), f"{reason}; set expert_parallel: 1")]
    return []


def autoep_config(config: Any, ranks: int) -> dict[str, Any]:
    """Return the `expert_parallel` section of a DeepSpeed configuration.

    Args:
        config: A `SparseVLMConfig` with `moe`.
        ranks: Ranks that share a layer's experts.
    """
    from sparsevlm.moe.ffn import ACTIVATION_FIELDS

    text: Any = config.text_config
    names = (getattr(text, field, None) for field in ACTIVATION_FIELDS)
    activation = next(name for name in names if isinstance(name, str))
    moe = config.moe
    return {
        "enabled": True,
        "autoep_size": ranks,
        # Without a pattern AutoEP warns, and trains without expert parallelism. Its presets need an older transformers.
        "moe_layer_pattern": BLOCKS,
        "top_k": moe["num_experts_per_tok"],
        # `adopt` has our router compute the weights; said here too, since a wrong value would pass in silence.
        "score_func": "sigmoid" if moe.get("scoring_func") == "sigmoid" else "softmax",
        "route_norm": bool(moe.get("norm_topk_prob", True)),
        "score_apply": "post",
        "expert_activation": ACTIVATIONS[activation],
    }


def configured_ranks(deepspeed: Any) -> int:
    """Return over how many ranks a DeepSpeed configuration spreads experts; 1 where there is none."""
    return deepspeed.get("expert_parallel", {}).get("autoep_size", 1) if isinstance(deepspeed, dict) else 1


def mark_groups(groups: list[dict[str, Any]], model: nn.Module, ranks: int) -> list[dict[str, Any]]:
    """Split optimizer groups so that experts have their own, marked as ZeRO-1 and 2 ask for it.

    Args:
        groups: From `parts.parameter_groups`.
        model: Before its blocks are replaced; DeepSpeed then puts each new parameter where its source was.
        ranks: Ranks that share the experts.

    Returns:
        The groups; those of experts are ``moe``, bear DeepSpeed's name for the ranks that share them, and have their
        own name under ``part``. Unchanged where ``ranks`` is 1.
    """
    if ranks == 1:
        return groups
    experts = {id(p) for name, p in model.named_parameters() if ".mlp.experts." in f".{name}"}
    marked = []
    for group in groups:
        spread = [p for p in group["params"] if id(p) in experts]
        kept = [p for p in group["params"] if id(p) not in experts]
        if kept:
            marked.append({**group, "params": kept})
        if spread:
            marked.append({**group, "params": spread, "moe": True, "part": group["name"], "name": f"ep_size_{ranks}"})
    return marked


def find_routers(model: nn.Module) -> dict[str, TopKRouter]:
    """Return the router of each MoE block by the block's name, before DeepSpeed replaces the blocks.

    Raises:
        ValueError: A block has what AutoEP would leave out in silence.
    """
    from sparsevlm.moe.block import SparseMoeBlock

    found = {}
    for name, block in model.named_modules():
        if not isinstance(block, SparseMoeBlock):
            continue
        held = {key.partition(".")[0] for key, _ in block.named_parameters()}
        stacks = {key for key, _ in block.experts.named_parameters()}
        if held != {"gate", "experts"} or stacks != {"gate_up_proj", "down_proj"} or block.dropout:
            raise ValueError(
                f"{name} cannot be spread over ranks: expert parallelism takes a router and gated experts without "
                f"biases, shared expert or dropout, and this block holds {sorted(held)} with experts {sorted(stacks)} "
                f"and dropout {block.dropout}; set expert_parallel: 1"
            )
        found[name] = block.gate
    return found


def is_spread(module: Any) -> bool:
    """Tell whether a module is a layer of AutoEP."""
    return bool(getattr(module, "_is_autoep_layer", False))


@contextmanager
def adopted_experts(model: nn.Module, ranks: int) -> Iterator[None]:
    """Enclose DeepSpeed's initialisation; does nothing where ``ranks``, those that share the experts, is 1.

    Raises:
        ValueError: See `find_routers`.
    """
    routers = find_routers(model) if ranks > 1 else {}
    assert routers or ranks == 1, "experts are to be spread over ranks, but the model has none"
    yield
    adopt(model, routers)


def adopt(model: nn.Module, routers: Mapping[str, TopKRouter]) -> None:
    """Make the layers that AutoEP has put in route and compute as our blocks did.

    Args:
        model: After DeepSpeed's initialisation.
        routers: From `find_routers`, before it.
    """
    for name, router in routers.items():
        layer: Any = model.get_submodule(name)
        # AutoEP that finds nothing says so in a warning and goes on without expert parallelism.
        assert is_spread(layer), f"AutoEP did not replace {name}, which is a {type(layer).__name__}"
        _route_by(layer.router, router)
        experts = layer.experts
        experts.register_forward_pre_hook(_to_autocast)
        if experts.w1.shape[-1] % _ALIGNMENT or experts.w2.shape[-1] % _ALIGNMENT:
            experts.use_grouped_mm = False


def _route_by(theirs: Any, ours: TopKRouter) -> None:
    """Let AutoEP's router ask ours, which computes in float32, breaks ties by index and records its logits.

    Ours runs as the forward of their `gate`, since ZeRO-3 gathers the weight around that module's call.
    """
    from deepspeed.moe.ep_count import count_tokens_per_expert

    from sparsevlm.moe.padding import real_tokens

    gate = theirs.gate
    ours.weight = gate.weight  # the parameter that trains from now on

    def forward_gate(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ours.train(gate.training)
        real = real_tokens(hidden_states.shape[0])
        return ours(hidden_states, None if real is None else real.mask)

    def forward(x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        assert expert_bias is None
        _, weights, index = gate(x)  # (S, E), (S, k), (S, k)
        index = index.contiguous()  # AutoEP takes views
        return weights.contiguous(), index, count_tokens_per_expert(index, theirs.num_experts)

    gate.forward = forward_gate
    theirs.forward = forward


def _to_autocast(experts: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Bring the experts' input to the autocast type: a grouped product in float32 would stay in float32."""
    import torch

    tokens, *others = inputs
    device = tokens.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        tokens = tokens.to(torch.get_autocast_dtype(device))
    return tokens, *others


def gather_experts(layer: Any) -> dict[str, Tensor]:
    """Return all experts of a spread layer as our block holds them; the ranks that share them call it together.

    Returns:
        ``gate_up_proj`` (E, 2I, H) and ``down_proj`` (E, H, I).
    """
    import deepspeed
    import torch
    from torch import distributed

    stacks = [layer.experts.w1, layer.experts.w3, layer.experts.w2]  # (E / R, I, H) twice, (E / R, H, I)
    whole = []
    with torch.no_grad(), deepspeed.zero.GatheredParameters(stacks, enabled=hasattr(stacks[0], "ds_id")):
        for stack in stacks:
            parts = [torch.empty_like(stack) for _ in range(layer.ep_size)]
            distributed.all_gather(parts, stack.detach().contiguous(), group=layer.ep_group)
            whole.append(torch.cat(parts))
    gate, up, down = whole
    return {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}


def complete_state(model: nn.Module, main: bool) -> dict[str, Tensor]:
    """Return the whole model's weights under our own names; all ranks call it.

    Module by module, so that beside the result on the main process no more than one layer's experts are held.

    Args:
        model: The trained model with AutoEP's layers in it.
        main: This process keeps the result, on the CPU; the others get an empty one.
    """
    import deepspeed
    import torch

    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    persistent = model.state_dict(keep_vars=True).keys()
    spread = {name: module for name, module in model.named_modules() if is_spread(module)}

    def keep(named: Mapping[str, Tensor]) -> None:
        sharded = [tensor for tensor in named.values() if hasattr(tensor, "ds_id")]
        with torch.no_grad(), deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            for name, tensor in named.items() if main else ():
                if id(tensor) not in copies:  # tied weights stay one tensor
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
                state[name] = copies[id(tensor)]

    for name, module in model.named_modules():
        if any(name == layer or name.startswith(f"{layer}.") for layer in spread):
            continue
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        prefix = f"{name}." if name else ""
        keep({prefix + key: tensor for key, tensor in own.items() if prefix + key in persistent})
    for name, layer in spread.items():
        keep({f"{name}.gate.weight": layer.router.gate.weight})  # pyright: ignore
        experts = gather_experts(layer)
        if main:
            state |= {f"{name}.experts.{key}": tensor.to("cpu", copy=True) for key, tensor in experts.items()}
    return state
