"""Layer surgery: finding decoder layers, choosing and replacing."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig

from sparsevlm.surgery import decoder_layers, replace_submodules, resolve_layers

LLAMA = LlamaConfig(
    vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, head_dim=8
)


def test_decoder_layers_with_and_without_head() -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    assert decoder_layers(model) is model.model.layers
    assert decoder_layers(model.model) is model.model.layers
    gpt2 = AutoModel.from_config(GPT2Config(vocab_size=20, n_embd=16, n_layer=3, n_head=2))
    assert decoder_layers(gpt2) is gpt2.h


def test_decoder_layers_prefers_the_outer_list() -> None:
    """A list of as many heads inside every layer must not be taken for the layers."""
    model = AutoModel.from_config(LLAMA)
    for layer in model.layers:
        layer.extra = nn.ModuleList(nn.Identity() for _ in range(3))
    assert decoder_layers(model) is model.layers


def test_decoder_layers_refuses_what_it_cannot_tell() -> None:
    model = AutoModel.from_config(LLAMA)
    model.others = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ValueError, match="others"):
        decoder_layers(model)
    with pytest.raises(ValueError, match="num_hidden_layers=None"):
        decoder_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("choice", "layers", "expected"),
    [
        ("alternate", 24, list(range(0, 24, 2))),
        ("alternate", 5, [0, 2, 4]),
        ("all", 3, [0, 1, 2]),
        ("first_half", 5, [0, 1]),
        ("second_half", 5, [2, 3, 4]),
        ([3, 1], 4, [1, 3]),
    ],
)
def test_resolve_layers(choice: str | list[int], layers: int, expected: list[int]) -> None:
    assert resolve_layers(choice, layers) == expected


@pytest.mark.parametrize("choice", ["every", [4], [-1], [1, 1], [], "first_half"])
def test_resolve_layers_refuses(choice: str | list[int]) -> None:
    with pytest.raises(ValueError, match="layer"):
        resolve_layers(choice, 1 if choice == "first_half" else 4)


def test_replace_submodules_replaces_only_the_chosen() -> None:
    layers = decoder_layers(AutoModel.from_config(LLAMA))
    old = [layer.mlp for layer in layers]
    seen = []

    def factory(index: int, module: nn.Module) -> nn.Module:
        seen.append((index, module))
        return nn.Identity()

    replace_submodules(layers, [0, 2], factory)
    assert seen == [(0, old[0]), (2, old[2])]
    assert [type(layer.mlp) is nn.Identity for layer in layers] == [True, False, True]


def test_replace_submodules_is_all_or_nothing() -> None:
    layers = decoder_layers(AutoModel.from_config(LLAMA))
    del layers[1].mlp
    with pytest.raises(ValueError, match=r"layer 1 .* no submodule 'mlp'; it has \['self_attn'"):
        replace_submodules(layers, [0, 1], lambda index, module: nn.Identity())
    assert not isinstance(layers[0].mlp, nn.Identity)
