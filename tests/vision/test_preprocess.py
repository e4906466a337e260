import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, SiglipImageProcessorPil, TimmWrapperConfig

from sparsevlm.vision.preprocess import ImageSpec, image_spec_from_config, preprocess_frames, tower_items
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
CLIP = CLIPVisionConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=28, patch_size=7
)


def spec(resize, size=28, **options):
    return ImageSpec(image_size=size, resize=resize, mean=MEAN, std=STD, patch_grid=(4, 4), **options)


def noise(width, height, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (37, 37), (28, 28), (13, 20), (29, 200)])
def test_crop_is_what_clip_does(size):
    picture = Image.fromarray(noise(*size))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD
    )
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess_frames([picture], spec("crop")), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(60, 40), (13, 20)])
@pytest.mark.parametrize("interpolation, code", [("bicubic", 3), ("bilinear", 2), ("lanczos", 1)])
def test_stretch_is_what_siglip_does(size, interpolation, code):
    picture = Image.fromarray(noise(*size))
    processor = SiglipImageProcessorPil(
        size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD, resample=Image.Resampling(code)
    )
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    taken = preprocess_frames([picture], spec("stretch", interpolation=interpolation))
    torch.testing.assert_close(taken, expected, rtol=0, atol=2e-6)


def test_pad_centres_the_picture_on_the_mean_colour():
    wide = np.full((20, 40, 3), (10, 120, 230), dtype=np.uint8)
    pixels = preprocess_frames([wide, wide.transpose(1, 0, 2)], spec("pad", size=8))
    colour = (torch.tensor([10, 120, 230]) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    expected = torch.zeros(3, 8, 8)
    expected[:, 2:6, :] = colour[:, None, None]  # 40 x 20 becomes 8 x 4, two rows above and below
    torch.testing.assert_close(pixels[0], expected)
    torch.testing.assert_close(pixels[1], expected.transpose(1, 2))


def test_a_square_picture_is_the_same_in_every_mode():
    picture = noise(50, 50)
    stretch, crop, pad = (preprocess_frames([picture], spec(mode)) for mode in ("stretch", "crop", "pad"))
    assert torch.equal(stretch, crop) and torch.equal(stretch, pad)


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 28)])
def test_extreme_sizes_give_finite_frames(mode, size):
    pixels = preprocess_frames([noise(*size)], spec(mode))
    assert pixels.shape == (1, 3, 28, 28) and torch.isfinite(pixels).all()


def test_crop_of_a_strip_takes_its_middle_without_resizing_it_whole():
    strip = np.zeros((4, 200_000, 3), dtype=np.uint8)  # resized whole: 28 x 1,400,000 pixels
    strip[:, 100_000 - 20 : 100_000 + 20] = 255
    assert (
        preprocess_frames([strip], spec("crop"))
        == (1 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    ).all()


def test_frames_are_independent_of_each_other_and_of_their_carrier():
    frames = [noise(50, 30, 1), noise(30, 50, 2), noise(28, 28, 3)]
    together = preprocess_frames(frames, spec("pad"))
    for row, frame in zip(together, frames):
        assert torch.equal(row, preprocess_frames([Image.fromarray(frame)], spec("pad"))[0])
    assert together.dtype == torch.float32
    assert preprocess_frames([], spec("pad")).shape == (0, 3, 28, 28)


def test_other_picture_modes_become_rgb():
    grey = Image.fromarray(noise(30, 30)).convert("L")
    assert torch.equal(preprocess_frames([grey], spec("pad")), preprocess_frames([grey.convert("RGB")], spec("pad")))


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("RGB", (0, 5)),
    ],
)
def test_refuses_what_is_no_picture(frame):
    with pytest.raises(ValueError, match=r"frame|picture"):
        preprocess_frames([frame], spec("pad"))


def test_spec_survives_json():
    original = spec("crop", interpolation="bilinear")
    assert ImageSpec.from_dict(json.loads(json.dumps(original.to_dict()))) == original


@pytest.mark.parametrize(
    "change", [{"resize": "squash"}, {"interpolation": "magic"}, {"std": (1.0, 0.0, 1.0)}, {"mean": (0.5,)}]
)
def test_spec_refuses_nonsense(change):
    with pytest.raises(ValueError):
        ImageSpec(**{**spec("pad").to_dict(), **change})


def test_tower_items_count_frames():
    assert tower_items(spec("pad"), MediaKind.VIDEO, 5) == [ItemShape(Grid(5, 4, 4), MediaKind.VIDEO)]


def test_values_come_from_the_arguments_then_the_preprocessor_then_defaults():
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "size": {"shortest_edge": 99}}
    bare = image_spec_from_config(CLIP, None)
    assert bare == ImageSpec(28, "pad", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (4, 4), "bicubic")
    from_file = image_spec_from_config(CLIP, stated, resize="crop")
    assert from_file == ImageSpec(28, "crop", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (4, 4), "bilinear")
    given = image_spec_from_config(CLIP, stated, image_size=42, mean=(0, 0, 0), std=(1, 1, 1))
    assert given == ImageSpec(42, "pad", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (6, 6), "bilinear")
    assert image_spec_from_config(CLIP, {"do_normalize": False}).mean == (0.0, 0.0, 0.0)


def test_timm_networks_carry_their_own_values():
    known = image_spec_from_config(TimmWrapperConfig(architecture="efficientnet_lite0"), None)
    assert (known.image_size, known.patch_grid, known.interpolation) == (224, (7, 7), "bicubic")
    assert known.mean == (0.485, 0.456, 0.406) and known.std == (0.229, 0.224, 0.225)
    carried = {"input_size": [3, 64, 64], "mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}
    own = image_spec_from_config(TimmWrapperConfig(architecture="resnet18", pretrained_cfg=carried), None)
    assert own == ImageSpec(64, "pad", (0.1, 0.1, 0.1), (0.2, 0.2, 0.2), (2, 2), "bilinear")


def test_grid_follows_layer_and_select():
    resnet = TimmWrapperConfig(architecture="resnet18", image_size=64)
    assert image_spec_from_config(resnet, None, layer=-2).patch_grid == (4, 4)
    assert image_spec_from_config(CLIP, None, select="full").patch_grid == (1, 17)
