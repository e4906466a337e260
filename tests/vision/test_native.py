"""Towers over packed patches: a picture in a batch is the picture alone, and the tower itself at its trained size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

from sparsevlm.recipe.native import FitRule, Native
from sparsevlm.vision.native import check_native, encode_native, make_native, native_dim
from sparsevlm.vision.patches import native_patches, unpatchify
from sparsevlm.vision.raw_config import RawPatchesConfig
from sparsevlm.vision.tokens import Grid, MediaKind

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 7,
}
SQUARES = {  # towers that also take square frames, and so can be compared with themselves
    "clip": CLIPVisionConfig(**SIZES),
    "siglip": SiglipVisionConfig(**SIZES),
    "vit": ViTConfig(**SIZES),
    "dinov2": Dinov2Config(**SIZES),
    "dinov2_registers": Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3),
}
SIGLIP2 = Siglip2VisionConfig(**{k: v for k, v in SIZES.items() if k != "image_size"}, num_patches=16)
TOWERS = {**SQUARES, "siglip2": SIGLIP2}
GRIDS = [Grid(1, 4, 4), Grid(1, 2, 7), Grid(3, 5, 3), Grid(1, 1, 1), Grid(1, 9, 2)]
every_tower = pytest.mark.parametrize("name", TOWERS)
every_square = pytest.mark.parametrize("name", SQUARES)

# Packed and alone differ by the rounding of differently shaped products: 5e-7 at most in float32 (features up to 5).
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 5e-6}


def build(name: str, positions: str = "own") -> Any:
    torch.manual_seed(0)
    tower = AutoModel.from_config(TOWERS[name]).eval()
    for parameter in tower.parameters():  # biases and class tokens start at 0, where no test would see them
        torch.nn.init.normal_(parameter, std=0.2)
    native = AutoModel.from_config(TOWERS[name]).eval()
    native.load_state_dict(tower.state_dict())
    make_native(native, positions)
    assert list(native.state_dict()) == list(tower.state_dict())
    return tower, native


def some_patches(grids: list[Grid] = GRIDS) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(sum(grid.num_tokens for grid in grids), 3 * 49)


def plain(tower: Any, patches: torch.Tensor, grid: Grid, layer: int) -> torch.Tensor:
    """The tower's own forward over one picture, its own interpolation of positions included."""
    picture = unpatchify(patches, grid.h, grid.w)[None]
    options = {} if "dinov2" in tower.config.model_type else {"interpolate_pos_encoding": True}
    state = tower(picture, **options, output_hidden_states=True).hidden_states[layer]
    return state[0, state.shape[1] - grid.h * grid.w :]


@every_square
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_each_frame_has_the_features_that_the_tower_itself_gives(name: str, layer: int) -> None:
    tower, native = build(name)
    patches = some_patches()
    packed = encode_native(native, patches, GRIDS, layer)
    start = 0
    for grid in GRIDS:
        for _ in range(grid.t):
            end = start + grid.h * grid.w
            expected = plain(tower, patches[start:end], grid, layer)
            torch.testing.assert_close(packed[start:end], expected, **TOLERANCE)
            start = end


def test_siglip2_has_the_features_of_its_own_padded_batches() -> None:
    tower, native = build("siglip2")
    patches, grids = some_patches(), [grid for grid in GRIDS for _ in range(grid.t)]
    longest = max(grid.h * grid.w for grid in grids)
    pieces = patches.split([grid.h * grid.w for grid in grids])
    channels_last = [piece.view(-1, 3, 7, 7).permute(0, 2, 3, 1).flatten(1) for piece in pieces]
    padded = torch.stack([F.pad(piece, (0, 0, 0, longest - len(piece))) for piece in channels_last])
    mask = torch.stack([torch.arange(longest) < len(piece) for piece in pieces])
    shapes = torch.tensor([[grid.h, grid.w] for grid in grids])
    # A mask in the attention takes other kernels than none: 2e-6 apart.
    states = tower(padded, mask, shapes, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encode_native(native, patches, GRIDS, -1), states[-1][mask], rtol=1e-4, atol=2e-5)


@every_tower
def test_packed_is_alone_and_gradients_too(name: str) -> None:
    _, native = build(name)
    patches = some_patches()
    direction = torch.randn(len(patches), 48)
    encode_native(native, patches, GRIDS, [-1, -2]).mul(direction).sum().backward()
    packed = {n: p.grad.clone() for n, p in native.named_parameters() if p.grad is not None}
    features = encode_native(native, patches, GRIDS, [-1, -2])
    native.zero_grad()
    start = 0
    for grid in GRIDS:
        end = start + grid.num_tokens
        alone = encode_native(native, patches[start:end], [grid], [-1, -2])
        torch.testing.assert_close(alone, features[start:end], **TOLERANCE)
        alone.mul(direction[start:end]).sum().backward()
        start = end
    assert any("position" in name for name in packed) and len(packed) > 30
    for n, p in native.named_parameters():
        if n in packed:  # sums in another order: 3e-6 of the largest entry
            torch.testing.assert_close(p.grad, packed[n], rtol=1e-4, atol=1e-5 * float(packed[n].abs().max() + 1))


@every_tower
@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
def test_frames_stay_apart_whatever_attention_a_model_is_set_to(name: str, chosen: str) -> None:
    _, native = build(name)
    patches = some_patches()
    expected = encode_native(native, patches, GRIDS)
    native.set_attn_implementation(chosen)  # as `model.set_attn_implementation` does to all of a model
    assert torch.equal(encode_native(native, patches, GRIDS), expected)


