import copy

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)

from sparsevlm.vision.encoder import (
    encode_frames,
    feature_dim,
    let_resize,
    num_prefix_tokens,
    output_grid,
    vision_subconfig,
)

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 7,
}
# name: (config, prefix tokens, grid at 28 px, width); the numbers by hand from each architecture's definition
TOWERS = {
    "clip": (CLIPVisionConfig(**VIT), 1, (4, 4), 16),
    "siglip": (SiglipVisionConfig(**VIT), 0, (4, 4), 16),
    "vit": (ViTConfig(**VIT), 1, (4, 4), 16),
    "dinov2": (Dinov2Config(**VIT), 1, (4, 4), 16),
    "dinov2_registers": (Dinov2WithRegistersConfig(**VIT, num_register_tokens=3), 4, (4, 4), 16),
    "swin": (
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
        0,
        (8, 8),
        16,
    ),
    "timm_cnn": (TimmWrapperConfig(architecture="resnet18", image_size=64), 0, (2, 2), 512),
    "timm_vit": (
        TimmWrapperConfig(
            architecture="vit_tiny_patch16_224",
            image_size=64,
            model_args={"img_size": 64, "depth": 3, "embed_dim": 24, "num_heads": 2},
        ),
        1,
        (4, 4),
        24,
    ),
    "timm_swin": (
        TimmWrapperConfig(
            architecture="swin_tiny_patch4_window7_224",
            image_size=64,
            model_args={"img_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        ),
        0,
        (8, 8),
        16,
    ),
}


def build(name):
    config = TOWERS[name][0]
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval(), torch.randn(3, 3, config.image_size, config.image_size)


@pytest.mark.parametrize("name", TOWERS)
def test_layout_from_config_alone(name):
    config, prefix, grid, dim = TOWERS[name]
    assert num_prefix_tokens(config) == prefix
    assert output_grid(config, config.image_size) == grid
    assert output_grid(config, config.image_size, select="full") == (
        (1, prefix + grid[0] * grid[1]) if prefix else grid
    )
    assert feature_dim(config) == dim


@pytest.mark.parametrize("name", TOWERS)
def test_features_are_the_grid_in_raster_order(name):
    tower, pixels = build(name)
    _, prefix, (h, w), dim = TOWERS[name]
    with torch.no_grad():
        full = encode_frames(tower, pixels, select="full")
        patch = encode_frames(tower, pixels)
    assert full.shape == (3, prefix + h * w, dim)
    assert patch.shape == (3, h * w, dim)
    torch.testing.assert_close(patch, full[:, prefix:], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov2", "dinov2_registers"])
@pytest.mark.parametrize("layer", [-1, -2, 0, 3])
def test_layer_is_the_hidden_state_of_that_index(name, layer):
    tower, pixels = build(name)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        taken = encode_frames(tower, pixels, layer=layer)
    torch.testing.assert_close(taken, states[layer][:, TOWERS[name][1] :], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_last_layer_is_before_the_final_norm(name):
    tower, pixels = build(name)
    inputs = {}
    tower.post_layernorm.register_forward_hook(lambda module, args, output: inputs.update(x=args[0]))
    with torch.no_grad():
        taken = encode_frames(tower, pixels, select="full")
    expected = inputs["x"] if name == "siglip" else inputs["x"][:, None]  # CLIP norms its CLS token only
    torch.testing.assert_close(taken[:, : expected.shape[1]], expected, rtol=0, atol=0)


def test_raster_order_of_a_cnn():
    tower, pixels = build("timm_cnn")
    with torch.no_grad():
        maps = tower.timm_model.forward_features(pixels)  # (F, C, h, w)
        taken = encode_frames(tower, pixels)
    for y in range(2):
        for x in range(2):
            torch.testing.assert_close(taken[:, 2 * y + x], maps[:, :, y, x], rtol=0, atol=0)


def test_channels_last_network():
    tower, pixels = build("timm_swin")
    with torch.no_grad():
        maps = tower.timm_model.forward_features(pixels)  # (F, h, w, C)
        taken = encode_frames(tower, pixels)
    torch.testing.assert_close(taken, maps.flatten(1, 2), rtol=0, atol=0)


def test_timm_layers_are_its_intermediates():
    tower, pixels = build("timm_vit")
    with torch.no_grad():
        final, blocks = tower.timm_model.forward_intermediates(pixels, output_fmt="NLC")
        for layer in (-2, 0, 1):
            torch.testing.assert_close(encode_frames(tower, pixels, layer), blocks[layer], rtol=0, atol=0)
        together = encode_frames(tower, pixels, [-1, 0, -2])
    torch.testing.assert_close(together, torch.cat([final[:, 1:], blocks[0], blocks[1]], -1), rtol=0, atol=0)
    assert feature_dim(tower.config, [-1, 0, -2]) == 72


def test_stage_of_a_cnn_has_its_own_grid_and_width():
    config = TOWERS["timm_cnn"][0]
    assert output_grid(config, 64, layer=-2) == (4, 4)
    assert feature_dim(config, -2) == 256
    tower, pixels = build("timm_cnn")
    with torch.no_grad():
        assert encode_frames(tower, pixels, -2).shape == (3, 16, 256)
    with pytest.raises(ValueError, match=r"4x4 .* 2x2 .*cannot be concatenated"):
        encode_frames(tower, pixels, [-2, -1])
    with pytest.raises(ValueError, match="cannot be concatenated"):
        output_grid(config, 64, layer=[-2, -1])


def test_list_of_layers_concatenates_features():
    tower, pixels = build("clip")
    with torch.no_grad():
        together = encode_frames(tower, pixels, [-2, 1, -1])
        apart = [encode_frames(tower, pixels, layer) for layer in (-2, 1, -1)]
    torch.testing.assert_close(together, torch.cat(apart, -1), rtol=0, atol=0)
    assert feature_dim(tower.config, [-2, 1, -1]) == 48


@pytest.mark.parametrize("name", ["clip", "dinov2_registers", "timm_cnn"])
def test_chunks_do_not_change_the_result(name):
    tower, pixels = build(name)
    with torch.no_grad():
        whole = encode_frames(tower, pixels)
        for chunk in (1, 2, 3, 8):
            torch.testing.assert_close(encode_frames(tower, pixels, chunk=chunk), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov2"])
def test_other_sizes_interpolate_positions(name):
    tower, _ = build(name)
    with torch.no_grad():
        assert encode_frames(tower, torch.randn(1, 3, 42, 42)).shape == (1, 36, 16)
    assert output_grid(tower.config, 42) == (6, 6)


def test_gradient_reaches_the_pixels_and_the_tower():
    tower, pixels = build("clip")
    pixels.requires_grad_()
    encode_frames(tower, pixels, -2, chunk=2).square().sum().backward()
    assert torch.isfinite(pixels.grad).all() and pixels.grad.abs().sum() > 0
    layers = tower.encoder.layers
    assert all(parameter.grad is not None for parameter in layers[1].parameters())
    assert all(parameter.grad is None for parameter in layers[2].parameters())  # -2 is before the last block


def test_pixels_are_cast_to_the_towers_dtype():
    tower, pixels = build("clip")
    assert encode_frames(tower.bfloat16(), pixels).dtype == torch.bfloat16


def test_faults_name_the_layers_there_are():
    config = TOWERS["clip"][0]
    with pytest.raises(ValueError, match=r"\[9\].*4 hidden states \(0 to 3"):
        feature_dim(config, 9)
    with pytest.raises(ValueError, match=r"\[7\].*5 feature layers"):
        feature_dim(TOWERS["timm_cnn"][0], 7)
    with pytest.raises(ValueError, match=r"cannot take 80 x 80 pictures.*dynamic_img_size"):
        output_grid(TOWERS["timm_vit"][0], 80)
    with pytest.raises(ValueError, match="name at least one"):
        feature_dim(config, [])


def test_vision_part_of_a_composite_config():
    composite = CLIPConfig(vision_config=VIT)
    assert vision_subconfig(composite).model_type == "clip_vision_model"
    assert vision_subconfig(composite).hidden_size == 16
    alone = TOWERS["clip"][0]
    assert vision_subconfig(alone) is alone


def test_probe_leaves_the_config_and_the_random_state_alone():
    config = CLIPVisionConfig(**VIT, initializer_range=0.03)
    before, state = config.to_dict(), torch.get_rng_state()
    feature_dim(config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "grid", "dim"), [("timm_vit", (5, 5), 24), ("timm_swin", (10, 10), 16)])
def test_towers_of_timm_are_let_take_other_sizes(name, grid, dim):
    config = copy.deepcopy(TOWERS[name][0])
    tower, pixels = build(name)
    let_resize(config)
    let_resize(config)  # once more changes nothing
    assert config.model_args == {**TOWERS[name][0].model_args, "dynamic_img_size": True}
    assert output_grid(config, 80) == grid
    other = AutoModel.from_config(config).eval()
    other.load_state_dict(tower.state_dict())  # positions keep their shape, so published weights fit
    with torch.no_grad():
        assert torch.equal(encode_frames(other, pixels), encode_frames(tower, pixels))
        assert encode_frames(other, torch.randn(1, 3, 80, 80)).shape == (1, grid[0] * grid[1], dim)


@pytest.mark.parametrize("name", ["timm_cnn", "clip"])
def test_other_towers_are_left_as_they_are(name):
    config = copy.deepcopy(TOWERS[name][0])
    let_resize(config)
    assert config.to_dict() == TOWERS[name][0].to_dict()
