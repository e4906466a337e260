"""Qwen's towers over packed patches against transformers' own processor and forward, picture by picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sparsevlm.recipe.native import Native, SmartRule
from sparsevlm.vision.encoder import vision_subconfig
from sparsevlm.vision.native import encode_native, make_native, native_dim, rule_faults
from sparsevlm.vision.preprocess import ImageSpec, image_spec_from_config, preprocess_medium, tower_items
from sparsevlm.vision.tokens import Grid, MediaKind

SIZES: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 4}
CONFIGS: dict[str, Any] = {
    "qwen2": Qwen2VLConfig(vision_config={**SIZES, "embed_dim": 24, "hidden_size": 40}),
    "qwen2.5": Qwen2_5_VLConfig(  # windows of 4 x 4 patches, a layer over whole frames between them
        vision_config={**SIZES, "hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 40}
        | {"window_size": 16, "fullatt_block_indexes": [1]}
    ),
}
RULE = SmartRule(type="smart", multiple=8, min_pixels=16**2, max_pixels=48**2)
GRIDS = [Grid(1, 4, 4), Grid(1, 2, 14), Grid(3, 6, 4), Grid(1, 2, 2), Grid(1, 10, 6)]
COLOURS: dict[str, Any] = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
every_tower = pytest.mark.parametrize("name", CONFIGS)
TOLERANCE: dict[str, Any] = {
    "rtol": 1e-5,
    "atol": 5e-6,
}  # 1e-6 seen: products of another shape are rounded in another order


def build(name: str) -> tuple[Any, Any]:
    """Return a tower as transformers has it and one over packed patches, with the same weights."""
    torch.manual_seed(0)
    config = CONFIGS[name].vision_config
    tower, packed = AutoModel.from_config(config).eval(), AutoModel.from_config(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    packed.load_state_dict(tower.state_dict())
    make_native(packed)
    return tower, packed


def spec(name: str) -> ImageSpec:
    config = CONFIGS[name].vision_config
    return image_spec_from_config(config, COLOURS | {"resample": 3}, resize="native", native=Native(image=RULE))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


def squares(features: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Rows of patches -> squares of 2 x 2 patches one after the other, as Qwen's merger takes them."""
    return features.view(grid.t, grid.h // 2, 2, grid.w // 2, 2, -1).transpose(2, 3).flatten(0, 4)


@every_tower
def test_a_packed_batch_is_what_transformers_gives_of_each_picture(name: str) -> None:
    tower, packed = build(name)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": RULE.min_pixels, "longest_edge": RULE.max_pixels},
        patch_size=4,
        merge_size=2,
        image_mean=COLOURS["image_mean"],
        image_std=COLOURS["image_std"],
    )
    pictures = [noise(*size) for size in [(30, 20), (64, 64), (9, 13), (90, 31), (16, 16)]]
    ours = spec(name)
    grids = [tower_items(ours, MediaKind.IMAGE, 1, picture.size)[0].grid for picture in pictures]
    patches = torch.cat([preprocess_medium([picture], MediaKind.IMAGE, ours) for picture in pictures])
    features = encode_native(packed, patches, grids)
    for picture, grid, own in zip(pictures, grids, features.split([g.num_tokens for g in grids]), strict=True):
        given = processor(picture, return_tensors="pt")
        assert given["image_grid_thw"].tolist() == [list(grid)]
        outputs = tower(hidden_states=given["pixel_values"], grid_thw=given["image_grid_thw"])
        if name == "qwen2":  # Qwen2.5's states stand in the order of its windows; what its merger gives does not
            torch.testing.assert_close(squares(own, grid), outputs.last_hidden_state, **TOLERANCE)
        torch.testing.assert_close(tower.merger(squares(own, grid)), outputs.pooler_output, rtol=1e-4, atol=5e-5)


@every_tower
def test_every_layer_is_that_of_the_tower_and_frames_are_seen_by_themselves(name: str) -> None:
    tower, packed = build(name)
    grid = Grid(2, 2, 4)  # one window a frame, so that Qwen2.5's order is Qwen2's
    patches = torch.randn(16, 48)
    squared = squares(patches, grid).view(16, 3, 1, 16).expand(-1, -1, 2, -1).flatten(1)
    states = tower(squared, grid_thw=torch.tensor([[2, 2, 4]]), output_hidden_states=True).hidden_states
    assert len(states) == 4
    for layer in (0, 1, 2, -1):
        torch.testing.assert_close(squares(encode_native(packed, patches, [grid], layer), grid), states[layer])
    both = encode_native(packed, patches, [grid], [1, -1])
    torch.testing.assert_close(squares(both, grid), torch.cat([states[1], states[-1]], dim=-1))
    changed = patches.clone()
    changed[8:] += 1
    assert torch.equal(encode_native(packed, changed, [grid])[:8], encode_native(packed, patches, [grid])[:8])


