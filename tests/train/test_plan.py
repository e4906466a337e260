"""Plans against published counts, against models that are built for real, and against simple sums."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sparsevlm.recipe.load import RecipeError, dump_recipe, load_recipe
from sparsevlm.train.media import parse_medium
from sparsevlm.train.plan import plan, print_plan
from sparsevlm.vision.tokens import MediaKind
from tests.train.planned import recipe_of, stage_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
MEDIA = ["640x480", "64f@1280x720"]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are written to be run from there


# -- published numbers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe_llava():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {
            name: plan(load_recipe(f"recipes/moe_llava/{name}.yaml"), MEDIA) for name in ("phi2", "stablelm", "qwen")
        }


# MoE-LLaVA table 1: (dense, activated, total) in billions as printed, and by the paper's formula with the true widths.
@pytest.mark.parametrize(
    ("name", "printed", "formula"),
    [
        ("phi2", (2.7, 3.6, 5.3), (2.7789, 3.6179, 5.2959)),
        ("stablelm", (1.6, 2.0, 2.9), (1.6443, 2.0596, 2.8902)),
        ("qwen", (1.8, 2.2, 3.1), (1.8367, 2.2426, 3.0543)),
    ],
)
def test_language_model_counts_are_the_papers(moe_llava, name, printed, formula):
    dense = stage_of(moe_llava[name], "instruct")["parameters"]["language_model"]
    sparse = stage_of(moe_llava[name], "moe")["parameters"]["language_model"]
    assert dense["total"] == dense["activated"]
    ours = (dense["total"], sparse["activated"], sparse["total"])
    for count, rounded, exact in zip(ours, printed, formula):
        assert abs(count / 1e9 - rounded) < 0.1  # the paper cuts off rather than rounds
        # the formula leaves out biases, and adds two norms for every further expert
        assert count / 1e9 == pytest.approx(exact, rel=1e-3)


def test_all_layers_sparse_gives_the_papers_second_row():
    for name, activated, total in (("phi2", 4.5, 7.8), ("stablelm", 2.5, 4.1), ("qwen", 2.6, 4.3)):
        overrides = ["stages.moe.upcycle.layers=all", "stages.moe.trains=[connector, moe]"]
        recipe = load_recipe(f"recipes/moe_llava/{name}.yaml", overrides)
        counts = stage_of(plan(recipe), "moe")["parameters"]["language_model"]
        assert abs(counts["activated"] / 1e9 - activated) < 0.05
        assert abs(counts["total"] / 1e9 - total) < 0.05


# Stage-3 trainable parameters of the published code (computed): FFNs of all layers, routers, projector.
@pytest.mark.parametrize(
    ("name", "published"), [("phi2", 4_204_672_000), ("stablelm", 2_082_574_336), ("qwen", 2_035_388_416)]
)
def test_moe_stage_trains_exactly_what_moe_llava_trains(moe_llava, name, published):
    assert stage_of(moe_llava[name], "moe")["parameters"]["trainable"] == published


def test_qwen3_times_8_is_the_sum_of_its_matrices():
    """Qwen3-1.7B: 28 layers, width 2048, FFN 6144, 16 heads and 8 key-value heads of 128, tied embeddings."""
    overrides = ["model.language.path=Qwen/Qwen3-1.7B", "stages.moe.upcycle.experts=8"]
    overrides += ["stages.moe.upcycle.layers=all", "stages.moe.trains=[connector, moe]"]
    counts = stage_of(plan(load_recipe("recipes/moe_llava/stablelm.yaml", overrides)), "moe")["parameters"]
    attention = 2048 * 128 * (16 + 8 + 8 + 16) + 2 * 128
    ffn, router, norms = 3 * 2048 * 6144, 8 * 2048, 2 * 2048
    outside = 151_936 * 2048 + 2048  # the embedding, which is also the head, and the last norm

    def total(experts):
        return outside + 28 * (attention + experts * ffn + router + norms)

    assert counts["language_model"] == {"total": total(8), "activated": total(2)}


def test_projector_counts_and_token_counts(moe_llava):
    assert stage_of(moe_llava["phi2"], "align")["parameters"]["trainable"] == 9_180_160
    assert stage_of(moe_llava["stablelm"], "align")["parameters"]["trainable"] == 6_295_552
    llava = plan(load_recipe("recipes/llava_1_5/7b.yaml"), MEDIA)
    assert stage_of(llava, "align")["parameters"]["trainable"] == 20_979_712
    assert stage_of(llava, "instruct")["parameters"]["language_model"]["total"] == 6_738_415_616
    assert stage_of(llava, "instruct")["visual_tokens"] == {"640x480": 576, "64f@1280x720": 64 * 576}


@pytest.mark.parametrize(("name", "published"), [("7b", 3_781_296), ("13b", 5_390_080)])
def test_lavin_trains_exactly_what_the_published_code_trains(name, published):
    """Adapters of language model and tower, projector, modality embedding (LaVIN's code, names with `adapter`)."""
    document = plan(load_recipe(f"recipes/lavin/{name}.yaml"), ["640x480"])
    stage = stage_of(document, "scienceqa")
    assert stage["parameters"]["trainable"] == published
    print_plan(document, Console(file=(stream := io.StringIO()), width=300))
    assert f"scienceqa: {stage['adapter']}; {published:,} parameters train in all" in stream.getvalue()
    assert stage["visual_tokens"] == {"640x480": 6}
    assert stage["lr"] == {"adapter": 9e-3 * 32 / 256, "connector": 9e-3 * 32 / 256}


def test_the_adapters_line_is_the_one_that_training_prints():
    """Weights are 32 bits before, whatever the parts' files hold (bfloat16 here)."""
    pytest.importorskip("bitsandbytes")
    stage = stage_of(plan(load_recipe("recipes/quickstart_qlora.yaml"), ["640x480"]), "qlora")
    assert stage["adapter"].endswith("28 linear layers in nf4: 790,528 parameters, 3.0 -> 0.4 MiB")


def test_chat_univi_token_counts():
    media = ["640x480", "1f@9x9", "2f@9x9", "3f@9x9", "16f@9x9", "17f@9x9", "48f@9x9", "64f@9x9", "500f@9x9"]
    recipe = load_recipe("recipes/chat_univi/7b.yaml")
    for image_path in ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"):
        recipe.model.vision.path = image_path
        tokens = stage_of(plan(recipe, media), "instruct")["visual_tokens"]
        assert list(tokens.values()) == [112, 112, 224, 112, 112, 224, 336, 448, 448]


# -- shipped recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_recipe_loads_and_plans(path, tmp_path):
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# sparsevlm train {path.relative_to(ROOT)}"), "the first line is the command to run"
    recipe = load_recipe(path.relative_to(ROOT))
    parts = (recipe.model.vision.path, recipe.model.language.path)
    if any(part.startswith("data/") and not Path(part).exists() for part in parts):
        pytest.skip("its parts are prepared by a tool first")
    document = plan(recipe, MEDIA)
    assert [stage["name"] for stage in document["stages"]] == list(recipe.stages)
    assert json.loads(json.dumps(document)) == document
    dumped = tmp_path / "recipe.yaml"
    dumped.write_text(dump_recipe(recipe))
    assert load_recipe(dumped) == recipe


# -- tiny models ------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_model_that_is_built(tiny_parts):
    from sparsevlm.model.build import build_model
    from sparsevlm.moe.upcycle import upcycle_model

    recipe = recipe_of(tiny_parts)
    document = plan(recipe, ["40x30", "7f@40x30"])
    model, processor = build_model(recipe.model)

    def total():
        return sum(weight.numel() for weight in model.parameters())

    assert stage_of(document, "align")["parameters"]["total"] == total()
    assert stage_of(document, "align")["parameters"]["trainable"] == sum(
        weight.numel() for weight in model.model.connector.parameters()
    )
    upcycle_model(model, recipe.stages["moe"].upcycle)
    assert stage_of(document, "moe")["parameters"]["total"] == total()
    experts = sum(w.numel() for n, w in model.named_parameters() if ".experts." in n)
    assert stage_of(document, "moe")["parameters"]["activated"] == total() - experts // 2
    assert stage_of(document, "moe")["visual_tokens"] == {
        "40x30": processor.count_visual(MediaKind.IMAGE),
        "7f@40x30": processor.count_visual(MediaKind.VIDEO, 7),
    }
    assert stage_of(document, "instruct")["lr"] == {"connector": 1e-4, "language": 1e-5, "embeddings": 1e-5}
    assert stage_of(document, "instruct")["tokens_per_step"] == 4 * 64


# -- faults that need the model ---------------------------------------------------------------------------------------


QFORMER = "instruction: true, vocab_size: 2, dim: 16, layers: 2, heads: 2, ff_dim: 16"


def write_recipe(directory: Path, tiny_parts, edit: tuple[str, str] = ("", "")) -> Path:
    text = f"""\
name: tiny
model:
  vision:
    path: {tiny_parts["vision"]}
    layer: -2
  language: {{path: {tiny_parts["language"]}}}
  connector:
    - {{type: mlp}}
data:
  a: {{path: "sparsevlm:scenes", format: scenes}}
stages:
  align:
    trains: [connector]
    data: [a]
    steps: 3
    batch: {{max_length: 128}}
  moe:
    trains: [moe]
    data: [a]
    upcycle: {{layers: [0]}}
    steps: 3
"""
    path = directory / "x.yaml"
    path.write_text(text.replace(*edit) if edit[0] else text)
    return path


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (("layer: -2", "layer: 7"), "5:12: model.vision.layer: "),
        (("layer: -2", "image_size: 36"), "5:17: model.vision.image_size: 36 pixels are not a multiple of the patch"),
        (("- {type: mlp}", "- {type: mlp, dim: 24}"), "8:7: model.connector.0: the connector ends at width 24"),
        (("- {type: mlp}", "- {type: pixel_shuffle, factor: 3}\n    - {type: mlp}"), "8:7: model.connector.0: "),
        (("- {type: mlp}", "- {type: mlp}\n    - {type: pixel_shuffle}"), "9:7: model.connector.1: "),
        (("layers: [0]", "layers: [0, 9]"), "20:23: stages.moe.upcycle.layers: "),
        (("max_length: 128", "max_length: 16"), "16:25: stages.align.batch.max_length: a picture alone takes 16"),
        (("max_length: 128", "max_visual_tokens: 9"), "16:32: stages.align.batch.max_visual_tokens: a picture"),
        (("  language: {path", "  language: {chat_template: gone, path"), "6:29: model.language.chat_template: "),
        (("{type: mlp}", "{type: mlp}\n  fusion: {type: visual_expert, layers: [9]}"), "9:41: model.fusion.layers: "),
        (("{type: mlp}", "{type: dpc_knn}\n    - {type: mlp}\n  video: {subtitles: {}}"), "10:11: model.video.subtitl"),
        (("{type: mlp}", f"{{type: qformer, {QFORMER}}}\n    - {{type: mlp}}"), "8:7: model.connector.0: a text-"),
    ],
)  # fmt: skip
def test_faults_that_need_the_model_point_at_their_line(tmp_path, monkeypatch, tiny_parts, edit, fault):
    path = write_recipe(tmp_path, tiny_parts, edit)
    monkeypatch.chdir(tmp_path)
    assert edit[1] in path.read_text()
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(path.name))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"x.yaml:{fault}"), lines


