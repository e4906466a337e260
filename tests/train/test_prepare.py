"""The model that a stage starts from: ways to upcycle, on files as a run finds them; and whether rows are packed."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, OPTConfig

from sparsevlm.model.build import build_model, load_model
from sparsevlm.moe.ffn import expert_weights, read_layout
from sparsevlm.recipe.load import load_recipe
from sparsevlm.train import prepare
from sparsevlm.train.checkpoints import mark_complete
from sparsevlm.train.data import is_packed
from tests.train.runs import write_recipe


def recipe_of(directory: Path, parts: dict[str, str], upcycle: dict[str, Any], **model: Any) -> Any:
    """A recipe whose only stage upcycles layer 1 of the tiny decoder, read as a run reads it."""
    fields = {"layers": [1], "experts": 2, "top_k": 1, **upcycle}
    recipe = load_recipe(write_recipe(directory, parts, only=["moe"], stage={"upcycle": fields}))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})


def start(recipe: Any) -> tuple[Any, str]:
    """The model of the stage, and what was printed."""
    from rich.console import Console

    out = io.StringIO()
    model, _ = prepare.start_model(recipe, "moe", None, Console(file=out, width=1000))
    return model, out.getvalue()


def fine_tuned(directory: Path, parts: dict[str, str], count: int, **changes: Any) -> list[str]:
    """Copies of the language model, each with other weights."""
    paths = []
    for i in range(count):
        model = AutoModelForCausalLM.from_pretrained(parts["language"])
        torch.manual_seed(100 + i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        for name, value in changes.items():
            setattr(model.config, name, value)
        path = directory / f"branch{i}"
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(parts["language"]).save_pretrained(path)
        paths.append(str(path))
    return paths


def decoder_weights(path: str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


@pytest.mark.parametrize(
    ("upcycle", "answer"),
    [
        ({"granularity": 2, "shared_expert": "residual"}, "is function-preserving: of every shard one copy"),
        ({"shared_expert": "gated", "router": {"init": "kmeans"}}, "is function-preserving: equal experts"),
        ({"drop_ratio": 0.5}, "is not function-preserving: hidden units start afresh"),
        ({"router": {"norm_topk_prob": False}}, "is not function-preserving: the weights of the chosen experts"),
    ],
    ids=str,
)
def test_the_difference_is_measured_and_said(
    tmp_path: Path, parts: dict[str, str], upcycle: dict[str, Any], answer: str
) -> None:
    model, printed = start(recipe_of(tmp_path, parts, upcycle))
    assert model.config.moe["layers"] == [1]
    assert f"the start {answer}" in printed
    difference = float(printed.split("dense model's by ")[1].split()[0])
    assert (difference <= 1e-6) == ("is function" in answer)


def test_a_kernel_for_gpus_is_kept_for_training_and_not_asked_to_compare(tmp_path: Path, parts: dict[str, str]) -> None:
    model, printed = start(recipe_of(tmp_path, parts, {"experts_implementation": "megablocks"}))
    assert "(megablocks)" in printed and "is function-preserving" in printed
    assert model.config.text_config._experts_implementation == "megablocks"


def test_the_clustered_router_depends_on_the_data_and_is_written_for_sharded_ranks(
    tmp_path: Path, parts: dict[str, str]
) -> None:
    recipe = recipe_of(tmp_path, parts, {"router": {"init": "kmeans", "init_std": 0.3}, "granularity": 2})
    from rich.console import Console

    console = Console(file=io.StringIO())
    model, _ = start(recipe)
    gate = model.model.language_model.layers[1].mlp.gate.weight.detach()
    torch.testing.assert_close(gate.square().mean(1).sqrt(), torch.full((4,), 0.3))
    assert torch.equal(gate[0], gate[1])
    assert not torch.equal(gate[1], gate[2])
    directory = prepare.save_start(recipe, "moe", None, tmp_path / "stage", console)
    saved = load_model(directory, torch.float32)[0].state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_language_models_become_experts_and_their_mean_all_else(
    tmp_path: Path, parts: dict[str, str], tied: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests import tiny

    if tied:
        parts = tiny.save_parts(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)
    paths = fine_tuned(tmp_path, parts, 2)
    # Placeholders that the language models' vocabulary does not have: our rows for them stay.
    names = {"image_token": "<img>", "video_token": "<vid>"}
    plain_recipe = recipe_of(tmp_path, parts, {}, **names)
    torch.manual_seed(plain_recipe.seed)  # of the connector and the new rows
    plain, _ = build_model(plain_recipe.model)
    model, printed = start(recipe_of(tmp_path, parts, {"experts_from": paths}, **names))
    assert "all other weights are their mean, but for model.vision_tower, model.connector, which they do not" in printed
    assert "is not function-preserving: experts and all other weights come from other models" in printed

    before, after, branches = plain.state_dict(), model.state_dict(), [decoder_weights(path) for path in paths]
    rows = len(branches[0]["lm_head.weight"])
    assert len(after["lm_head.weight"]) == rows + 2
    checked = 0
    for name, first in branches[0].items():
        ours = "lm_head.weight" if name == "lm_head.weight" else "model.language_model." + name.removeprefix("model.")
        if ours not in after:
            assert ".layers.1.mlp." in ours
            continue
        mean = (first + branches[1][name]) / 2
        torch.testing.assert_close(after[ours][: len(mean)], mean, rtol=0, atol=1e-7)
        torch.testing.assert_close(after[ours][len(mean) :], before[ours][len(mean) :], rtol=0, atol=1e-7)
        checked += 1
    assert checked == len(branches[0]) - 3
    for name in before:
        if not name.startswith(("model.language_model.", "lm_head.")):
            assert torch.equal(after[name], before[name])
    experts = model.model.language_model.layers[1].mlp.experts
    for e, path in enumerate(paths):
        branch = AutoModelForCausalLM.from_pretrained(path).model
        ffn = branch.layers[1].mlp
        for name, weight in expert_weights(ffn, read_layout(ffn, branch.config)).items():
            assert torch.equal(experts.get_parameter(name)[e], weight)
    if tied:
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_branch_with_a_head_of_its_own_is_no_branch_of_a_tied_model(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its head would else take the place of the shared embedding."""
    from tests import tiny

    parts = tiny.save_parts(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)
    good, other = fine_tuned(tmp_path, parts, 2)
    model = AutoModelForCausalLM.from_pretrained(other, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=rf"{other} does not fit .*lm_head.weight and .* are one tied weight here"):
        start(recipe_of(tmp_path, parts, {"experts_from": [good, other]}))


