"""LoRA sets chosen per token: the formula, text that sees nothing of them, rows of every kind, slices of a picture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsevlm.adapters.token_lora import TokenLoraConfig, use_sets
from sparsevlm.adapters.token_lora.context import running
from sparsevlm.adapters.token_lora.layer import TokenLoraLayer
from sparsevlm.data.sample import Media
from sparsevlm.vision.frames import encoding, frame_positions
from sparsevlm.vision.tokens import MEDIA_KINDS, Grid, MediaKind
from tests import tiny
from tests.adapters.mma_common import SAMPLES, collate, image, sample, tower
from tests.adapters.specs import stir

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-6}  # RMSNorm computes in float32: 2e-8 seen, an effect is > 1e-3
MOVIE = sample(Media(MediaKind.VIDEO, [tiny.picture(c) for c in ("red", "green", "blue", "yellow")]), "what moves ?")


def config(**fields: Any) -> TokenLoraConfig:
    return TokenLoraConfig(**{"r": 4, "alpha": 6, "dropout": 0.0, "target_modules": TARGETS, **fields})


def slices(**fields: Any) -> TokenLoraConfig:
    return config(choose="slice", sets=3, target_modules=["q_proj", "out_proj", "fc1"], **fields)


def adapted(model: Any, settings: TokenLoraConfig) -> Any:
    """The model in float64 with an adapter that does something."""
    torch.manual_seed(1)
    model = get_peft_model(model.double(), settings).double().eval()
    stir(model)
    return model


def formula(layer: Any, x: Tensor, sets: Tensor, name: str = "default") -> Tensor:
    """The layer token by token: ``W x + (alpha / r) B_i A_i x``, or ``W x``."""
    rows = []
    for token, i in zip(x.flatten(0, -2), sets.flatten().tolist(), strict=True):
        row = layer.base_layer(token)
        if i >= 0:
            settings = layer.loras_settings[name]
            down, up = layer.loras_A[name][i].weight, layer.loras_B[name][i].weight
            row = row + settings.alpha / settings.r * (up @ (down @ token))
        rows.append(row)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_equals_a_loop_over_tokens(kind: str) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"fc": nn.Linear(6, 10) if kind == "linear" else Conv1D(10, 6)})
    model: Any = adapted(base, config(choose="slice", sets=2, target_modules=["fc"]))
    layer: Any = model.base_model.model["fc"]
    assert type(layer) is TokenLoraLayer
    assert len([name for name, _ in model.named_parameters() if "loras_A" in name]) == 3
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    sets = torch.tensor([2, -1, 0, 0, 1])
    want = formula(layer, x, sets[:, None].expand(5, 4))
    with use_sets(frames=sets):
        got, flat = layer(x), layer(x.flatten(0, 1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert torch.equal(flat, got.flatten(0, 1))
    assert torch.equal(got[1], layer.base_layer(x)[1])
    with use_sets(frames=sets.roll(1)):
        assert (layer(x) - got).abs().max() > 1e-3, "the sets make no difference: the test would prove nothing"


def test_text_sees_the_frozen_weights_to_the_bit(tiny_model: Any) -> None:
    """Samples without media give the parent's logits; in those with media every token before the first is the same."""
    base, processor = tiny_model
    parent = copy.deepcopy(base).double().eval()
    model = adapted(base, config())
    for one in SAMPLES:
        batch = collate(processor, [one], packed=False)
        batch.pop("labels")
        want, got = parent(**batch).logits, model(**batch).logits
        visual = (batch["input_ids"] == parent.config.image_token_id)[0]
        if not visual.any():
            assert torch.equal(got, want)
            continue
        first = int(visual.long().argmax())
        assert first > 0 and torch.equal(got[:, :first], want[:, :first])
        assert (got - want)[:, -1].abs().max() > 1e-3  # through the attention