def test_native_sides_that_leave_odd_grids_point_at_the_block(tmp_path, monkeypatch, tiny_parts):
    native = "resize: native\n    native: {image: {type: smart, multiple: 8, min_pixels: 64}}"
    path = write_recipe(tmp_path, tiny_parts, ("layer: -2", native))
    path.write_text(path.read_text().replace("- {type: mlp}", "- {type: pixel_shuffle}\n    - {type: mlp}"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^x.yaml:9:7: model.connector.0: pixel_shuffle: a grid of .* `multiple`"):
        plan(load_recipe(path.name))


def test_separators_that_the_tokenizer_lacks_are_found_before_training(tmp_path, monkeypatch, tiny_parts):
    path = write_recipe(tmp_path, tiny_parts, ("layer: -2", "tiling: {type: uhd}"))
    path.write_text(path.read_text().replace(tiny_parts["language"], "sparsevlm:quickstart/language"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^x.yaml:5:5: model.vision.tiling: the tokenizer has no token for ','"):
        plan(load_recipe(path.name))


@pytest.mark.parametrize("trains", [["connector"], ["connector", "fusion"]])
def test_says_that_closed_gates_let_nothing_through(tiny_parts, trains):
    recipe = recipe_of(tiny_parts, model={"fusion": {"type": "gated_cross_attention", "every": 1}})
    recipe.stages = {"align": recipe.stages["align"].model_copy(update={"trains": trains})}
    assert any("gates are closed" in note for note in plan(recipe)["notes"]) == ("fusion" not in trains)


def test_packing_is_refused_where_documents_would_see_each_other(tmp_path, monkeypatch):
    from tests import tiny

    parts = tiny.save_parts(tmp_path / "parts", language="opt")
    path = write_recipe(tmp_path, parts, ("max_length: 128", "packing: true"))
    path.write_text(path.read_text().replace("language: {path", "language: {attention: sdpa, path"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RecipeError, match=r"x\.yaml:16:22: stages\.align\.batch\.packing: OPTModel with attention 'sdpa'"
    ):
        plan(load_recipe(path.name))


def test_unknown_parts_are_both_named_without_a_network(tmp_path, monkeypatch, tiny_parts):
    path = write_recipe(tmp_path, {"vision": "openai/clip-vit-large-patch14-335", "language": "sparsevlm:nothing"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(path.name))
    first, second = str(caught.value).splitlines()
    assert first.startswith("x.yaml:4:11: model.vision.path: ")
    assert "did you mean 'openai/clip-vit-large-patch14-336'?" in first
    assert second.startswith("x.yaml:6:20: model.language.path: ")


def test_rows_must_divide_over_the_ranks(tmp_path, tiny_parts):
    recipe = load_recipe(write_recipe(tmp_path, tiny_parts))
    plan(recipe, world=4)
    with pytest.raises(RecipeError, match=r"stages\.align\.batch\.rows: 8 rows cannot be divided over 3 x 1 rows"):
        plan(recipe, world=3)


@pytest.mark.parametrize(
    "text", ["640", "640x", "x480", "0x480", "640x480f", "f@640x480", "0f@640x480", "", "640 x 480"]
)
def test_media_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="expected WIDTHxHEIGHT"):
        parse_medium(text)


def test_a_budget_of_tokens_for_videos_is_planned_as_the_processor_keeps_it(tiny_parts):
    from sparsevlm.model.build import build_model

    recipe = recipe_of(tiny_parts, model={"video": {"max_frames": 9, "max_tokens": 70}})
    _, processor = build_model(recipe.model)
    counted = stage_of(plan(recipe, ["64f@64x48", "3f@64x48", "6v@64x48"]), "align")["visual_tokens"]
    assert counted == {"64f@64x48": 64, "3f@64x48": 48, "6v@64x48": 96}
    assert [processor.count_visual(MediaKind.VIDEO, frames) for frames in (processor.video_policy.max_frames, 3)] == [
        64,
        48,
    ]
    assert processor.count_visual(MediaKind.MULTI_VIEW, 6) == 96
    with pytest.raises(RecipeError, match=r"model\.video\.max_tokens: .* 1 frames are 16 visual tokens"):
        plan(recipe_of(tiny_parts, model={"video": {"max_tokens": 7}}))


def test_media_that_can_be_read():
    picture, clip = parse_medium("640x480"), parse_medium(" 64f@1280x720 ")
    assert (picture.kind, picture.frames, picture.size) == (MediaKind.IMAGE, 1, (640, 480))
    assert (clip.kind, clip.frames, clip.size, clip.name) == (MediaKind.VIDEO, 64, (1280, 720), "64f@1280x720")


def test_the_table_shows_every_stage(tiny_parts):
    stream = io.StringIO()
    document = plan(recipe_of(tiny_parts), ["40x30"])
    print_plan(document | {"notes": ["[x] not there"]}, Console(file=stream, width=120))
    text = stream.getvalue()
    for words in ("align", "instruct", "moe", "connector at 0.0001", "visual tokens, 40x30", "note: [x] not there"):
        assert words in text


def test_says_what_a_medium_takes_in_the_feature_cache(tiny_parts):
    recipe = recipe_of(tiny_parts, feature_cache={"path": "data/features", "max_gb": 2})
    note = next(note for note in plan(recipe, ["640x480", "3f@64x64"])["notes"] if "cache" in note)
    sizes = "640x480 takes 2.0 KiB, 3f@64x64 takes 6.0 KiB"  # 16 tokens x 32 numbers x 4 bytes, a frame
    assert note == f"feature cache data/features: {sizes}; at most 2 GB in all"
