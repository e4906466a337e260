"""Upcycling preserves the function for every FFN kind and kernel, and is rebuilt and reloaded from the config."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ArceeConfig,
    AutoModel,
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from sparsevlm.moe.block import SparseMoeBlock, initialize_moe, install_moe
from sparsevlm.moe.ffn import read_layout
from sparsevlm.moe.losses import load_balancing_loss
from sparsevlm.moe.router import collect_router_logits
from sparsevlm.moe.upcycle import measure_difference, upcycle_language_model, upcycle_model

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama_bias": lambda: LlamaConfig(**SIZES, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=4),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "phi": lambda: PhiConfig(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "gemma": lambda: GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "stablelm": lambda: StableLmConfig(**SIZES, num_key_value_heads=4),
    "starcoder2": lambda: Starcoder2Config(**SIZES),
    "arcee": lambda: ArceeConfig(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "misaligned": lambda: LlamaConfig(**{**SIZES, "intermediate_size": 42}),
}


def spec(**changes: Any) -> Any:
    fields = {
        "layers": "alternate",
        "experts": 4,
        "top_k": 2,
        "router_init_std": 0.02,
        "aux_loss_coef": 0.01,
        "experts_implementation": "grouped_mm",
    }
    return SimpleNamespace(**(fields | changes))


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():  # biases start at zero, and would hide a mistake
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def hidden(model: Any) -> Tensor:
    torch.manual_seed(1)
    return model(torch.randint(0, 50, (2, 9))).last_hidden_state


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_upcycling_preserves_the_function(name: str, kernel: str) -> None:
    model = build(name)
    before = hidden(model).detach()
    _, report = upcycle_language_model(model, model.config, spec(experts_implementation=kernel))
    difference = measure_difference(lambda: before, lambda: hidden(model))
    assert difference <= 1e-5
    assert report.max_ffn_difference is not None
    assert report.max_ffn_difference <= 1e-5
    assert model.config._experts_implementation == report.experts_implementation
    assert report.experts_implementation == ("eager" if (name, kernel) == ("misaligned", "grouped_mm") else kernel)
    assert float(before.abs().max()) > 0.5  # the bound above means something


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_any_top_k_preserves_the_function(top_k: int) -> None:
    model = build("llama")
    before = hidden(model).detach()
    upcycle_language_model(model, model.config, spec(top_k=top_k, layers="all", router_init_std=1.0))
    assert measure_difference(lambda: before, lambda: hidden(model)) <= 1e-5


def test_bfloat16_preserves_within_rounding() -> None:
    model = build("llama").bfloat16()
    before = hidden(model).detach()
    upcycle_language_model(model, model.config, spec(layers="all"))
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    # Hidden states reach 3.5; two units in the last place there.
    assert measure_difference(lambda: before, lambda: hidden(model)) <= 0.0625


def test_configuration_and_report() -> None:
    model = build("llama")
    moe, report = upcycle_language_model(model, model.config, spec())
    assert [isinstance(layer.mlp, SparseMoeBlock) for layer in model.layers] == [True, False, True]
    assert moe["layers"] == [0, 2]
    assert (moe["num_experts"], moe["num_experts_per_tok"], moe["router_aux_loss_coef"]) == (4, 2, 0.01)
    config = model.config  # what trl's SFTTrainer looks for
    assert (config.num_experts, config.num_experts_per_tok, config.router_aux_loss_coef) == (4, 2, 0.01)
    assert config.output_router_logits is True
    ffn, router = 3 * 32 * 48, 4 * 32
    assert report.layers == (0, 2)
    assert report.parameters_after - report.parameters_before == 2 * (3 * ffn + router)
    assert report.parameters_activated - report.parameters_before == 2 * (ffn + router)
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())


def test_router_depends_on_the_seed_alone_and_experts_are_equal() -> None:
    blocks = []
    for seed in (7, 7, 8):
        model = build("llama")
        torch.manual_seed(seed * 100)  # the global generator must not matter
        upcycle_language_model(model, model.config, spec(), seed=seed)
        blocks.append(model.layers[2].mlp)
    same, again, other = (block.gate.weight for block in blocks)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert not torch.equal(other, model.layers[0].mlp.gate.weight)  # each layer has its own
    experts = blocks[0].experts.gate_up_proj
    assert all(torch.equal(experts[0], experts[e]) for e in range(1, 4))
    wide = build("llama")
    upcycle_language_model(wide, wide.config, spec(router_init_std=0.5))
    assert float(wide.layers[0].mlp.gate.weight.detach().std()) == pytest.approx(0.5, rel=0.2)


def test_training_modes_and_gradients_stay() -> None:
    model = build("llama").train()
    upcycle_language_model(model, model.config, spec())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_upcycling_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIGS["llama"]())
    _, report = upcycle_language_model(model, model.config, spec())
    assert report.max_ffn_difference is None
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())


class DoublingMlp(nn.Module):
    """Looks like Llama's FFN, computes twice as much."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        for name, child in old.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # pyright: ignore


def test_an_ffn_that_does_more_than_it_shows_is_refused() -> None:
    model = build("llama")
    model.layers[2].mlp = DoublingMlp(model.layers[2].mlp)
    with pytest.raises(ValueError, match="layer 2: experts copied from DoublingMlp differ"):
        upcycle_language_model(model, model.config, spec())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda mlp: mlp.add_module("norm", nn.LayerNorm(32)), r"also holds norm \(LayerNorm\)"),
        (lambda mlp: mlp.add_module("down_proj", nn.Linear(48, 31)), "'down_proj': '31x48'"),
        (lambda mlp: mlp.__delattr__("gate_proj") or mlp.__delattr__("up_proj"), "it has 1 projections"),
        (lambda mlp: mlp.add_module("act_fn", nn.Tanh()), "activation 'silu' but the FFN holds Tanh"),
        (
            lambda mlp: mlp.add_module("left_proj", mlp._modules.pop("gate_proj")),
            "do not tell the gate from the up projection",
        ),
    ],
)
def test_unknown_ffns_are_refused_by_what_was_found(edit: Any, message: str) -> None:
    model = build("llama")
    edit(model.layers[0].mlp)
    with pytest.raises(ValueError, match=message):
        read_layout(model.layers[0].mlp, model.config)


