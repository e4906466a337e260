"""The recipe's `sharding` as a DeepSpeed configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.adapters.names import is_adapter_parameter
from sparsevlm.recipe.schema import Recipe, Sharding, Stage
from sparsevlm.train.expert_parallel import autoep_config

if TYPE_CHECKING:
    from torch import Tensor, nn

MOE_BLOCK = "sparsevlm.moe.block.SparseMoeBlock"
"""What ZeRO-3 handles as one module."""


def uses_deepspeed(recipe: Recipe, stage: Stage, num_processes: int) -> bool:
    """Return whether a stage runs under DeepSpeed.

    On one process there is nothing to shard and experts are not spread, so DeepSpeed is used only where something is
    to be offloaded: the same recipe runs on a laptop without it. Spread experts need several processes and `zero` (the
    recipe is refused otherwise), so they always come with DeepSpeed.
    """
    sharding = recipe.sharding_of(stage)
    return sharding.zero > 0 and (num_processes > 1 or sharding.offload != "none")


def init_deepspeed() -> None:
    """Start DeepSpeed's communication; sharded loading needs it and, on CPU, accelerate does not do it."""
    import deepspeed
    from deepspeed import comm

    if not comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False)


def load_sharded(engine: Any, checkpoint: str | Path) -> None:
    """Load a checkpoint that DeepSpeed has written; it holds no frozen parameters."""
    path, _ = engine.load_checkpoint(str(checkpoint), load_module_strict=False)
    assert path is not None, f"DeepSpeed found nothing in {checkpoint}"


def cast_adapter(model: nn.Module, deepspeed: Any) -> None:
    """Bring an adapter's weights to bfloat16 where DeepSpeed trains such weights through float32 masters.

    They are float32 otherwise, also on a bfloat16 model; but DeepSpeed wants one type for all that trains.
    """
    import torch

    if isinstance(deepspeed, dict) and deepspeed["bf16"]["enabled"]:
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                parameter.data = parameter.data.to(torch.bfloat16)


def gather_state(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return some of a model's weights and saved buffers, whole; all ranks call it.

    One tensor at a time, so that beside what is asked for nothing is gathered. Where DeepSpeed trains a 16-bit weight
    through a float32 master, the master is returned.

    Args:
        model: The model as it was handed to DeepSpeed.
        wanted: Tells by its name whether a tensor is.
    """
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not wanted(name):
            continue
        if is_adapter_parameter(name) and tensor.requires_grad and tensor.dtype != torch.float32:
            master = safe_get_full_fp32_param(tensor)
            assert master is not None, f"{name} trains, but DeepSpeed has no master of it"
            found[name] = master.detach().to("cpu", copy=True).view(getattr(tensor, "ds_shape", tensor.shape))
            continue
        with torch.no_grad(), deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            found[name] = tensor.detach().to("cpu", copy=True)
    return found


def deepspeed_config(
    sharding: Sharding, stage: Stage, dtype: str, *, config: Any = None, expert_ranks: int = 1
) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of a stage, None for plain data parallelism.

    Batch sizes and clipping are left ``"auto"`` for the trainer. Precision `bf16` is autocast over float32 weights,
    or, where the model is kept in bfloat16, bfloat16 weights with sharded float32 masters. The optimizer stays torch's
    AdamW in every case, also offloaded, so that the update does not depend on the sharding.

    Args:
        sharding: What to shard and offload.
        stage: The stage.
        dtype: The recipe's `model.dtype`.
        config: The model's configuration, where it has MoE layers.
        expert_ranks: Ranks that share the experts of a layer (`expert_parallel.ranks_of_experts`).
    """
    if sharding.zero == 0:
        return None
    zero: dict[str, Any] = {
        "stage": sharding.zero,
        "contiguous_gradients": True,
        "overlap_comm": True,
        # Stage output is always a complete model, never shards to convert by hand.
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    if sharding.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if sharding.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    moe = getattr(config, "moe", None) is not None
    if sharding.zero == 3 and moe and expert_ranks == 1:
        # Gathered and released whole: which experts a rank's tokens need must not decide what it communicates.
        zero["leaf_module"] = {"classes": [MOE_BLOCK]}
    pure = stage.precision == "bf16" and dtype == "bfloat16"
    return {
        **({"expert_parallel": autoep_config(config, expert_ranks)} if expert_ranks > 1 else {}),
        "zero_optimization": zero,
        "bf16": {"enabled": pure},
        "torch_autocast": {"enabled": stage.precision == "bf16" and not pure, "dtype": "bfloat16"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
