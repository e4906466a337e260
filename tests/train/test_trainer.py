"""The trainer: loss scale, what changes and what does not, stopping on NaN, metrics, resuming."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerState

from sparsevlm.moe.metrics import effective_share
from sparsevlm.train import checkpoints
from sparsevlm.train.callbacks import ProgressLine, read_metrics, show_balance
from sparsevlm.train.loader import StepSampler, accumulation_steps, fit_rows
from sparsevlm.train.parts import is_trained
from sparsevlm.train.trainer import NonFiniteError
from sparsevlm.train.window import Window
from tests.train.toy import ToyRows, losses, state, toy_recipe, toy_sample, toy_trainer


@pytest.fixture
def built(tiny_model: Any) -> Any:
    """A function that returns equal fresh models."""
    model, processor = tiny_model
    return lambda: (copy.deepcopy(model), processor)


def run(recipe: Any, built: Any, directory: Path, **kwargs: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = toy_trainer(recipe, built(), directory, **kwargs)
    trainer.train()
    return losses(directory), state(trainer.model)


def assert_same(one: tuple[list[float], Any], two: tuple[list[float], Any], atol: float = 2e-5) -> None:
    assert one[0] == pytest.approx(two[0], abs=atol)
    for name, tensor in one[1].items():
        assert torch.allclose(tensor, two[1][name], atol=20 * atol), name


# ---- loss scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_accumulation_does_not_change_the_loss(parts: Any, built: Any, tmp_path: Path, packed: bool) -> None:
    """1 x 4 = 2 x 2 = 4 x 1, though the micro-batches hold different numbers of targets."""
    runs = [
        run(toy_recipe(parts, batch={"rows_per_rank": n}), built, tmp_path / str(n), packed=packed) for n in (1, 2, 4)
    ]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_packed_and_padded_train_alike(parts: Any, built: Any, tmp_path: Path) -> None:
    recipe = toy_recipe(parts)
    assert_same(run(recipe, built, tmp_path / "packed"), run(recipe, built, tmp_path / "padded", packed=False))


def test_packs_of_several_samples_train_like_their_samples(parts: Any, built: Any, tmp_path: Path) -> None:
    packs = run(toy_recipe(parts, batch={"rows": 2, "rows_per_rank": 1}), built, tmp_path / "packs", pack=2)
    samples = run(toy_recipe(parts, batch={"rows": 4, "rows_per_rank": 2}), built, tmp_path / "samples")
    assert_same(packs, samples)


def test_the_loss_is_the_mean_over_the_targets_of_the_step(parts: Any, built: Any, tmp_path: Path) -> None:
    """Against a loop in plain torch over single samples."""
    model, processor = built()
    recipe = toy_recipe(parts, steps=3, optim={"lr": 1e-2, "max_grad_norm": 0.0})
    trained, _ = run(recipe, built, tmp_path)
    parameters = [p for n, p in model.named_parameters() if is_trained(n, ["connector", "language"])]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    model.train()
    expected = []
    for step in range(3):
        total, targets = torch.zeros(()), 0
        for i in range(4 * step, 4 * step + 4):
            one = processor.encode(toy_sample(i))
            media = {}
            if one.pixel_values is not None:
                media = {"pixel_values": one.pixel_values, "image_grid_thw": torch.tensor([list(one.grids[0])])}
            logits = model.eval()(input_ids=one.input_ids[None], **media).logits[0, :-1]
            keep = one.labels[1:] != -100
            total = total + torch.nn.functional.cross_entropy(logits[keep], one.labels[1:][keep], reduction="sum")
            targets += int(keep.sum())
        loss = total / targets
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert trained == pytest.approx(expected, abs=2e-5)


def test_the_balancing_loss_counts_once_whatever_the_accumulation(parts: Any, built: Any, tmp_path: Path) -> None:
    """With equal micro-batches its mean over them equals that of the whole batch."""

    class Same(ToyRows):
        def __getitem__(self, i: int) -> Any:
            return [self.processor.encode(toy_sample(1))]

    def one(rows_per_rank: int) -> Any:
        recipe = toy_recipe(
            parts,
            steps=3,
            trains=["moe"],
            upcycle={"layers": "all", "aux_loss_coef": 0.5},
            batch={"rows_per_rank": rows_per_rank},
        )
        _, processor = built()
        return run(recipe, built, tmp_path / str(rows_per_rank), dataset=Same(processor, 12))

    whole, split = one(4), one(1)
    assert_same(whole, split)
    rows = read_metrics(tmp_path / "1" / "metrics.jsonl")
    assert rows[0]["aux_loss"] >= 2 - 1e-4  # at least top_k, by its definition
    assert rows[0]["loss"] > 0.5 * rows[0]["aux_loss"]


def test_recomputation_does_not_change_gradients(parts: Any, built: Any, tmp_path: Path) -> None:
    """Also those of the router from the balancing loss, which reentrant recomputation would lose."""

    def one(on: bool) -> Any:
        recipe = toy_recipe(
            parts,
            trains=["moe", "connector"],
            upcycle={"layers": "all", "aux_loss_coef": 1.0},
            gradient_checkpointing=on,
        )
        return run(recipe, built, tmp_path / str(on))

    assert_same(one(True), one(False), atol=1e-6)


# ---- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [["connector"], ["language"], ["vision", "connector"], ["embeddings"]])
def test_frozen_weights_stay_bit_identical(parts: Any, built: Any, tmp_path: Path, trains: list[str]) -> None:
    trainer = toy_trainer(toy_recipe(parts, steps=2, trains=trains), built(), tmp_path)
    before = state(trainer.model)
    gradients: set[str] = set()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: gradients.add(name))
    trainer.train()
    named = dict(trainer.model.named_parameters())
    for name, tensor in state(trainer.model).items():
        trained = name in named and is_trained(name, trains)
        if not trained:
            assert torch.equal(tensor, before[name]), name
            assert name not in named or named[name].grad is None
    moved = {n for n, t in state(trainer.model).items() if not torch.equal(t, before[n])}
    assert moved == gradients  # the tower's layers after the one that is read get no gradient
    assert moved


@pytest.mark.parametrize("trains", [["connector"], ["vision"]])
def test_a_frozen_tower_runs_in_eval_mode_without_grad(parts: Any, built: Any, tmp_path: Path, trains: Any) -> None:
    trainer = toy_trainer(toy_recipe(parts, steps=2, trains=trains), built(), tmp_path)
    seen = []
    tower = trainer.model.model.vision_tower
    tower.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    trainer.train()
    trained = "vision" in trains
    assert seen
    assert set(seen) == {(trained, trained)}


@pytest.mark.parametrize("least", [0.0, 4e-4])
def test_each_part_follows_its_own_schedule(least: float, parts: Any, built: Any, tmp_path: Path) -> None:
    optim = {"lr": 1e-3, "part_lr": {"language": 1e-4}, "schedule": "cosine", "warmup": 2, "min_lr": least}
    recipe = toy_recipe(parts, steps=6, optim=optim)
    run(recipe, built, tmp_path)
    rates = [row["lr"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    low = least / 1e-3
    factors = [0.0, 0.5] + [low + (1 - low) * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert [rate["connector"] for rate in rates] == pytest.approx([1e-3 * f for f in factors])
    assert [rate["language"] for rate in rates] == pytest.approx([1e-4 * f for f in factors])


def test_bf16_is_autocast_over_float32_weights(parts: Any, built: Any, tmp_path: Path) -> None:
    recipe = toy_recipe(parts, steps=3, precision="bf16")
    trainer = toy_trainer(recipe, built(), tmp_path / "bf16")
    types = set()
    trainer.model.model.language_model.layers[0].mlp.register_forward_hook(lambda *a: types.add(a[2].dtype))
    trainer.train()
    assert types == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    exact, _ = run(toy_recipe(parts, steps=3), built, tmp_path / "fp32")
    assert losses(tmp_path / "bf16") == pytest.approx(exact, rel=0.02)
    assert losses(tmp_path / "bf16") != exact


# ---- stopping on non-finite numbers --------------------------------------------------------------------------------


class Poisoned(ToyRows):
    """Row 6 has a picture of NaN."""

    def __getitem__(self, i: int) -> Any:
        row = super().__getitem__(7 if i == 6 else i)
        if i == 6:
            row[0].pixel_values = torch.full_like(row[0].pixel_values, float("nan"))
            row[0].sample_id = "toy/poison"
        return row


def test_a_nan_loss_stops_before_the_update_and_names_the_batch(parts: Any, built: Any, tmp_path: Path) -> None:
    recipe = toy_recipe(parts, batch={"rows_per_rank": 1})
    model, processor = built()
    trainer = toy_trainer(recipe, (model, processor), tmp_path, dataset=Poisoned(processor, 24))
    after_one = toy_trainer(toy_recipe(parts, steps=1, batch={"rows_per_rank": 1}), built(), tmp_path / "one")
    after_one.train()
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is nan.*toy/poison"):
        trainer.train()
    bad = json.loads((tmp_path / "bad_batch.json").read_text())
    assert bad["step"] == 2
    assert bad["samples"] == [["toy/poison"]]
    for name, tensor in state(model).items():
        assert torch.equal(tensor, state(after_one.model)[name]), name


def test_an_infinite_gradient_stops_before_the_update(parts: Any, built: Any, tmp_path: Path) -> None:
    for clip in (1.0, 0.0):
        recipe = toy_recipe(parts, steps=1, optim={"max_grad_norm": clip})
        trainer = toy_trainer(recipe, built(), tmp_path / str(clip))
        before = state(trainer.model)
        weight = trainer.model.lm_head.weight
        weight.register_hook(lambda grad: grad * float("inf"))
        with pytest.raises(NonFiniteError, match=r"gradient norm is .*first in lm_head\.weight"):
            trainer.train()
        bad = json.loads((tmp_path / str(clip) / "bad_batch.json").read_text())
        assert bad["samples"] == [["toy/0", "toy/1"], ["toy/2", "toy/3"]]
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(trainer.model).items())


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_count_real_tokens(parts: Any, built: Any, tmp_path: Path) -> None:
    _, processor = built()
    recipe = toy_recipe(parts, steps=5, log_every=2)
    run(recipe, built, tmp_path, packed=False)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    windows = [range(4), range(4, 8), range(8, 16), range(16, 20)]
    for row, window in zip(rows, windows, strict=True):
        encoded = [processor.encode(toy_sample(i)) for i in window]
        pairs = [encoded[k : k + 2] for k in range(0, len(encoded), 2)]
        tokens = sum(e.length for e in encoded)
        assert row["tokens"] == tokens
        assert row["target_tokens"] == sum(e.num_targets for e in encoded)
        assert row["visual_tokens"] == sum(e.num_visual_tokens for e in encoded)
        assert row["samples"] == len(encoded)
        slots = sum(2 * max(e.length for e in pair) for pair in pairs)
        assert row["padding_share"] == pytest.approx(1 - tokens / slots)
        assert row["tokens_per_second"] > 0


@pytest.mark.parametrize("packed", [True, False])
def test_routing_is_logged_by_layer_and_modality(
    parts: Any, built: Any, tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of the step counts k times, under its modality, in each MoE layer; padding counts nowhere."""
    upcycle = {"layers": [1], "experts": 3, "top_k": 2}
    recipe = toy_recipe(parts, steps=5, trains=["moe"], upcycle=upcycle, log_every=3)
    trainer = toy_trainer(recipe, built(), tmp_path, packed=packed)
    seen = []
    add = Window.add_routing
    monkeypatch.setattr(Window, "add_routing", lambda *a: (add(*a), seen.append(trainer.state.global_step + 1)))
    trainer.train()
    assert seen == [1, 1, 3, 3, 5, 5]  # two micro-batches each in the steps that log
    similarity = [1.0]
    _, processor = built()
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert list(row["moe"]) == ["balance", "tokens", "layer_1"]
        numbers = row["moe"]["layer_1"]
        assert list(numbers["load"]) == list(numbers["entropy"]) == ["all", "text", "image"]
        for load in numbers["load"].values():
            assert len(load) == 3
            assert sum(load) == pytest.approx(1)
            assert max(load) <= 0.5 + 1e-6  # top-2: an expert can get at most half of the choices
        encoded = [processor.encode(toy_sample(i)) for i in range(4 * row["step"] - 4, 4 * row["step"])]
        tokens = {"all": sum(e.length for e in encoded), "image": sum(e.num_visual_tokens for e in encoded)}
        tokens["text"] = tokens["all"] - tokens["image"]
        assert row["moe"]["tokens"] == {"text": tokens["text"], "image": tokens["image"]}
        counts = {name: [2 * tokens[name] * share for share in load] for name, load in numbers["load"].items()}
        together = [a + b for a, b in zip(counts["text"], counts["image"], strict=True)]
        assert together == pytest.approx(counts["all"])
        assert all(abs(count - round(count)) < 1e-6 for row in counts.values() for count in row)
        assert row["moe"]["balance"] == pytest.approx(effective_share(numbers["load"]["all"]))
        assert numbers["dropped_share"] == 0
        similarity.append(numbers["similarity"])
    assert sorted(similarity, reverse=True) == similarity and similarity[-1] < 1  # copies that move apart