@every_tower
def test_packed_is_alone_and_gradients_too(name: str) -> None:
    _, native = build(name)
    torch.manual_seed(1)
    patches = torch.randn(sum(grid.num_tokens for grid in GRIDS), 48)
    direction = torch.randn(len(patches), 48)
    encode_native(native, patches, GRIDS, [-1, -2]).mul(direction).sum().backward()
    packed = {n: p.grad.clone() for n, p in native.named_parameters() if p.grad is not None}
    assert len(packed) == len([n for n, _ in native.named_parameters() if not n.startswith("merger.")])
    features = encode_native(native, patches, GRIDS, [-1, -2]).detach()
    native.zero_grad()
    for grid, piece, rows, way in zip(
        GRIDS, *(x.split([grid.num_tokens for grid in GRIDS]) for x in (patches, features, direction)), strict=True
    ):
        alone = encode_native(native, piece, [grid], [-1, -2])
        torch.testing.assert_close(alone, rows, **TOLERANCE)
        alone.mul(way).sum().backward()
    for n, p in native.named_parameters():
        if n in packed:  # sums in another order: 2e-6 of the largest entry
            torch.testing.assert_close(p.grad, packed[n], rtol=1e-4, atol=1e-5 * float(packed[n].abs().max() + 1))


@every_tower
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_give_the_same_gradients(name: str, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        _, native = build(name)
        if checkpointing:
            native.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        patches = torch.randn(sum(grid.num_tokens for grid in GRIDS), 48)
        encode_native(native.train(), patches, GRIDS).square().sum().backward()
        grads.append({n: p.grad for n, p in native.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@every_tower
def test_width_is_known_ahead_and_weights_keep_their_names(name: str) -> None:
    tower, native = build(name)
    assert native_dim(tower.config) == 24 and native_dim(tower.config, [0, -1]) == 48
    with pytest.raises(ValueError, match="4 hidden states"):
        native_dim(tower.config, 9)
    assert list(native.state_dict()) == list(tower.state_dict())


@every_tower
def test_the_tower_is_read_out_of_a_whole_model(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "rope_parameters": rope,
    }
    text = {**small, "num_attention_heads": 2, "num_key_value_heads": 2}
    whole: Any = AutoModelForImageTextToText.from_config(
        type(config)(text_config=text, vision_config=config.vision_config.to_dict() | {"hidden_size": 16})
        if name == "qwen2"
        else type(config)(text_config=text, vision_config=config.vision_config.to_dict() | {"out_hidden_size": 16})
    )
    whole.save_pretrained(tmp_path)
    vision = vision_subconfig(AutoConfig.from_pretrained(tmp_path))
    tower = AutoModel.from_pretrained(tmp_path, config=vision)
    expected = whole.model.visual.state_dict()
    assert tower.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in tower.state_dict().items())


def test_sides_that_cut_through_squares_are_refused() -> None:
    config = CONFIGS["qwen2"].vision_config
    odd = Native(image=SmartRule(type="smart", multiple=12))
    assert list(rule_faults(odd, config)) == [
        ("image", "sides that are multiples of 12 pixels do not hold whole squares of 2 patches of 4")
    ]
    assert not list(rule_faults(Native(image=RULE), config))
    _, packed = build("qwen2")
    with pytest.raises(ValueError, match=r"1x3x2 patches does not divide into squares of 2 x 2"):
        encode_native(packed, torch.zeros(6, 48), [Grid(1, 3, 2)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import Qwen2VLConfig",
        "from transformers import Qwen2_5_VLForConditionalGeneration",
        "from transformers import Qwen2VLForConditionalGeneration, Qwen2_5_VLConfig",
        "from transformers import AutoModel",
        "import sparsevlm.vision.native",
    ],
)
def test_is_registered_whatever_is_imported_first(first: str) -> None:
    then = (
        "import torch; from transformers import AutoConfig, AutoModel\n"
        "with torch.device('meta'):\n"
        "    for name in ('qwen2_vl_vision', 'qwen2_5_vl_vision'):\n"
        "        print(type(AutoModel.from_config(AutoConfig.for_model(name, depth=1))).__module__)"
    )
    command = [sys.executable, "-c", f"import sparsevlm; {first}; {then}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["sparsevlm.vision.qwen_towers"] * 2, result.stderr