def test_other_layouts_are_refused() -> None:
    bloom = AutoModel.from_config(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match=r"forward takes \['hidden_states', 'residual'\]"):
        upcycle_language_model(bloom, bloom.config, spec())
    opt = AutoModel.from_config(
        OPTConfig(
            vocab_size=50,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    )
    with pytest.raises(ValueError, match=r"no submodule 'mlp'; it has .*'fc1', 'fc2'"):
        upcycle_language_model(opt, opt.config, spec())


def test_a_sparse_model_is_not_upcycled_again() -> None:
    model = build("llama")
    upcycle_language_model(model, model.config, spec())
    with pytest.raises(ValueError, match="already has MoE layers"):
        upcycle_language_model(model, model.config, spec())


class OuterConfig(PreTrainedConfig):
    model_type = "moe_test_outer"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(self, text_config: Any = None, moe: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.text_config = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config or LlamaConfig()
        self.moe = moe
        super().__init__(**kwargs)


class Inner(PreTrainedModel):
    """As the VLM does it: a dense decoder, made sparse in `__init__` as the config says."""

    config_class = OuterConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.moe is not None:
            install_moe(self.language_model, config.text_config, config.moe)
        self.post_init()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        initialize_moe(self)


class Outer(PreTrainedModel):
    config_class = OuterConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Inner(config)
        self.post_init()

    def initialize_weights(self) -> None:
        super().initialize_weights()
        initialize_moe(self)


def outer() -> Any:
    torch.manual_seed(0)
    model = Outer(OuterConfig(CONFIGS["llama"]())).eval()
    upcycle_model(model, spec())
    with torch.no_grad():  # experts that differ, as after training
        for block in moe_blocks(model):
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def moe_blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, SparseMoeBlock)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    model = outer().to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = Outer.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert "model.language_model.layers.2.mlp.experts.gate_up_proj" in state
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert loaded.config.text_config._experts_implementation == "grouped_mm"  # not in config.json: from `moe`
    if dtype == torch.float32:  # `.to(bfloat16)` above also rounded the rotary frequencies, which loading does not
        assert torch.equal(hidden(loaded.eval().model.language_model), hidden(model.model.language_model))


def test_weights_that_a_checkpoint_lacks_are_drawn_not_garbage(tmp_path: Path) -> None:
    """from_pretrained builds on the meta device and leaves missing weights uninitialised; the blocks fill theirs."""
    from safetensors.torch import load_file, save_file

    outer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    gate, experts = (
        "model.language_model.layers.0.mlp.gate.weight",
        "model.language_model.layers.2.mlp.experts.down_proj",
    )
    kept = weights["model.language_model.layers.2.mlp.experts.gate_up_proj"].clone()
    save_file({name: value for name, value in weights.items() if name not in (gate, experts)}, path, {"format": "pt"})
    loaded, info = Outer.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {gate, experts}
    assert float(loaded.state_dict()[gate].std()) == pytest.approx(0.02, rel=0.3)
    assert float(loaded.state_dict()[experts].std()) == pytest.approx(0.2, rel=0.1)
    assert torch.equal(loaded.state_dict()["model.language_model.layers.2.mlp.experts.gate_up_proj"], kept)


def test_fresh_blocks_keep_their_own_initialisation() -> None:
    """The outer post_init runs over everything again."""
    moe = {"layers": [1], "num_experts": 4, "num_experts_per_tok": 2, "router_init_std": 0.5}
    torch.manual_seed(0)
    (block,) = moe_blocks(Outer(OuterConfig(CONFIGS["llama"](), moe)))
    assert float(block.gate.weight.detach().std()) == pytest.approx(0.5, rel=0.3)
    assert float(block.experts.gate_up_proj.detach().std()) == pytest.approx(0.2, rel=0.1)


def test_rebuilt_on_the_meta_device_with_the_same_shapes() -> None:
    model = outer()
    config = copy.deepcopy(model.config)
    config.text_config._experts_implementation = None
    with torch.device("meta"):
        empty = Outer(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in empty.state_dict().items()} == shapes
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"layers": [0], "num_experts": 4}, "lacks num_experts_per_tok"),
        ({"layers": [7], "num_experts": 4, "num_experts_per_tok": 2}, "between 0 and 2"),
        (
            {"layers": [0], "num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "magic"},
            "unknown experts implementation 'magic'",
        ),
    ],
)
def test_install_refuses_what_does_not_fit(moe: dict[str, Any], message: str) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        install_moe(model, model.config, moe)


def test_auxiliary_loss_trains_routers_alike_with_gradient_checkpointing() -> None:
    """A whole decoder: transformers' own checkpointing, loss through hidden states and router logits."""
    model = outer().model.language_model.train()
    ids = torch.randint(0, 50, (2, 9))

    def gradients() -> dict[str, Tensor]:
        with collect_router_logits() as collected:
            output = model(ids, use_cache=False).last_hidden_state
        assert [logits.shape for logits in collected] == [(18, 4)] * 2
        loss = output.square().mean() + load_balancing_loss(collected, 2)
        names = dict(model.named_parameters())
        return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0, msg=name)
    assert all(float(plain[name].abs().max()) > 1e-4 for name in plain if name.endswith("gate.weight"))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        gradients()