def test_routing_is_the_same_packed_padded_and_in_smaller_batches(parts: Any, built: Any, tmp_path: Path) -> None:
    """Of the first step: equal weights, equal samples. Entropies and logits differ by float32 rounding only; the
    similarity is that after the step, which Adam makes equally large whether a gradient is rounding or not."""
    records = []
    for rows, packed in ((1, True), (2, True), (4, False)):
        changes = {"trains": ["moe"], "upcycle": {"layers": "all", "router": {"init_std": 1.0}}}
        recipe = toy_recipe(parts, steps=1, batch={"rows_per_rank": rows}, **changes)
        run(recipe, built, tmp_path / f"{rows}", packed=packed)
        records.append(read_metrics(tmp_path / f"{rows}" / "metrics.jsonl")[0]["moe"])
    for other in records[1:]:
        assert other["balance"] == pytest.approx(records[0]["balance"], rel=1e-6)
        for layer in ("layer_0", "layer_1"):
            for key, value in records[0][layer].items():
                if isinstance(value, dict):
                    assert {k: pytest.approx(v, rel=1e-4) for k, v in value.items()} == other[layer][key]
                else:
                    assert other[layer][key] == pytest.approx(
                        value, rel=2e-3 if key == "similarity" else 1e-4, abs=1e-7
                    )