@every_square
@pytest.mark.parametrize("positions", ["own", "bilinear", "bicubic"])
def test_positions_at_the_trained_size_are_the_trained_ones_to_the_bit(name: str, positions: str) -> None:
    _, native = build(name, positions)
    _, table = native.embeddings.tables()
    assert torch.equal(native.embeddings.resample(table, 4, Grid(1, 4, 4)), table)
    # Nor would the interpolation itself change them, so nothing jumps beside the trained size.
    square = table.view(1, 4, 4, -1).permute(0, 3, 1, 2)
    for mode in ("bilinear", "bicubic"):
        same = F.interpolate(square, (4, 4), mode=mode, align_corners=False)
        torch.testing.assert_close(same, square, rtol=0, atol=1e-6)


def test_bilinear_positions_follow_the_definition() -> None:
    """Sample (i + 1/2) G / h - 1/2 of a grid of side G, clamped at its edges: align_corners=False, as OryxViT."""
    _, native = build("siglip", "bilinear")
    _, table = native.embeddings.tables()
    trained, grid = table.view(4, 4, -1), Grid(1, 3, 7)
    expected = torch.empty(3, 7, trained.shape[-1])
    for i in range(3):
        for j in range(7):
            y, x = max((i + 0.5) * 4 / 3 - 0.5, 0), max((j + 0.5) * 4 / 7 - 0.5, 0)
            top, left = min(int(y), 3), min(int(x), 3)
            low, right = min(top + 1, 3), min(left + 1, 3)
            dy, dx = y - top, x - left
            upper = (1 - dx) * trained[top, left] + dx * trained[top, right]
            lower = (1 - dx) * trained[low, left] + dx * trained[low, right]
            expected[i, j] = (1 - dy) * upper + dy * lower
    torch.testing.assert_close(native.embeddings.resample(table, 4, grid), expected.flatten(0, 1), rtol=0, atol=1e-6)


@every_tower
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_give_the_same_gradients(name: str, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        _, native = build(name)
        if checkpointing:
            native.gradient_checkpointing_enable({"use_reentrant": reentrant})
        encode_native(native.train(), some_patches(), GRIDS, -2).square().sum().backward()
        grads.append({n: p.grad for n, p in native.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@every_tower
def test_lora_on_the_tower_changes_the_features_and_trains(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    _, native = build(name)
    before = encode_native(native, some_patches(), GRIDS)
    adapted = get_peft_model(native, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    after = encode_native(adapted.base_model.model, some_patches(), GRIDS)
    assert (after - before).abs().max() > 1e-3
    after.sum().backward()
    weights = [p for n, p in adapted.named_parameters() if "lora_" in n and "layers.2." not in n]
    assert weights and all(p.grad is not None for p in weights)


@every_tower
def test_sixteen_bits_stay_near_single_precision(name: str) -> None:
    _, native = build(name)
    exact = encode_native(native, some_patches(), GRIDS)
    rounded = encode_native(native.bfloat16(), some_patches(), GRIDS)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@every_tower
def test_width_is_known_ahead(name: str) -> None:
    assert native_dim(TOWERS[name]) == 24
    assert native_dim(TOWERS[name], [-1, 0]) == 48
    with pytest.raises(ValueError, match="4 hidden states"):
        native_dim(TOWERS[name], 9)


def test_outside_of_a_native_pass_the_tower_is_itself() -> None:
    tower, native = build("clip")
    frames = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(native(frames).last_hidden_state, tower(frames).last_hidden_state)


def test_raw_patches_are_their_own_features() -> None:
    tower: Any = AutoModel.from_config(RawPatchesConfig(patch_size=7))
    make_native(tower)
    patches = some_patches()
    assert torch.equal(encode_native(tower, patches, GRIDS), patches)
    assert native_dim(tower.config) == 147 and not list(tower.parameters())


@pytest.mark.parametrize("fill", [1.0, 2.5])
def test_patches_are_cut_row_by_row_and_put_together_again(fill: float) -> None:
    """A picture of 13 x 9 pixels filled to 3 x 2 patches of 5, beside a loop over its pixels."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 13, 3), dtype=np.uint8))
    rules = Native(image=FitRule(type="fit", multiple=5, fill=fill))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    patches = native_patches([picture], 1, MediaKind.IMAGE, rules, 5, mean, std, Image.Resampling.BICUBIC)
    assert patches.shape == (6, 75)
    pixels = torch.full((3, 10, 15), fill)
    pixels[:, :9, :13] = torch.tensor(np.array(picture)).permute(2, 0, 1)
    pixels = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(patches[4].view(3, 5, 5), pixels[:, 5:10, 5:10])
    torch.testing.assert_close(unpatchify(patches, 2, 3), pixels)


def test_what_does_not_fit_is_refused() -> None:
    _, native = build("clip")
    with pytest.raises(ValueError, match=r"do not hold the 16 patches.*1x4x4"):
        encode_native(native, torch.zeros(15, 147), [Grid(1, 4, 4)])
    with pytest.raises(ValueError, match="hidden states"):
        encode_native(native, torch.zeros(1, 147), [Grid(1, 1, 1)], 7)
    with pytest.raises(ValueError, match=r"'swin' cannot take.*siglip_vision_model"):
        check_native(SwinConfig())


@pytest.mark.gpu
@every_tower
def test_the_kernel_for_variable_lengths_gives_what_single_calls_give(name: str) -> None:
    _, native = build(name)
    native, patches = native.cuda().bfloat16(), some_patches().cuda()
    packed = encode_native(native, patches, GRIDS)
    exact = encode_native(native.float(), patches, GRIDS)
    assert (packed.float() - exact).norm() < 0.05 * exact.norm()
