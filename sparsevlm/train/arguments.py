"""From a recipe's stage to the arguments of the trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.recipe.schema import Recipe, Stage
from sparsevlm.train.expert_parallel import ranks_of_experts
from sparsevlm.train.loader import accumulation_steps
from sparsevlm.train.sharding import deepspeed_config, init_deepspeed

if TYPE_CHECKING:
    from trl import SFTConfig

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""The recipe's schedule -> the one of transformers (all with warmup)."""


def save_steps(stage: Stage, num_steps: int) -> int:
    """Return the steps between checkpoints: what the stage says, else a tenth of it, at most 500."""
    return stage.save_every or max(1, min(500, num_steps // 10))


def set_num_steps(args: SFTConfig, stage: Stage, num_steps: int) -> None:
    """Enter the length of the stage, which is known once its data has been planned."""
    args.max_steps = num_steps
    args.save_steps = save_steps(stage, num_steps)


def training_arguments(
    recipe: Recipe, name: str, *, stage_dir: Path, world_size: int, sharded: bool, start: Path | None = None
) -> SFTConfig:
    """Translate a stage; `set_num_steps` follows. Under ZeRO-3, models loaded after this call are loaded in shards.

    Args:
        recipe: The resolved recipe.
        name: The stage.
        stage_dir: ``RUN/<stage>``.
        world_size: Processes of the run.
        sharded: Use DeepSpeed as the recipe's `sharding` says.
        start: Directory that the model is loaded from, where there is one: DeepSpeed wants to know its MoE layers.

    Raises:
        ValueError: The batch does not divide over the processes.
    """
    import torch
    from trl import SFTConfig

    stage = recipe.stages[name]
    config = _deepspeed(recipe, name, world_size, start) if sharded else None
    use_cpu = not torch.accelerator.is_available()
    pure = config is not None and config["bf16"]["enabled"]
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage_dir / "tensorboard")  # transformers reads no argument for it
    args = SFTConfig(
        output_dir=str(stage_dir / "checkpoints"),
        run_name=f"{recipe.name}-{name}",
        seed=recipe.seed,
        per_device_train_batch_size=stage.batch.rows_per_rank,
        gradient_accumulation_steps=accumulation_steps(stage.batch, world_size),
        learning_rate=stage.optim.lr,
        lr_scheduler_type="cosine_with_min_lr" if stage.optim.min_lr else SCHEDULES[stage.optim.schedule],
        lr_scheduler_kwargs={"min_lr_rate": stage.optim.min_lr / stage.optim.lr} if stage.optim.min_lr else {},
        warmup_steps=stage.optim.warmup,
        max_grad_norm=stage.optim.max_grad_norm,
        weight_decay=stage.optim.weight_decay,
        adam_beta1=stage.optim.betas[0],
        adam_beta2=stage.optim.betas[1],
        adam_epsilon=stage.optim.eps,
        # DeepSpeed has its own switches: autocast over float32 weights, or bfloat16 weights.
        bf16=stage.precision == "bf16" and (config is None or pure),
        activation_checkpointing=stage.gradient_checkpointing,
        # Reentrant recomputation would lose the gradient of the router's load-balancing loss.
        activation_checkpointing_kwargs={"use_reentrant": False},
        # Part of a trained tower may be unused (layers after the one whose features are taken).
        ddp_find_unused_parameters="vision" in stage.trains,
        ddp_backend="gloo" if use_cpu and world_size > 1 else None,
        use_cpu=use_cpu,
        dataloader_num_workers=stage.batch.workers,
        logging_steps=stage.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_total_limit=None,  # `checkpoints.rotate` counts complete ones only
        report_to=list(recipe.report_to) or "none",
        disable_tqdm=True,
        deepspeed=config,
        remove_unused_columns=False,
    )
    if config is not None:
        init_deepspeed()
    return args


def _deepspeed(recipe: Recipe, name: str, world_size: int, start: Path | None) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of a stage."""
    from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig

    stage = recipe.stages[name]
    return deepspeed_config(
        recipe.sharding_of(stage),
        stage,
        recipe.model.dtype,
        config=None if start is None else SparseVLMConfig.from_pretrained(start),
        expert_ranks=ranks_of_experts(recipe, name, world_size),
    )