def test_dashboards_get_a_handful_of_routing_curves(parts: Any, built: Any, tmp_path: Path) -> None:
    recipe = toy_recipe(parts, steps=1, trains=["moe"], upcycle={"layers": "all"})
    trainer = toy_trainer(recipe, built(), tmp_path)
    trainer.train()
    logged = [name for name in trainer.state.log_history[0] if name.startswith("moe/")]
    assert logged == [f"moe/{name}" for name in ("balance", "max_violation", "dead_experts", "entropy", "dropped_share",
                                                 "similarity", "logit_rms")]  # fmt: skip
    row = read_metrics(tmp_path / "metrics.jsonl")[0]["moe"]
    assert trainer.state.log_history[0]["moe/balance"] == row["balance"]
    layers = [row["layer_0"], row["layer_1"]]
    mean = sum(layer["entropy"]["all"] for layer in layers) / 2
    assert trainer.state.log_history[0]["moe/entropy"] == pytest.approx(mean)


def test_the_progress_line_names_the_balance() -> None:
    shown = [show_balance(balance, 0.5) for balance in (1.0, 0.9, 0.89, 0.75, 0.74, 0.5)]
    assert [text.split("]")[1].removesuffix("[/") for text in shown] == [
        "balance 1.00", "balance 0.90", "balance 0.89 uneven", "balance 0.75 uneven", "balance 0.74 collapsing",
        "balance 0.50 collapsing",
    ]  # fmt: skip
    assert "collapsing" not in show_balance(1.0, 1.0)  # a token uses every expert
    out = io.StringIO()
    line = ProgressLine("moe", Console(file=out, width=120), collapsed=0.5)
    state = TrainerState(global_step=1, max_steps=10, is_world_process_zero=True)
    logs = {"loss": 1.0, "tokens_per_second": 9.0, "lr/moe": 1e-3}
    line.on_log(None, state, None, logs=logs | {"moe/balance": 0.6})  # pyright: ignore
    assert "balance 0.60 collapsing" in out.getvalue()