def test_every_layer_adds_to_the_placeholders_alone(tiny_model: Any) -> None:
    base, processor = tiny_model
    model = adapted(base, config())
    batch = collate(processor, SAMPLES, packed=True)
    sets = torch.where(batch["input_ids"] == base.config.image_token_id, 0, -1)
    assert {-1, 0} == set(sets.unique().tolist())
    seen = []
    for module in model.modules():
        if isinstance(module, TokenLoraLayer):
            module.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0], output)))
    model(**batch)
    assert len(seen) == 2 * len(TARGETS)
    for layer, x, output in seen:
        torch.testing.assert_close(output, formula(layer, x, sets), rtol=0, atol=1e-12)


def test_rows_of_every_kind_equal_separate_samples(tiny_model: Any) -> None:
    base, processor = tiny_model
    model = adapted(base, config())
    alone = [model(**collate(processor, [one], packed=False)).logits[0] for one in SAMPLES]
    padded = collate(processor, SAMPLES, packed=False)
    for row, mask, want in zip(model(**padded).logits, padded["attention_mask"], alone, strict=True):
        torch.testing.assert_close(row[mask.bool()], want, **TOLERANCE)
    torch.testing.assert_close(
        model(**collate(processor, SAMPLES, packed=True)).logits[0], torch.cat(alone), **TOLERANCE
    )


def test_generation_with_a_cache_equals_full_forward_passes(tiny_model: Any) -> None:
    """A mixed, left-padded batch: new tokens are text, and the cache holds what visual tokens left."""
    base, processor = tiny_model
    model = adapted(base, config())
    batch = collate(processor, SAMPLES[:2], packed=False)
    width = batch["input_ids"].shape[1]
    for row in range(2):
        shift = width - int(batch["attention_mask"][row].sum())
        for key in ("input_ids", "attention_mask"):
            batch[key][row] = batch[key][row].roll(shift)
    batch.pop("labels")
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached = model.generate(**batch, **settings)
        full = model.generate(**batch, **settings, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(full.scores), **TOLERANCE)


def test_pictures_only_or_videos_only(tiny_model: Any) -> None:
    base, processor = tiny_model
    parent = copy.deepcopy(base).double().eval()
    batches = {"image": collate(processor, [SAMPLES[0]], False), "video": collate(processor, [MOVIE], False)}
    assert bool((batches["video"]["input_ids"] == base.config.video_token_id).any())
    both = {kind: model_logits(adapted(copy.deepcopy(base), config()), batch) for kind, batch in batches.items()}
    for choose in ("image", "video"):
        model = adapted(copy.deepcopy(base), config(choose=choose))
        for kind, batch in batches.items():
            want = both[kind] if kind == choose else model_logits(parent, batch)
            assert torch.equal(model_logits(model, batch), want)


def model_logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("whole", ["own", "none"])
def test_a_tower_gives_each_slice_its_set(kind: str, whole: Any) -> None:
    base = tower(kind)
    pixels = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    parent = base(pixels).last_hidden_state
    model = adapted(base, slices(whole=whole))
    positions = (0, 1, 2, 3, -1)  # four slices on three sets: the last passes the first set again; the whole picture
    with encoding(positions):
        together = model(pixels).last_hidden_state
        again = model(pixels.flip(0)).last_hidden_state.flip(0)
    own = 3 if whole == "own" else -1
    for i, chosen in enumerate((0, 1, 2, 0, own)):
        with use_sets(frames=torch.tensor([chosen])):
            torch.testing.assert_close(model(pixels[i : i + 1]).last_hidden_state[0], together[i], **TOLERANCE)
        assert i == 2 or (again[i] - together[i]).abs().max() > 1e-3
    if whole == "none":
        torch.testing.assert_close(together[4], parent[4], **TOLERANCE)
    layer = next(module for module in model.modules() if isinstance(module, TokenLoraLayer))
    x = torch.randn(5, 17, 32, dtype=torch.float64)
    with use_sets(frames=torch.tensor([0, 1, 2, 0, own])):
        want = formula(layer, x, torch.tensor([0, 1, 2, 0, own])[:, None].expand(5, 17))
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)


