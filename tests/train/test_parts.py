"""Parts: every parameter in one place, what trains, at which rate, how many."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsevlm.adapters.attach import attach
from sparsevlm.model.build import build_model
from sparsevlm.moe.upcycle import upcycle_model
from sparsevlm.recipe.adapter import Lora
from sparsevlm.recipe.schema import Optim, Upcycle
from sparsevlm.train.parts import (
    PARTS,
    ROWS,
    count_parameters,
    is_trained,
    learning_rate,
    parameter_groups,
    parts_of,
    select_trainable,
)
from tests import tiny


def upcycled(model: Any, **fields: Any) -> Any:
    upcycle_model(model, Upcycle(**{"layers": "alternate", "experts": 4, "top_k": 2, **fields}))
    return model


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", ("vision",)),
        ("model.connector.0.layers.0.weight", ("connector.projector", "connector")),
        ("model.connector.0.norm.weight", ("connector.projector", "connector")),
        ("model.connector.0.qformer_queries.weight", ("connector.qformer", "connector")),
        ("model.connector.0.qformer.qformer_norm.bias", ("connector.qformer", "connector")),
        ("model.connector.1.qformer.qformer.encoder.layer.0.output.dense.bias", ("connector.qformer", "connector")),
        ("model.language_model.embed_tokens.weight", ("embeddings", "language")),
        ("model.language_model.wte.weight", ("embeddings", "language")),
        ("lm_head.weight", ("embeddings", "language")),
        ("lm_head.bias", ("embeddings", "language")),
        ("model.language_model.layers.2.mlp.gate.weight", ("moe.router", "moe", "language")),
        ("model.language_model.layers.2.mlp.gate.e_score_correction_bias", ("moe.router", "moe", "language")),
        ("model.language_model.layers.2.mlp.experts.gate_up_proj", ("moe.experts", "moe", "language")),
        ("model.language_model.layers.2.mlp.shared_expert.gate_proj.weight", ("moe.experts", "moe", "language")),
        ("model.language_model.layers.2.mlp.shared_expert_gate.weight", ("moe.router", "moe", "language")),
        ("model.language_model.layers.2.mlp.coefficient.bias", ("moe.router", "moe", "language")),
        ("model.language_model.layers.2.mlp.gate_proj.weight", ("ffn", "language")),
        ("model.language_model.layers.2.mlp.c_fc.bias", ("ffn", "language")),
        ("model.language_model.layers.2.self_attn.q_proj.weight", ("language",)),
        ("model.language_model.norm.weight", ("language",)),
        ("module.model.connector.0.weight", ("connector.projector", "connector")),
    ],
)
def test_parts_of(name: str, parts: tuple[str, ...]) -> None:
    assert parts_of(name) == parts


def test_a_foreign_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.projector\.weight"):
        parts_of("model.projector.weight")


@pytest.mark.parametrize("language", ["llama", "gpt_neox", "phi", "qwen2"])
def test_every_parameter_of_a_model_has_a_part(language: str, tmp_path: Any) -> None:
    model, _ = build_model(tiny.recipe_model(tiny.save_parts(tmp_path, language=language)))
    found = {part for name, _ in model.named_parameters() for part in parts_of(name)}
    assert found == {"vision", "connector", "connector.projector", "language", "embeddings", "ffn"}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        assert ("embeddings" in parts_of(name)) == (
            parameter is embedding or parameter is head or name == "lm_head.bias"
        ), name


@pytest.mark.parametrize(
    "trains",
    [
        ["connector"],
        ["connector", "language"],
        ["moe"],
        ["embeddings", "vision"],
        ["ffn", "moe", "connector"],
        ["moe.router"],
        ["moe.experts", "moe.router"],
        ["language", "moe.experts"],
    ],
)
def test_select_trainable_sets_exactly_the_named_parts(tiny_model: Any, trains: list[str]) -> None:
    model = upcycled(tiny_model[0])
    report = select_trainable(model, trains)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_trained(name, trains)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    absent = ("adapter", "fusion")
    expected = [part for part in PARTS if (part in ROWS or part in trains) and part not in absent]
    if {"moe.router", "moe.experts"} <= set(trains):
        expected.remove("moe")  # nothing is left for it
    assert [row.part for row in report.parts] == expected


def test_a_q_former_and_the_rest_of_a_connector_train_apart(tiny_parts: dict[str, str]) -> None:
    qformer = {"queries": 3, "dim": 8, "layers": 2, "heads": 2, "ff_dim": 12, "vocab_size": 99}
    model, _ = build_model(tiny.recipe_model(tiny_parts, connector=[{"type": "context_token", "qformer": qformer}]))
    optim = Optim(lr=1e-3, part_lr={"connector.qformer": 1e-5})
    apart = [select_trainable(model, [f"connector.{part}"], optim) for part in ("qformer", "projector")]
    own = model.model.connector[0].qformer
    assert apart[0].trainable == sum(p.numel() for p in own.parameters())
    both = select_trainable(model, ["connector"], optim)
    assert apart[0].trainable + apart[1].trainable == both.trainable
    assert {row.part: row.lr for row in both.parts if row.trainable} == {"connector": 1e-3, "connector.qformer": 1e-5}


def test_a_frozen_tower_leaves_training_mode_and_a_trained_one_does_not(tiny_model: Any) -> None:
    model, _ = tiny_model
    model.train()
    select_trainable(model, ["connector"])
    assert not any(module.training for module in model.model.vision_tower.modules())
    assert model.model.connector.training
    model.train()
    select_trainable(model, ["vision"])
    assert model.model.vision_tower.training


def test_batch_norms_keep_their_statistics_beside_an_adapter(tiny_model: Any) -> None:
    # an adapter's file does not hold them: what is loaded would not be what was trained (0.1 of logits up to 0.4 after
    # three steps of a ResNet with LoRA on one convolution)
    model, _ = tiny_model
    tower = model.model.vision_tower
    tower.norm = torch.nn.BatchNorm1d(4)
    select_trainable(model.train(), ["vision"])
    assert tower.norm.training
    attach(model, Lora(type="lora", targets=["vision"]))
    select_trainable(model.train(), ["adapter", "connector"])
    assert tower.training
    assert not tower.norm.training


def test_a_part_without_parameters_is_refused(tiny_model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"trains moe.*it has vision, connector, connector.projector, language, embeddings, ffn"
    ):
        select_trainable(tiny_model[0], ["connector", "moe"])


def test_rates_come_from_the_most_specific_part_that_has_one() -> None:
    optim = Optim(lr=1e-3, part_lr={"language": 1e-4, "moe": 1e-5})
    assert learning_rate("model.connector.0.weight", optim) == 1e-3
    assert learning_rate("model.language_model.layers.0.mlp.gate.weight", optim) == 1e-5
    assert learning_rate("lm_head.weight", optim) == 1e-4
    assert learning_rate("model.language_model.norm.weight", optim) == 1e-4


def test_experts_and_routers_have_rates_of_their_own(tiny_model: Any) -> None:
    model = upcycled(tiny_model[0])
    optim = Optim(lr=1e-3, part_lr={"moe.experts": 1e-5})
    report = select_trainable(model, ["moe", "connector"], optim)
    assert {row.part: row.lr for row in report.parts if row.trainable} == {
        "connector": 1e-3, "moe": 1e-3, "moe.experts": 1e-5
    }  # fmt: skip
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, optim)}
    assert rates["moe.experts"] == 1e-5 and rates["moe"] == rates["connector"] == 1e-3


def test_groups_hold_each_trained_parameter_once_with_its_rate_and_decay(tiny_model: Any) -> None:
    model = upcycled(tiny_model[0])
    select_trainable(model, ["vision", "connector", "language"])
    optim = Optim(lr=1e-3, part_lr={"moe": 1e-5, "vision": 2e-6}, weight_decay=0.1)
    groups = parameter_groups(model, optim)
    seen = [id(p) for group in groups for p in group["params"]]
    assert len(seen) == len(set(seen)) == sum(p.requires_grad for p in model.parameters())
    group_of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        assert group["lr"] == learning_rate(name, optim), name
        embedding = "embed" in name and "patch" not in name
        undecayed = parameter.ndim < 2 or name.endswith("bias") or "norm" in name or embedding or "lm_head" in name
        assert group["weight_decay"] == (0.0 if undecayed else 0.1), name


def test_groups_of_a_frozen_model_are_refused(tiny_model: Any) -> None:
    model, _ = tiny_model
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        parameter_groups(model, Optim())


def test_counts_agree_with_a_dense_model_of_top_k_experts(tiny_model: Any) -> None:
    """Activated parameters of top-2 of 4 equal all parameters of a model that has 2 experts, but for the router."""
    model, _ = tiny_model
    dense = count_parameters(model)
    assert dense["total"] == dense["activated"] == sum(p.numel() for p in model.parameters())
    ffn = sum(p.numel() for p in model.model.language_model.layers[0].mlp.parameters())
    upcycled(model, layers=[0], experts=4, top_k=2)
    width = model.config.text_config.hidden_size
    sparse = count_parameters(model)
    assert sparse["total"] == dense["total"] + 3 * ffn + 4 * width
    assert sparse["activated"] == dense["total"] + ffn + 4 * width
    outside = sum(p.numel() for n, p in model.named_parameters() if "vision" in n or "connector" in n)
    assert sparse["language_model"]["total"] == sparse["total"] - outside
    assert sparse["language_model"]["activated"] == sparse["activated"] - outside


def test_counts_on_the_meta_device_are_the_same(tiny_model: Any) -> None:
    from sparsevlm.model.modeling_sparsevlm import SparseVLMForConditionalGeneration

    model = upcycled(tiny_model[0])
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        meta = SparseVLMForConditionalGeneration(config)
    assert count_parameters(meta) == count_parameters(model)


def test_tied_weights_count_once(tmp_path: Any) -> None:
    model, _ = build_model(tiny.recipe_model(tiny.save_parts(tmp_path, tie_word_embeddings=True)))
    counts = count_parameters(model)
    vocabulary, width = model.get_input_embeddings().weight.shape
    untied = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    assert counts["total"] == untied - vocabulary * width
