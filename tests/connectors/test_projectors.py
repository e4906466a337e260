import pytest
import torch
from torch.nn import functional

from sparsevlm.connectors.base import parse_block
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens


def count(spec, input_dim, text_dim):
    with torch.device("meta"):
        module = parse_block(spec).build(input_dim, text_dim)
    return sum(parameter.numel() for parameter in module.parameters())


def tokens_of(features):
    return VisualTokens(features, (Grid(1, 1, len(features)),), (MediaKind.IMAGE,), (0,))


# Published counts of mlp2x_gelu behind CLIP-L/14, width 1024.
@pytest.mark.parametrize(
    "text_dim, parameters", [(2048, 6_295_552), (2560, 9_180_160), (4096, 20_979_712), (5120, 31_467_520)]
)
def test_default_mlp_has_the_parameters_of_llava(text_dim, parameters):
    assert count({"type": "mlp"}, 1024, text_dim) == parameters


def test_linear_parameters():
    assert count({"type": "linear"}, 10, 7) == 77
    assert count({"type": "linear", "bias": False, "dim": 5}, 10, 7) == 50


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, ["Linear", "GELU", "Linear"]),
        ({"depth": 1}, ["Linear"]),
        ({"depth": 3, "activation": "silu"}, ["Linear", "SiLU", "Linear", "SiLU", "Linear"]),
        ({"norm": "pre"}, ["LayerNorm", "Linear", "GELU", "Linear"]),
        ({"norm": "post"}, ["Linear", "LayerNorm", "GELU", "Linear", "LayerNorm"]),  # Yi-VL
    ],
)
def test_mlp_layers_in_order(options, names):
    module = parse_block({"type": "mlp", **options}).build(6, 4)
    assert [type(layer).__name__ for layer in module.layers] == names


def test_mlp_widths():
    module = parse_block({"type": "mlp", "depth": 3, "hidden_dim": 9, "dim": 5}).build(6, 4)
    shapes = [tuple(layer.weight.shape) for layer in module.layers if hasattr(layer, "weight")]
    assert shapes == [(9, 6), (9, 9), (5, 9)]
    assert parse_block({"type": "mlp", "dim": 5}).output_dim(6, 4) == 5
    assert parse_block({"type": "mlp"}).output_dim(6, 4) == 4


def test_mlp_computes_llavas_formula():
    module = parse_block({"type": "mlp"}).build(6, 4)
    state = module.state_dict()
    assert sorted(state) == ["layers.0.bias", "layers.0.weight", "layers.2.bias", "layers.2.weight"]
    x = torch.randn(5, 6)
    hidden = x @ state["layers.0.weight"].T + state["layers.0.bias"]
    expected = functional.gelu(hidden) @ state["layers.2.weight"].T + state["layers.2.bias"]
    torch.testing.assert_close(module(tokens_of(x)).features, expected)


def test_linear_is_a_matrix():
    module = parse_block({"type": "linear"}).build(6, 4)
    x = torch.randn(5, 6)
    torch.testing.assert_close(module(tokens_of(x)).features, x @ module.linear.weight.T + module.linear.bias)


@pytest.mark.parametrize("bad", [{"depth": 0}, {"norm": "batch"}, {"activation": "gleu"}, {"dim": 0}, {"width": 3}])
def test_mlp_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        parse_block({"type": "mlp", **bad})


def test_swiglu_mlp_computes_cogvlms_formula():
    module = parse_block({"type": "swiglu_mlp", "hidden_dim": 7, "bias": True}).build(6, 4)
    state = module.state_dict()
    x = torch.randn(5, 6)

    def linear(name, value):
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    u = linear("linear_proj", x)
    u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    u = u * state["norm1.weight"] + state["norm1.bias"]
    u = u * (1 + torch.erf(u / 2**0.5)) / 2
    gate = linear("gate_proj", u)
    expected = linear("dense_4h_to_h", gate * gate.sigmoid() * linear("dense_h_to_4h", u))
    torch.testing.assert_close(module(tokens_of(x)).features, expected)


def test_swiglu_mlp_has_the_parameters_of_cogvlm():
    # 1792 -> 4096, its norm, and three matrices of 4096 x 11008
    assert count({"type": "swiglu_mlp", "hidden_dim": 11008}, 1792, 4096) == 142_614_528