# ---- resuming --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for a kill."""


def stop_after(trainer: Any, step: int) -> None:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Stop

    trainer.add_callback(Kill())


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("moe", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(
    parts: Any, built: Any, tmp_path: Path, log_every: int, moe: bool
) -> None:
    """Bit for bit: losses in every log, also where a log window spans the interruption, and final weights."""
    extra = {"upcycle": {"layers": "all"}, "trains": ["moe", "connector"]} if moe else {}
    recipe = toy_recipe(
        parts, steps=9, save_every=3, log_every=log_every, optim={"schedule": "cosine", "weight_decay": 0.1}, **extra
    )

    def with_dropout() -> Any:
        model, processor = built()
        model.config.text_config.attention_dropout = 0.1
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.1
        return model, processor

    whole = toy_trainer(recipe, with_dropout(), tmp_path / "whole")
    whole.train()
    first = toy_trainer(recipe, with_dropout(), tmp_path / "cut")
    stop_after(first, 5)
    with pytest.raises(Stop):
        first.train()
    point = checkpoints.latest(tmp_path / "cut" / "checkpoints")
    assert point is not None
    assert point.name == "checkpoint-3"
    second = toy_trainer(recipe, with_dropout(), tmp_path / "cut")
    second.train(str(point))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    counts = ("step", "grad_norm", "lr", "tokens", "target_tokens", "samples", "aux_loss", "moe")
    for one, two in zip(*(read_metrics(tmp_path / d / "metrics.jsonl") for d in ("cut", "whole")), strict=True):
        assert {key: one.get(key) for key in counts} == {key: two.get(key) for key in counts}
        assert ("moe" in one) is moe
    for name, tensor in state(second.model).items():
        assert torch.equal(tensor, state(whole.model)[name]), name


def test_a_checkpoint_of_other_parts_is_refused(parts: Any, built: Any, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_recipe(parts, steps=2, save_every=1), built(), tmp_path)
    trainer.train()
    other = toy_trainer(toy_recipe(parts, steps=2, trains=["connector"]), built(), tmp_path)
    with pytest.raises(ValueError, match="other parameters than this stage trains"):
        other.train(str(checkpoints.latest(tmp_path / "checkpoints")))


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("rows_per_rank", [1, 2])
def test_a_step_holds_the_same_chunks_on_any_number_of_ranks(world: int, rows_per_rank: int) -> None:
    rows, steps = 8, 3
    samplers = [list(StepSampler(rows * steps, rows_per_rank, rank, world)) for rank in range(world)]
    accumulation = rows // (rows_per_rank * world)
    for step in range(steps):
        chunks = [chunk for s in samplers for chunk in s[step * accumulation : (step + 1) * accumulation]]
        expected = [list(range(i, i + rows_per_rank)) for i in range(step * rows, (step + 1) * rows, rows_per_rank)]
        assert sorted(chunks) == expected


@pytest.mark.parametrize(
    ("rows", "at_once", "world", "fitted"), [(8, 4, 1, 4), (8, 4, 2, 4), (8, 4, 4, 2), (8, 4, 8, 1), (12, 4, 2, 3)]
)
def test_more_ranks_hold_fewer_rows_at_once(parts: Any, rows: int, at_once: int, world: int, fitted: int) -> None:
    recipe = toy_recipe(parts, batch={"rows": rows, "rows_per_rank": at_once})
    batch = fit_rows(recipe, world).stages["toy"].batch
    assert batch.rows_per_rank == fitted
    assert accumulation_steps(batch, world) * fitted * world == rows
    assert recipe.stages["toy"].batch.rows_per_rank == at_once


def test_rows_that_do_not_divide_are_refused() -> None:
    from sparsevlm.recipe.schema import Batch

    assert accumulation_steps(Batch(rows=8, rows_per_rank=2), 2) == 2
    with pytest.raises(ValueError, match="8 cannot be divided over 3 processes with 2 at once"):
        accumulation_steps(Batch(rows=8, rows_per_rank=2), 3)
