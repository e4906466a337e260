"""Several adapters combined on disk give what PEFT's `add_weighted_adapter` gives in memory."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsevlm.cli import app
from sparsevlm.export.merge import merge_adapter
from sparsevlm.export.merge_combine import Combined, make_recipe
from sparsevlm.export.merge_deltas import LowRank
from tests.export import dense, lora, models

SEED = 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    dense.save(dense.text("llama"), directory)
    return directory


@pytest.fixture(scope="module")
def pair(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one rank, of other scalings, on modules that overlap."""
    root = tmp_path_factory.mktemp("pair")
    first = lora.train(llama, root / "a", target_modules=["q_proj", "down_proj"], seed=1)
    second = lora.train(llama, root / "b", target_modules=["q_proj", "up_proj"], lora_alpha=3, seed=2)
    return [first, second]


def merge(adapters: list[Path], base: Path, out: Path, *recipe: Any, check: bool = False, **options: Any) -> Any:
    plan = make_recipe(len(adapters), *recipe, **options)
    return merge_adapter([str(adapter) for adapter in adapters], out, base=str(base), recipe=plan, check=check)


def combine_with_peft(
    base: Path, adapters: list[Path], out: Path, method: str, weights: list[float], **options: Any
) -> Path:
    """Combine and merge in memory; each module's draws are those of the weight's name."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"adapter{i}" for i in range(len(adapters))]
        model: Any = PeftModel.from_pretrained(lora.load_text(base), str(adapters[0]), names[0])
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(str(adapter), name)
        modules = {id(module): name for name, module in model.base_model.model.named_modules()}
        tuner = model.base_model

        def seeded(function: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                (target,) = [arg for arg in args if id(arg) in modules]
                digest = hashlib.sha256(f"{SEED} {modules[id(target)]}.weight".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                return function(*args, **kwargs)

            return run

        for part in ("", "_svd"):
            own = f"{part}_generalized_task_arithmetic_weighted_adapter"
            setattr(tuner, own, seeded(getattr(tuner, own)))
        tuner.add_weighted_adapter(names, weights, "mix", combination_type=method, **options)
        tuner.set_adapter("mix")
        model.merge_and_unload(adapter_names=["mix"]).save_pretrained(out)
    return out


def agree(ours: Path, theirs: Path, base: Path) -> None:
    found, expected, before = lora.weights(ours), lora.weights(theirs), lora.weights(base)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        # Measured: 3e-7 of values below 1, and 1e-6 after an SVD.
        torch.testing.assert_close(
            value, expected[key], rtol=1e-5, atol=5e-6, msg=lambda text, key=key: f"{key} {text}"
        )
    assert sum(not torch.equal(value, before[key]) for key, value in found.items()) >= 9


@pytest.mark.parametrize("weights", [[0.6, 0.4], [1.5, -0.5]], ids=str)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {}),
        ("ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}),
        ("magnitude_prune", {"density": 0.5}),
        ("ties_svd", {"density": 0.2, "svd_rank": 3}),
        ("dare_ties_svd", {"density": 0.7}),
    ],
    ids=str,
)
def test_as_peft_does(
    method: str, options: dict[str, Any], weights: list[float], pair: list[Path], llama: Path, tmp_path: Path
) -> None:
    text: dict[str, Any] = {key: str(value) if key == "svd_rank" else value for key, value in options.items()}
    report = merge(pair, llama, tmp_path / "ours", method, weights, seed=SEED, **text)
    agree(tmp_path / "ours", combine_with_peft(llama, pair, tmp_path / "peft", method, weights, **options), llama)
    assert report.low_rank == 9 and report.method.startswith(f"{method} (weights {weights[0]:g}, {weights[1]:g}")


def test_other_ranks_embeddings_and_layouts(llama: Path, tmp_path: Path) -> None:
    """`cat` and `svd` take other ranks; embeddings are stored in x out, GPT-2's layers too."""
    from transformers import GPT2Config

    first = lora.train(llama, tmp_path / "a", target_modules=["embed_tokens", "q_proj"], r=2, seed=1)
    second = lora.train(llama, tmp_path / "b", target_modules=["embed_tokens", "q_proj"], r=5, seed=2)
    for method in ("cat", "svd"):
        merge([first, second], llama, tmp_path / method, method, [0.3, 0.9])
        peft = combine_with_peft(llama, [first, second], tmp_path / f"peft_{method}", method, [0.3, 0.9])
        found, expected = lora.weights(tmp_path / method), lora.weights(peft)
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=5e-6)
    with pytest.raises(ValueError, match=r"has rank 2, .* has rank 5; --method linear .*: use --method svd, or .* cat"):
        merge([first, second], llama, tmp_path / "out", "linear")
    gpt2 = tmp_path / "gpt2"
    dense.save(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64), gpt2)
    pair = [lora.train(gpt2, tmp_path / f"g{i}", target_modules=["c_attn", "c_fc"], seed=i) for i in range(2)]
    for method in ("cat", "svd"):
        merge(pair, gpt2, tmp_path / f"gpt2_{method}", method, [0.3, 0.9])
        peft = combine_with_peft(gpt2, pair, tmp_path / f"gpt2_peft_{method}", method, [0.3, 0.9])
        found, expected = lora.weights(tmp_path / f"gpt2_{method}"), lora.weights(peft)
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=5e-6)


