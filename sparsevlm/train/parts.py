"""Parts of the model: which parameters a stage trains, at which rate, and how many there are.

A parameter of an adapter belongs to the part `adapter`, wherever it stands, and one that a fusion added to the
language model's layers to the part `fusion` alone. Any other belongs to one part or to several: `embeddings` (token
embedding and output head), `ffn` (dense FFNs) and `moe` (MoE layers) are parts of `language` that can be named alone,
and so are `moe.router` and `moe.experts` within `moe`, `connector.qformer` and `connector.projector` within
`connector`. Where several are named, the most specific one decides (its learning rate, its row in reports).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsevlm.adapters.logical import logical_shape
from sparsevlm.adapters.names import is_adapter_parameter, routed_adapter, without_wrappers
from sparsevlm.surgery import FUSION_MODULES, in_fusion

if TYPE_CHECKING:
    from torch import nn

    from sparsevlm.recipe.schema import Optim

PARTS: tuple[str, ...] = (
    "vision",
    "connector",
    "connector.qformer",
    "connector.projector",
    "fusion",
    "language",
    "embeddings",
    "ffn",
    "moe",
    "moe.router",
    "moe.experts",
    "adapter",
)
"""All parts, in the order of reports."""

ROWS = frozenset({"vision", "connector", "fusion", "language", "embeddings", "moe", "adapter"})
"""Parts that always have a row of their own in reports; the others have one where a stage names them."""

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|lm_head)\.(weight|bias)$")
_QFORMER = re.compile(r"\.qformer(_\w+)?(\.|$)")
_EXPERTS = re.compile(r"\.(experts|shared_experts?)\.")
_ROUTER = re.compile(r"\.(gate|router|shared_expert_gate|coefficient)\.")
_FFN = re.compile(r"\.(mlp|feed_forward|ffn)\.")
_LORA_B = re.compile(r"\.lora_(embedding_)?B\.")
TWIN = FUSION_MODULES[1]
_LAYER = re.compile(r"\.\d+\.")
_INPUT_EMBEDDING = re.compile(r"(pos|position|class|cls|mask|register|type)\w*(embed|token)")


@dataclass(frozen=True)
class PartCount:
    """One row of a trainable report.

    Attributes:
        part: Name of the part, without the parameters that more specific rows hold.
        total: Parameters.
        trainable: Parameters that train.
        lr: Peak learning rate; None where nothing trains or no optimizer was given.
    """

    part: str
    total: int
    trainable: int
    lr: float | None


@dataclass(frozen=True)
class TrainableReport:
    """What a stage trains, part by part."""

    parts: tuple[PartCount, ...]

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return sum(row.total for row in self.parts)

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(row.trainable for row in self.parts)


def parts_of(name: str) -> tuple[str, ...]:
    """Return the parts that a parameter belongs to, the most specific first.

    Args:
        name: Name of a parameter of `SparseVLMForConditionalGeneration`. A head that is tied to the token embedding
            needs no special case: both names are `embeddings`.

    Raises:
        ValueError: The name is in no part, so the model is not one of ours.
    """
    name = without_wrappers(name.removeprefix("module."))  # DistributedDataParallel's
    if is_adapter_parameter(name):
        return ("adapter",)
    if name.startswith("model.vision_tower."):
        return ("vision",)
    if name.startswith("model.connector."):
        return ("connector.qformer" if _QFORMER.search(name) else "connector.projector", "connector")
    if in_fusion(name):
        return ("fusion",)
    if name.startswith(("model.language_model.", "lm_head.")):
        if _EMBEDDING.search(name):
            return ("embeddings", "language")
        if _LAYER.search(name):
            if _EXPERTS.search(name):
                return ("moe.experts", "moe", "language")
            if _ROUTER.search(name):
                return ("moe.router", "moe", "language")
            if _FFN.search(name):
                return ("ffn", "language")
        return ("language",)
    raise ValueError(
        f"parameter {name!r} is in no part: expected a name under model.vision_tower, model.connector, "
        "model.language_model or lm_head"
    )


def is_trained(name: str, trains: Iterable[str]) -> bool:
    """Return whether a stage that trains the parts ``trains`` trains the parameter ``name``."""
    return not set(parts_of(name)).isdisjoint(trains)


def row_of(name: str, named: Iterable[str] = ()) -> str:
    """Return the row of reports that a parameter is counted in: its most specific part that has one.

    Args:
        name: The parameter.
        named: Parts that a stage names, in `trains` or `part_lr`.
    """
    return next(part for part in parts_of(name) if part in ROWS or part in named)


def learning_rate(name: str, optim: Optim) -> float:
    """Return the peak learning rate of a parameter: that of its most specific part in `part_lr`, else `lr`."""
    rates: dict[str, float] = {str(part): rate for part, rate in optim.part_lr.items()}
    return next((rates[part] for part in parts_of(name) if part in rates), optim.lr)


def numel(parameter: Any) -> int:
    """Return the number of elements, the true one where ZeRO-3 keeps only a shard here or two share a byte."""
    return int(getattr(parameter, "ds_numel", None) or logical_shape(parameter).numel())


def select_trainable(model: nn.Module, trains: Iterable[str], optim: Optim | None = None) -> TrainableReport:
    """Freeze everything but the parts ``trains`` and report what is left.

    A frozen vision tower also leaves training mode (the trainer keeps it there); the model runs it under no_grad.

    Args:
        model: A `SparseVLMForConditionalGeneration`, changed in place.
        trains: Names of parts.
        optim: Its learning rates are entered in the report.

    Raises:
        ValueError: A part that has no parameter in this model, or a connector that is adapted and trains in full.
    """
    trains = tuple(trains)
    named = list(model.named_parameters())
    present = {part for name, _ in named for part in parts_of(name)}
    missing = [part for part in trains if part not in present]
    if missing:
        raise ValueError(
            f"the stage trains {', '.join(missing)}, but the model has no such parameters (it has "
            f"{', '.join(part for part in PARTS if part in present)}); take it out of 'trains', or give the stage an "
            "'upcycle' for the parts of moe, an 'adapter' for that part"
        )
    # By a pattern: a recipe that names the part is refused when it is read.
    adapted = {
        "fusion" if in_fusion(name) else "connector": name
        for name, _ in named
        if is_adapter_parameter(name) and (in_fusion(name) or name.startswith("model.connector."))
    }
    for part, name in adapted.items():
        if part in trains:
            raise ValueError(
                f"the stage trains the {part} in full, and its adapter has a target there ({name}); take {part!r} out "
                "of 'trains' to adapt it, or set a target that leaves it out to train it"
            )
    for name, parameter in named:
        parameter.requires_grad_(is_trained(name, trains))
    freeze_tower_state(model)
    return trainable_report(model, optim, trains)


def freeze_tower_state(model: nn.Module) -> None:
    """Put what `still_modules` returns in eval mode."""
    for module in still_modules(model):
        module.eval()


def still_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the vision tower that stay in eval mode while the rest trains.

    All of it when nothing of it trains (its dropout stays off). When an adapter does, its batch norms: their statistics
    would move with the data, and an adapter's file does not hold them.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    tower = model.get_submodule("model.vision_tower")
    trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    if not trained:
        return [tower]
    if not any(map(is_adapter_parameter, trained)):
        return []
    return [module for module in tower.modules() if isinstance(module, _BatchNorm)]


def trainable_report(model: nn.Module, optim: Optim | None = None, trains: Iterable[str] = ()) -> TrainableReport:
    """Count parameters part by part as they are set to train now; rows as `row_of` says."""
    named = {*trains, *(optim.part_lr if optim is not None else ())}
    total = dict.fromkeys(PARTS, 0)
    trainable = dict.fromkeys(PARTS, 0)
    rates: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        part = row_of(name, named)
        total[part] += numel(parameter)
        if parameter.requires_grad:
            trainable[part] += numel(parameter)
            if optim is not None:
                rates[part] = learning_rate(name, optim)
    return TrainableReport(
        tuple(PartCount(part, total[part], trainable[part], rates.get(part)) for part in PARTS if total[part])
    )


def parameter_groups(model: nn.Module, optim: Optim, lora_plus_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: by part, and with or without weight decay.

    Biases, norms and embeddings (of tokens, positions, classes) are never decayed.

    Args:
        model: The model, with what trains chosen.
        optim: Rates and decay.
        lora_plus_ratio: Learning rate of the second matrices of LoRA over that of the first (LoRA+).

    Returns:
        Groups ``{"params", "lr", "weight_decay", "name"}``; the name is ``part`` or ``part/no_decay``, and
        ``adapter.B`` for the second matrices of LoRA where they have a rate of their own.

    Raises:
        ValueError: Nothing trains.
    """
    undecayed = _undecayed(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, rate = row_of(name, optim.part_lr), learning_rate(name, optim)
        if lora_plus_ratio != 1 and _LORA_B.search(name):
            part, rate = f"{part}.B", rate * lora_plus_ratio
        decayed = part != "embeddings" and id(parameter) not in undecayed
        key = part if decayed else f"{part}/no_decay"
        group = groups.setdefault(
            key,
            {
                "params": [],
                "lr": rate,
                "weight_decay": optim.weight_decay if decayed else 0.0,
                "name": key,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter of the model is set to train")
    return list(groups.values())


def _undecayed(model: nn.Module) -> set[int]:
    """Ids of parameters that weight decay must not touch."""
    from torch import nn

    found = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            # Stacked expert biases have two dimensions, learned positions and class tokens three: names tell.
            if (
                dimensions < 2
                or isinstance(module, nn.Embedding)
                or "bias" in name
                or "norm" in type(module).__name__.lower()
                or _INPUT_EMBEDDING.search(name)
            ):
                found.add(id(parameter))
    return found


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """Count parameters, also on the meta device.

    `activated` are those that one token uses: of a layer's E stacked experts, or LoRA experts, only top_k count, the
    router counts whole; of a visual expert and its twin one. `language_model` counts the language model with its
    embedding and head, as the papers do (MoE-LLaVA, table 2).

    Returns:
        ``{"total", "trainable", "activated", "language_model": {"total", "activated"}}``. Tied weights count once.
    """
    config: Any = getattr(model, "config", None)
    top_k = getattr(getattr(config, "text_config", None), "num_experts_per_tok", None)
    counts: dict[str, int] = {"total": 0, "trainable": 0, "activated": 0}
    language = {"total": 0, "activated": 0}
    for name, parameter in model.named_parameters():
        number = numel(parameter)
        active = number
        parts = parts_of(name)
        if routed := routed_adapter(name):  # LoRA experts; the adapter has its own numbers of them
            spec: Any = model.peft_config[routed]  # pyright: ignore
            active = number // spec.num_experts * spec.num_experts_per_tok
        elif parts[0] == "adapter" and ".experts." in name:  # an A and a B for each expert of a stack
            active = number // config.moe["num_experts"] * top_k
        elif parts[0] == "moe.experts" and ".experts." in name:
            experts = getattr(parameter, "ds_shape", parameter.shape)[0]
            if not isinstance(top_k, int):
                raise ValueError(f"{name} holds {experts} experts, but text_config has no num_experts_per_tok")
            active = number // experts * top_k
        elif TWIN in name.split("."):  # a token uses either it or the language model's own, which is counted
            active = 0
        counts["total"] += number
        counts["activated"] += active
        counts["trainable"] += number if parameter.requires_grad else 0
        if "language" in parts:
            language["total"] += number
            language["activated"] += active
    return {**counts, "language_model": language}