def test_models_of_ours_become_experts_with_tower_and_connector(tmp_path: Path, parts: dict[str, str]) -> None:
    recipe = recipe_of(tmp_path, parts, {})
    paths, states = [], []
    for i in range(2):
        model, processor = build_model(recipe.model)
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"ours{i}")
        processor.save_pretrained(tmp_path / f"ours{i}")
        paths.append(str(tmp_path / f"ours{i}"))
        states.append(model.state_dict())
    model, printed = start(recipe_of(tmp_path, parts, {"experts_from": paths}))
    assert "all other weights are their mean\n" in printed
    for name, value in model.state_dict().items():
        if ".layers.1.mlp." not in name and value.is_floating_point():
            torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, rtol=0, atol=1e-7)
    # The same model E times over is that model.
    same, printed = start(recipe_of(tmp_path, parts, {"experts_from": [paths[0]] * 2}))
    dense = load_model(paths[0], torch.float32)[0]
    ids = torch.arange(8, 16)[None]
    torch.testing.assert_close(same.eval()(ids).logits, dense.eval()(ids).logits, rtol=0, atol=1e-5)
    assert "is not function-preserving" in printed  # of the stage's own model, which is another


def test_what_is_no_branch_is_refused_before_it_is_loaded(
    tmp_path: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, other = fine_tuned(tmp_path, parts, 2)
    monkeypatch.setattr("sparsevlm.train.branches._load", lambda *_: pytest.fail("weights were read"))
    config = LlamaConfig.from_pretrained(other)
    config.num_attention_heads, config.hidden_act = 2, "gelu"
    config.save_pretrained(other)
    with pytest.raises(ValueError, match=rf"{other} is no branch .*num_attention_heads 2 \(here 4\).*hidden_act gelu"):
        start(recipe_of(tmp_path, parts, {"experts_from": [good, other]}))
    start(recipe_of(tmp_path, parts, {}))[0].save_pretrained(tmp_path / "sparse")
    with pytest.raises(ValueError, match="sparse is sparse already"):
        start(recipe_of(tmp_path, parts, {"experts_from": [good, str(tmp_path / "sparse")]}))
    with pytest.raises(ValueError, match="no configuration for part"):
        start(recipe_of(tmp_path, parts, {"experts_from": [good, str(tmp_path / "nothing")]}))


def test_weights_that_do_not_fit_are_named(tmp_path: Path, parts: dict[str, str]) -> None:
    good, other = fine_tuned(tmp_path, parts, 2)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(40)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=r"in 2 weights: lm_head.weight is \(40, 32\) \(here \(\d+, 32\)\)"):
        start(recipe_of(tmp_path, parts, {"experts_from": [good, other]}))
    with pytest.raises(ValueError, match="cannot be loaded as a language model"):
        start(recipe_of(tmp_path, parts, {"experts_from": [good, broken(tmp_path, other)]}))