def test_all_of_the_rank_is_the_method_on_the_changes_themselves() -> None:
    """TIES as its paper has it, element by element: keep the largest, elect a sign, average those that agree."""
    generator = torch.Generator().manual_seed(0)
    parts = tuple(
        LowRank(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator), 0.5, (5, 6))
        for _ in range(3)
    )
    recipe = make_recipe(3, "ties_svd", [1.0, 1.0, 1.0], 0.5, "full")
    got = Combined("w", recipe.weights, parts, recipe).delta().flatten()
    kept = []
    for part in parts:
        values = part.delta().flatten()
        smallest = values.abs().sort(descending=True).values[14]  # half of 30
        kept.append(torch.where(values.abs() >= smallest, values, 0.0))
    for i in range(30):
        column = [float(values[i]) for values in kept]
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [value for value in column if value * sign > 0]
        wanted = sum(agreeing) / max(1, len(agreeing))
        assert abs(float(got[i]) - wanted) < 1e-6, i
    low = make_recipe(3, "ties_svd", [1.0, 1.0, 1.0], 0.5, "5")  # the rank of any such matrix
    torch.testing.assert_close(Combined("w", low.weights, parts, low).delta().flatten(), got, rtol=0, atol=1e-5)


def test_rslora_counts_once(llama: Path, tmp_path: Path) -> None:
    """One adapter with weight 1 is that adapter."""
    adapter = lora.train(llama, tmp_path / "a", target_modules=["q_proj"], use_rslora=True)
    merge([adapter], llama, tmp_path / "mix", "cat", [1.0])
    merge_adapter(str(adapter), tmp_path / "plain", base=str(llama), check=False)
    found, expected = lora.weights(tmp_path / "mix"), lora.weights(tmp_path / "plain")
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def test_the_same_seed_the_same_bytes(pair: list[Path], llama: Path, tmp_path: Path) -> None:
    def run(name: str, seed: int, adapters: list[Path] = pair) -> bytes:
        torch.manual_seed(len(name))  # nothing depends on the caller's
        merge(adapters, llama, tmp_path / name, "dare_ties", [0.6, 0.4], density=0.5, seed=seed)
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = run("first", 1)
    assert run("again once more", 1) == first != run("other", 2)