def test_positions_of_frames() -> None:
    one, four = Grid(1, 4, 4), Grid(4, 4, 4)
    picture, video, views, piece = MediaKind.IMAGE, MediaKind.VIDEO, MediaKind.MULTI_VIEW, MediaKind.SLICE
    assert frame_positions([one, four, four], [picture, video, views], [0, 0, 1]) == (-1, 0, 1, 2, 3, 0, 1, 2, 3)
    monkey = frame_positions([one] * 5 + [one] * 3, [*[piece] * 4, picture, *[piece] * 2, picture], [0] * 8)
    assert monkey == (0, 1, 2, 3, -1, 0, 1, -1)
    assert frame_positions([four, one], [piece, picture], [0, 0]) == (0, 1, 2, 3, -1)
    assert frame_positions([one] * 4, [piece] * 4, [0, 0, 1, 1]) == (0, 1, 0, 1)


def test_the_model_tells_the_tower_its_frames(tiny_model: Any) -> None:
    """Items of a batch: a picture, then a video whose frames count from 0."""
    base, processor = tiny_model
    model = adapted(base, slices())
    batch = collate(processor, [SAMPLES[0], MOVIE], packed=True)
    frames = batch["pixel_values"].shape[0]
    told = model_logits(model, batch)
    with use_sets(frames=torch.tensor([3, *(i % 3 for i in range(frames - 1))])):
        assert torch.equal(model_logits(model, batch), told)
    with use_sets(frames=torch.full((frames,), 3)):
        assert (model_logits(model, batch) - told).abs().max() > 1e-4


def test_a_slice_adapter_reaches_every_set_once_its_slices_come(tiny_model: Any) -> None:
    base, processor = tiny_model
    model = adapted(base, slices()).train()
    cut = sample(image(), image("blue"), image("green"), image(), "?", answer="yes")
    batch = collate(processor, [cut], packed=True)
    batch["media_kinds"] = torch.tensor([MEDIA_KINDS.index(kind) for kind in [*[MediaKind.SLICE] * 3, MediaKind.IMAGE]])
    plain = backward(model, batch)
    assert all(bool(gradient.any()) for gradient in plain.values()) and len(plain) == 2 * 3 * 4
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in backward(model, batch).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6)


def backward(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [config(), slices()], ids=["partial", "slice"])
def test_sets_that_no_token_passes_have_a_gradient_of_zero(tiny_model: Any, settings: TokenLoraConfig) -> None:
    """On every rank every parameter takes part in a step, whatever the batch holds."""
    base, processor = tiny_model
    model = adapted(base, settings).train()
    gradients = backward(model, collate(processor, [SAMPLES[1]], packed=True))
    unread = "vision_tower.encoder.layers.1."  # after the layer whose features are taken
    assert gradients.keys() == {name for name, _ in model.named_parameters() if "loras_" in name and unread not in name}
    assert not any(bool(gradient.any()) for gradient in gradients.values())


def test_xcomposer2_has_604_million() -> None:
    """InternLM2-7B, whose code names the layers so: 603,979,776 with r 256 (computed from its code)."""
    width, inner, heads = 4096, 14336, 4096 + 2 * 1024
    sizes = {
        "wqkv": (width, heads),
        "wo": (width, width),
        "w1": (width, inner),
        "w3": (width, inner),
        "w2": (inner, width),
    }
    with torch.device("meta"):
        layers = [
            nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}) for _ in range(32)
        ]
        model = get_peft_model(nn.ModuleList(layers), TokenLoraConfig(target_modules=list(sizes)))  # type: ignore[arg-type]
    assert model.get_nb_trainable_parameters()[0] == 603_979_776


def test_a_failed_pass_leaves_nothing_behind(tiny_model: Any) -> None:
    base, processor = tiny_model
    model = adapted(base, config())
    batch = collate(processor, SAMPLES, packed=False)
    with pytest.raises(ValueError, match="inputs_embeds instead of input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(ValueError):
        model(**batch)
    assert running("language") is None and running("vision") is None
