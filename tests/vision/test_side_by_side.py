"""Towers side by side: each sees the picture as it would alone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel

from sparsevlm.vision.encoder import encode_frames, feature_dim, num_prefix_tokens, output_grid
from sparsevlm.vision.preprocess import image_spec_from_config, preprocess_frames
from sparsevlm.vision.side_by_side import SideBySideModel, side_by_side
from tests import tiny

CLIP_COLOURS = ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
DINO_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pair(side=32, layers=(-2, [1, -1])):
    """A tiny CLIP and a tiny DINOv2, weights set apart, as one tower."""
    configs = [tiny.vision_config("clip"), tiny.vision_config("dinov2", hidden_size=24)]
    colours = [list(colour) for colour in zip(CLIP_COLOURS, DINO_COLOURS)]
    config = side_by_side(configs, list(layers), [32, side], *colours)
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval(), configs, layers


def spec(config, side, colours):
    return image_spec_from_config(config, None, image_size=side, mean=colours[0], std=colours[1])


def test_features_are_those_of_each_tower_alone_in_its_own_colours():
    tower, configs, layers = pair()
    frames = [tiny.picture("red", (40, 30)), tiny.picture("blue", (20, 50))]
    pixels = preprocess_frames(frames, spec(configs[0], 32, CLIP_COLOURS))
    got = encode_frames(tower, pixels)
    alone = []
    for each, config, layer, colours in zip(tower.towers, configs, layers, (CLIP_COLOURS, DINO_COLOURS)):
        # Bars beside the picture have the first tower's mean colour, so the second's own are put in by hand.
        own = preprocess_frames(frames, spec(config, 32, colours))
        bars = pixels == 0
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in colours)
        grey = ((torch.tensor(CLIP_COLOURS[0]).view(3, 1, 1) - mean) / std).expand_as(own)
        alone.append(encode_frames(each, torch.where(bars, grey, own), layer))
    # Colours go through one more multiplication: measured 3e-7, layers of width 24 and 32.
    torch.testing.assert_close(got, torch.cat(alone, dim=-1), rtol=0, atol=5e-6)
    assert torch.equal(got[..., :32], alone[0])  # the first tower's pixels are not touched


def test_counts_are_read_off_as_of_any_tower():
    tower, configs, layers = pair()
    config = tower.config
    assert output_grid(config, 32) == output_grid(configs[0], 32) == (4, 4)
    assert feature_dim(config) == 32 + 2 * 24
    assert num_prefix_tokens(config) == 0
    assert isinstance(tower, SideBySideModel) and tower.config.image_size == 32
    assert feature_dim(copy.deepcopy(config)) == sum(map(feature_dim, configs, layers))


def test_a_tower_may_see_the_picture_larger():
    """16 px patches at 64 px beside 8 px patches at 32: one grid; pictures come in at 64 and are brought down."""
    configs = [tiny.vision_config("clip"), tiny.vision_config("siglip", patch_size=16, image_size=64)]
    colours = [[mean] * 2 for mean in CLIP_COLOURS]
    tower = AutoModel.from_config(side_by_side(configs, [-1, -1], [32, 64], *colours)).eval()
    assert tower.config.image_size == 64 and output_grid(tower.config, 64) == (4, 4)
    pixels = torch.randn(2, 3, 64, 64)
    small = torch.nn.functional.interpolate(pixels, (32, 32), mode="bicubic", antialias=True)
    want = [encode_frames(each, seen) for each, seen in zip(tower.towers, (small, pixels))]
    assert torch.equal(encode_frames(tower, pixels), torch.cat(want, dim=-1))


def test_grids_that_differ_are_refused():
    configs = [tiny.vision_config("clip"), tiny.vision_config("siglip", patch_size=16)]
    with pytest.raises(ValueError, match=r"one grid, got clip_vision_model 4 x 4 at 32 pixels, siglip_vision_model 2"):
        side_by_side(configs, [-1, -1], [32, 32], *[[[0.5] * 3] * 2] * 2)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    tower, *_ = pair()
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(encode_frames(tower, pixels), encode_frames(again, pixels))
    loaded, made = (
        [each.to_json_string() for each in config.configs]
        for config in (AutoConfig.from_pretrained(tmp_path), tower.config)
    )
    assert loaded == made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_of_weights_is_the_models_not_the_published_towers(tmp_path, dtype):
    configs = [tiny.vision_config("clip"), tiny.vision_config("dinov2", hidden_size=24)]
    configs[0].dtype, configs[1].dtype = "bfloat16", "float16"
    colours = [list(colour) for colour in zip(CLIP_COLOURS, DINO_COLOURS)]
    tower = AutoModel.from_config(side_by_side(configs, [-1, -1], [32, 32], *colours), dtype=dtype)
    assert {weight.dtype for weight in tower.parameters()} == {dtype}
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert {name: weight.dtype for name, weight in again.named_parameters()} == {
        name: dtype for name, _ in tower.named_parameters()
    }
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in tower.named_parameters())


def test_half_precision_loses_no_more_than_a_tower_alone():
    """Pixels are brought to the other colours before they are rounded, so that each tower sees what it would alone."""
    tower, configs, layers = pair()
    half = copy.deepcopy(tower).to(torch.bfloat16)
    pixels = preprocess_frames([tiny.picture("green", (32, 32))], spec(configs[0], 32, CLIP_COLOURS))
    own = preprocess_frames([tiny.picture("green", (32, 32))], spec(configs[1], 32, DINO_COLOURS))
    got = encode_frames(half, pixels)[..., 32:]
    assert torch.equal(got, encode_frames(half.towers[1], own, layers[1]))
