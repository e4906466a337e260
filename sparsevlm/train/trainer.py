"""The trainer: trl's SFTTrainer with our batches, parts, loss scale and stop on non-finite numbers.

What it leaves out on purpose: trl's entropy and token accuracy. On CPU, trl scores every position for them where the
model projects only those with a target: measured, 4 to 13 % of a step at a vocabulary of 64 and nine times the step at
49,152.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from sparsevlm.data.skips import SkipLog
from sparsevlm.moe.groups import router_groups
from sparsevlm.recipe.schema import Optim
from sparsevlm.train import checkpoints
from sparsevlm.train.callbacks import MetricsWriter
from sparsevlm.train.expert_parallel import adopted_experts, configured_ranks, mark_groups
from sparsevlm.train.loader import BatchWithIds, StepSampler
from sparsevlm.train.parts import parameter_groups, still_modules
from sparsevlm.train.sharding import load_sharded
from sparsevlm.train.window import TARGETS, Window, count_batch, routing_of_batch, routing_scalars

TRAINABLES = "trainables.safetensors"
WINDOW = "window_{rank}.json"


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite; the weights were not updated."""


class _WindowCallback(TrainerCallback):
    """Restores the log window once the loop has set up its own counters, and logs the last step."""

    def __init__(self, trainer: VLMTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restore_window()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class VLMTrainer(SFTTrainer):
    """Trains one stage.

    Args:
        model: A `SparseVLMForConditionalGeneration` with its trainable parts chosen (`parts.select_trainable`).
        args: From `arguments.training_arguments`.
        processor: The model's processor.
        dataset: Item i = row i = list of `Encoded` (`StageData`, `StageStream`).
        collator: Rows to model inputs.
        optim: Learning rates, decay.
        stage_dir: Where `bad_batch.json` goes.
        marker: What is written into the completion marker of checkpoints.
        callbacks: As for `Trainer`.
        lora_plus_ratio: As for `parts.parameter_groups`.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the targets of the whole step

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        processor: Any,
        dataset: Any,
        collator: Any,
        optim: Optim,
        stage_dir: Path,
        marker: dict[str, Any] | None = None,
        callbacks: list[Any] | None = None,
        lora_plus_ratio: float = 1.0,
    ) -> None:
        from datasets import Dataset

        # SFTTrainer insists on a `datasets.Dataset` and looks at its first row; ours takes its place right after.
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        config = dict(vars(model.config))
        super().__init__(
            model=model,
            args=args,
            data_collator=BatchWithIds(collator),
            train_dataset=Dataset.from_dict({"row": [0]}),
            processing_class=processor,
            callbacks=callbacks,
        )
        if "use_cache" not in config:  # set for training, but would be saved; `compute_loss` passes it
            vars(model.config).pop("use_cache", None)
        self.remove_callback(PrinterCallback)
        self.add_callback(_WindowCallback(self))
        self.train_dataset = dataset
        self.vlm: Any = model  # never wrapped
        self.skips: SkipLog | None = getattr(dataset, "skips", None)
        self.optim, self.lora_plus_ratio = optim, lora_plus_ratio
        self.stage_dir = Path(stage_dir)
        self.marker = marker or {}
        self.expert_ranks = configured_ranks(args.deepspeed)
        self.visual_ids = torch.tensor([model.config.image_token_id, model.config.video_token_id])
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.still = still_modules(model)
        self.router_groups = router_groups(model)
        self.writers = [callback for callback in callbacks or [] if isinstance(callback, MetricsWriter)]
        self.group_names: list[str] = []
        self._rates: list[float] = []
        self._resumed: Path | None = None
        self._ids: Iterator[list[str]] = iter(())
        self._step_ids: list[list[str]] = []
        self._batch_ids: list[str] = []
        self._window = Window(self.args.device)

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: the estimate of transformers walks all modules each batch and knows no experts."""
        return 0

    # ---- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return this rank's batches. Neither order nor content depends on the number of ranks or workers."""
        rows, workers = self.args.per_device_train_batch_size, self.args.dataloader_num_workers
        options: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": workers,
            "pin_memory": self.args.device.type == "cuda",
            "prefetch_factor": 4 if workers else None,
            # Its own generator: the loader must not draw from the one that dropout uses.
            "generator": torch.Generator().manual_seed(self.args.seed),
        }
        dataset: Any = self.train_dataset
        sampler = StepSampler(len(dataset), rows, self.args.process_index, self.args.world_size)
        return DataLoader(dataset, batch_sampler=sampler, **options)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of a step and its target tokens over all ranks."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self._step_ids = [batch.pop("sample_ids") for batch in batches]
        self._ids = iter(self._step_ids)
        read = [row for batch in batches for row in batch.pop("rows")]
        if self.skips is not None:
            self.skips.note_rows(read)
        counted = [
            count_batch(batch, self.visual_ids, len(ids)) for batch, ids in zip(batches, self._step_ids, strict=True)
        ]
        counts = torch.stack(counted).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)  # pyright: ignore
        self._window.counts += counts
        return batches, counts[TARGETS].clamp(min=1)

    # ---- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss such that its gradient, averaged over ranks and summed over micro-batches, is right.

        The model divides by the targets of all ranks, so the mean that DDP and DeepSpeed take over W ranks is undone
        by a factor W. The load-balancing loss is a mean for each micro-batch: it gets 1 / (micro-batches) and is left
        to the mean over ranks, hence the second W.
        """
        for module in self.still:
            module.eval()  # `training_step` has just put all of the model in training mode
        self._batch_ids = next(self._ids, [])
        world = self.args.world_size
        measure = bool(self.router_groups) and self._measures_routing()
        outputs = model(
            **inputs,
            num_items_in_batch=num_items_in_batch,
            aux_loss_scale=1.0 / (world * max(self.current_gradient_accumulation_steps, 1)),
            output_router_logits=measure or None,
            use_cache=False,
        )
        loss = outputs.loss * world
        if not bool(torch.isfinite(loss.detach())):
            self._stop(f"the loss is {loss.item()}", {"loss": str(loss.item())}, [self._batch_ids], everywhere=False)
        self._window.add_losses(aux_loss=outputs.aux_loss, z_loss=outputs.z_loss)
        if measure:
            self._window.add_routing(routing_of_batch(self.vlm.config, self.router_groups, inputs, outputs))
        return (loss, outputs) if return_outputs else loss

    def _will_log(self) -> bool:
        """Tell whether the current step ends with a log."""
        step = self.state.global_step + 1
        return step in (1, self.state.max_steps) or step % int(self.args.logging_steps) == 0

    def _measures_routing(self) -> bool:
        """Tell whether the current step measures routing: off the hot path, only where it is logged."""
        return self._will_log()

    # ---- stop on non-finite numbers -------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; but look at the norm first, since clipping by a NaN would spread it over all gradients."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        norm = self._checked_norm()
        torch.nn.utils.clip_grads_with_norm_(self.trained, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient norm; called before the update. DeepSpeed has then left out a non-finite one itself."""
        if self.is_deepspeed_enabled:
            norm: Any = super()._get_grad_norm(model, grad_norm)
            if not 0 <= float(norm) < float("inf"):  # it writes -1 for NaN
                self._stop(f"the gradient norm is {norm}", {"grad_norm": str(norm)}, self._step_ids, everywhere=True)
            return norm
        return self._checked_norm() if grad_norm is None else grad_norm

    def _checked_norm(self) -> Tensor:
        """Return the norm of all gradients, or stop the run."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            bad = [n for n, p in self.vlm.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            what = f"the gradient norm is {norm.item()}" + (f" (first in {bad[0]})" if bad else "")
            numbers = {"grad_norm": str(norm.item()), "parameters": bad[:20]}
            self._stop(what, numbers, self._step_ids, everywhere=True)
        return norm

    def _stop(self, what: str, numbers: dict[str, Any], ids: list[list[str]], everywhere: bool) -> None:
        """Write `bad_batch.json` and raise.

        Args:
            what: What was found, for the message.
            numbers: Entered in the file.
            ids: Sample ids of the micro-batches in question on this rank.
            everywhere: All ranks are here, so the ids of all can be collected.
        """
        step = self.state.global_step + 1
        if everywhere and self.args.world_size > 1:
            from accelerate.utils import gather_object

            ids = gather_object(ids)
        if self.args.should_save or not everywhere:
            self.stage_dir.mkdir(parents=True, exist_ok=True)
            record = {"step": step, "rank": self.args.process_index, **numbers, "samples": ids}
            checkpoints.write_atomically(self.stage_dir / "bad_batch.json", json.dumps(record, indent=2) + "\n")
        flat = [sample for batch in ids for sample in batch]
        shown = ", ".join(flat[:8]) + (f" and {len(flat) - 8} more" if len(flat) > 8 else "")
        raise NonFiniteError(
            f"step {step}: {what}; the run stopped before the update. Samples: {shown}. All of them and more are in "
            f"{self.stage_dir / 'bad_batch.json'}. Look at these samples, lower the learning rate or "
            "max_grad_norm, or use precision fp32"
        )

    # ---- optimizer ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create AdamW over the groups of `parts.parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(self.vlm, self.optim, self.lora_plus_ratio)
            groups = mark_groups(groups, self.vlm, self.expert_ranks)
            self.group_names = [group.get("part", group["name"]) for group in groups]
            self.optimizer = torch.optim.AdamW(
                groups,
                lr=self.optim.lr,
                betas=self.optim.betas,
                eps=self.optim.eps,
                fused=not self.is_deepspeed_enabled and self.args.device.type in ("cuda", "cpu", "xpu"),
            )
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """Also remember the rates of all groups; called between the update and the scheduler's step."""
        self._rates = [float(rate) for rate in self.lr_scheduler.get_last_lr()]  # pyright: ignore
        return max(self._rates)

    # ---- metrics --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's metrics to a training log, and skip trl's."""
        if "loss" in logs:
            logs.pop("learning_rate", None)
            for name, rate in zip(self.group_names, self._rates, strict=False):
                logs[f"lr/{name.removesuffix('/no_decay')}"] = rate
            logs.update(self._window.metrics(self.accelerator.gather))
            records = self._window.routing_records(self.vlm, self.router_groups, self.accelerator.gather)
            for group, record in records.items():
                logs.update(routing_scalars(record, group))
                for writer in self.writers:
                    writer.details[group] = record
            self._window = Window(self.args.device)
        super(SFTTrainer, self).log(logs)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none; a stage has its own."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, or into a checkpoint only what this stage changes."""
        if not _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save and not self.is_deepspeed_enabled:  # DeepSpeed saves it with the optimizer
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(self._trainable_state(), Path(output_dir) / TRAINABLES)

    def _trainable_state(self) -> dict[str, Tensor]:
        """Return the parameters that train and all saved buffers (batch statistics), by name."""
        state = {name: p.detach() for name, p in self.vlm.named_parameters() if p.requires_grad}
        parameters = {name for name, _ in self.vlm.named_parameters(remove_duplicate=False)}
        buffers = {name: b for name, b in self.vlm.state_dict().items() if name not in parameters}
        return {name: tensor.contiguous() for name, tensor in {**state, **buffers}.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINABLES)
        here = self._trainable_state()
        if saved.keys() != here.keys():
            raise ValueError(
                f"{resume_from_checkpoint} holds other parameters than this stage trains: "
                f"{sorted(saved.keys() ^ here.keys())[:5]}; delete the stage's directory to start it anew"
            )
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(saved[name])

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Under DeepSpeed, load the checkpoint here: ours hold no frozen parameters, which transformers insists on."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.trained.clear()  # DeepSpeed may replace experts; for our clipping only
        with adopted_experts(self.vlm, self.expert_ranks):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            load_sharded(self.model_wrapped, resume_from_checkpoint)
            self._load_optimizer_and_scheduler(str(resume_from_checkpoint))  # the scheduler; the rest is loaded
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)  # pyright: ignore
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")  # pyright: ignore
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        open_log = {"loss": float(self._tr_loss), "last_logged": self._globalstep_last_logged}
        file = Path(output_dir) / WINDOW.format(rank=self.args.process_index)
        file.write_text(json.dumps(open_log | self._window.state()))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint directory if one is given."""
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def restore_window(self) -> None:
        """Continue the open log window of the checkpoint, so that logs equal those of an uninterrupted run."""
        self._window = Window(self.args.device)
        if self._resumed is None:
            return
        file = self._resumed / WINDOW.format(rank=self.args.process_index)
        if not file.is_file():  # written by fewer processes
            return
        saved = json.loads(file.read_text())
        self._tr_loss = torch.tensor(saved["loss"], device=self.args.device)
        self._globalstep_last_logged = saved["last_logged"]
        self._window.load_state(saved)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.perf_counter()
        super(SFTTrainer, self)._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            root = Path(str(self.args.output_dir))
            checkpoints.mark_complete(
                root / f"checkpoint-{self.state.global_step}", {"step": self.state.global_step, **self.marker}
            )
            checkpoints.rotate(root)
        self.accelerator.wait_for_everyone()
        self.leave_out(time.perf_counter() - started)

    def leave_out(self, seconds: float) -> None:
        """Do not count seconds in which nothing was trained."""
        self._window.leave_out(seconds)