def broken(directory: Path, path: str) -> str:
    """A directory with a configuration and no weights."""
    LlamaConfig.from_pretrained(path).save_pretrained(directory / "empty")
    return str(directory / "empty")


# ---- packing ---------------------------------------------------------------------------------------------------------


def decoder(kind: str, attention: str) -> Any:
    """A decoder on the meta device: neither its weights nor those of a shard are needed."""
    config: Any = {
        "llama": LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4),
        "opt": OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32),
    }[kind]
    with torch.device("meta"):
        return AutoModel.from_config(config, attn_implementation=attention)


def packing(value: bool | str) -> Any:
    return SimpleNamespace(stages={"s": SimpleNamespace(batch=SimpleNamespace(packing=value))})


@pytest.mark.parametrize(
    ("kind", "attention", "auto", "asked"),
    [
        ("llama", "packed_sdpa", True, True),
        ("llama", "sdpa", False, True),
        ("opt", "packed_sdpa", True, True),
        ("opt", "sdpa", False, None),
    ],
)
def test_rows_are_packed_where_documents_stay_apart(kind: str, attention: str, auto: bool, asked: bool | None) -> None:
    model = decoder(kind, attention)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert is_packed(packing(False), "s", model) is False
    assert is_packed(packing("auto"), "s", model) is auto
    if asked is None:
        with pytest.raises(
            ValueError, match=r"stages.s.batch.packing is true, but OPTModel with .* 'sdpa' .* or .*: packed_sdpa"
        ):
            is_packed(packing(True), "s", model)
    else:
        assert is_packed(packing(True), "s", model) is asked
    assert torch.equal(torch.random.get_rng_state(), state)  # the run's random numbers are its own


def test_a_decoder_that_leaks_with_every_attention_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsevlm.model import isolation

    monkeypatch.setattr(isolation, "isolates_documents", lambda _: False)
    model = decoder("llama", "packed_sdpa")
    assert is_packed(packing("auto"), "s", model) is False
    with pytest.raises(ValueError, match=r"set packing: false$"):
        is_packed(packing(True), "s", model)


def test_an_edited_bfloat16_model_is_what_loading_its_files_gives(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    # `.to(bfloat16)` rounds rotary frequencies too, which are in no file: the stage would train other positions
    model, _ = start(recipe_of(tmp_path, tiny_parts, {}, dtype="bfloat16"))
    model.save_pretrained(tmp_path / "saved")
    loaded: Any = type(model).from_pretrained(tmp_path / "saved")
    assert loaded.dtype == model.dtype == torch.bfloat16
    buffers, want = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert any("inv_freq" in name for name in want)
    assert buffers.keys() == want.keys()
    for name, buffer in want.items():
        assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("left", [prepare.START, prepare.BASE])
def test_what_an_earlier_recipe_left_is_not_trained_on(tiny_parts: dict[str, str], tmp_path: Path, left: str) -> None:
    # killed before the first checkpoint, then 'upcycle' was taken out, or the stage before trains no adapter any more
    from rich.console import Console

    recipe = load_recipe(write_recipe(tmp_path, tiny_parts, only=["align"]))
    parent, stage = tmp_path / "run" / "before", tmp_path / "run" / "align"
    parent.mkdir(parents=True)
    (stage / left).mkdir(parents=True)
    mark_complete(stage / left, {"stage": "align"})
    assert prepare.prepared_start(stage, parent) == stage / left
    assert prepare.save_start(recipe, "align", parent, stage, Console(file=io.StringIO())) == parent
    assert prepare.prepared_start(stage, parent) == parent