def test_what_trained_in_full_adds_its_weighted_changes(tmp_path: Path) -> None:
    """Connectors, stacked experts and single weights of an upcycled model; the check looks at the whole."""
    base = models.save(*models.make_model(tmp_path / "parts", upcycle={"layers": "all"}), tmp_path / "base")

    def load(directory: Path) -> Any:
        from sparsevlm.model.build import load_model

        return load_model(directory)[0]

    options: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    }
    first = lora.train(base, tmp_path / "a", load, modules_to_save=["model.connector.0"], **options, seed=1)
    second = lora.train(base, tmp_path / "b", load, modules_to_save=["model.connector.0"], r=6, **options, seed=2)
    third = lora.train(base, tmp_path / "c", load, **options, seed=3)
    weights = [0.5, 0.2, 0.6]
    report = merge([first, second, third], base, tmp_path / "ours", "cat", weights, check=True)
    assert (report.replaced, report.mixed) == (4, 4) and report.check is not None
    assert report.check.difference < 1e-4 < 0.1 < report.check.change
    before, found = lora.weights(base), lora.weights(tmp_path / "ours")
    alone = []
    for adapter in (first, second, third):
        merge_adapter(str(adapter), tmp_path / f"merged_{adapter.name}", base=str(base), check=False)
        alone.append(lora.weights(tmp_path / f"merged_{adapter.name}"))
    for key, value in found.items():
        change = sum(share * (merged[key] - before[key]) for share, merged in zip(weights, alone, strict=True))
        torch.testing.assert_close(value, before[key] + change, rtol=1e-5, atol=2e-6)
    with pytest.raises(
        ValueError, match=r"is a stack of experts, for which PEFT defines no --method ties.*--method cat"
    ):
        merge([first, third], base, tmp_path / "out", "ties", density=0.5)
    assert not (tmp_path / "out").exists()


def test_the_check_finds_a_wrong_combination(
    pair: list[Path], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsevlm.export.shards import ShardWriter

    write = ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", lambda self, key, tensor: write(self, key, tensor * 1.1))
    with pytest.raises(ValueError, match="logits of the merged model differ"):
        merge(pair, llama, tmp_path / "out", check=True)
    assert not (tmp_path / "out").exists()


def test_refusals(pair: list[Path], llama: Path, tmp_path: Path) -> None:
    dora = lora.train(llama, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match=r"dora is a DoRA adapter: .*Merge it alone"):
        merge([pair[0], dora], llama, tmp_path / "out")
    other = tmp_path / "other"
    dense.save(dense.text("llama"), other)
    stranger = lora.train(other, tmp_path / "stranger", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=rf"{pair[0]} was trained on {llama}, but {stranger} on {other}"):
        merge_adapter([str(pair[0]), str(stranger)], tmp_path / "out", check=False)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--method", "mean"], "--method 'mean' is not known; choose one of cat, linear, ties"),
        (["--weights", "1"], "has 1 numbers for 2 adapters"),
        (["--weights", "1;2"], "is no list of numbers"),
        (["--weights", "0,0"], "not all of them zero"),
        (["--method", "ties"], "needs --density"),
        (["--density", "0.5"], "has no meaning for --method cat; it is for ties, dare_linear"),
        (["--method", "ties", "--density", "0"], "out of range"),
        (["--svd-rank", "2"], "--svd-rank has no meaning for --method cat"),
        (["--method", "svd", "--svd-rank", "0"], "is no rank"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(arguments: list[str], match: str, pair: list[Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["merge", *map(str, pair), str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2 and match in " ".join(done.output.split()), done.output


def test_command(pair: list[Path], llama: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["merge", *map(str, pair), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "cat (weights 0.5, 0.5)" in text and "9 merged" in text and f"-> {llama}" in text
    assert "what was written and the same sum in memory differ" in text, "no model with two adapters was beside it"
    alone = CliRunner().invoke(app, ["merge", str(pair[0]), str(tmp_path / "one"), "--method", "ties"])
    assert alone.exit_code == 2 and "combines several adapters" in alone.output
