"""The loader: places of faults, inheritance and YAML 1.2."""

import re
from pathlib import Path

import pytest

from sparsevlm.recipe.load import load_recipe
from tests.recipe.example import GOOD, faults


def test_a_recipe_loads(write):
    recipe = load_recipe(write(GOOD))
    assert list(recipe.stages) == ["align", "moe"]
    assert recipe.stages["align"].optim.lr == 1e-3
    assert recipe.model.connector == [{"type": "linear"}, {"type": "mlp", "depth": 2}]
    assert recipe.run_dir == "runs/tiny"


def test_all_faults_at_once_with_line_and_column(write):
    path = write(
        """\
        name: tiny
        seed: true
        model:
          vision: {path: tower, layr: -2}
          language:
            pth: talker
            attention: sdap
          connector:
            - type: mlp
              depht: 2
            - type: mpl
            - type: mlp
              depth: deep
        data:
          words: {path: words.json, format: llava}
          words: {path: again.json, format: llava}
        stages:
          align:
            trains: [connector, langage]
            data: [wrods]
            steps: -3
            optim:
              lr: fast
              part_lr: {vison: 1e-4, language: 1e-5}
          moe:
            trains: [moe]
            data: 3
            steps: 10
            epochs: 1
            upcycle:
              layers: alternat
              top_k: 5
            sharding: {zero: 2, offload: all}
        evals:
          final: {path: scenes}
          other: {task: vqa, path: q.json, options: {metrc: exact, blind: 3}}
        """
    )
    found = faults(path)
    places = [re.match(r"x\.yaml:(\d+):(\d+): ([\w.]+): ", line).groups() for line in found]
    assert [(int(line), int(column), name) for line, column, name in places] == [
        (2, 7, "seed"),
        (4, 25, "model.vision.layr"),
        (5, 3, "model.language.path"),
        (6, 5, "model.language.pth"),
        (7, 16, "model.language.attention"),
        (10, 7, "model.connector.0.depht"),
        (11, 13, "model.connector.1.type"),
        (13, 14, "model.connector.2.depth"),
        (16, 3, "data.words"),
        (19, 25, "stages.align.trains.1"),
        (20, 12, "stages.align.data.0"),
        (21, 12, "stages.align.steps"),
        (23, 11, "stages.align.optim.lr"),
        (24, 17, "stages.align.optim.part_lr.vison"),
        (24, 30, "stages.align.optim.part_lr.language"),
        (27, 11, "stages.moe.data"),
        (29, 13, "stages.moe.epochs"),
        (31, 15, "stages.moe.upcycle.layers"),
        (32, 14, "stages.moe.upcycle.top_k"),
        (33, 34, "stages.moe.sharding.offload"),
        (35, 3, "evals.final.task"),
        (36, 46, "evals.other.options.metrc"),
        (36, 67, "evals.other.options.blind"),
    ]
    told = dict(zip((name for _, _, name in places), found))
    for name, words in {
        "seed": "expected a whole number, got true",
        "model.vision.layr": "did you mean 'layer'?",
        "model.language.path": "missing, expected text",
        "model.language.attention": "got 'sdap', did you mean 'sdpa'?",
        "model.connector.0.depht": "did you mean 'depth'?",
        "model.connector.1.type": "unknown connector block 'mpl', did you mean 'mlp'?",
        "data.words": "duplicate key, given before at line 15",
        "stages.align.trains.1": "did you mean 'language'?",
        "stages.align.data.0": "no source 'wrods' in data, did you mean 'words'?",
        "stages.align.optim.lr": "expected a number, got 'fast'",
        "stages.align.optim.part_lr.vison": "did you mean 'vision'?",
        "stages.moe.data": "expected a list of text or a mapping of names to numbers, got 3",
        "stages.moe.upcycle.layers": "did you mean 'alternate'?",
        "evals.other.options.metrc": "did you mean 'metric'?",
        "evals.other.options.blind": "expected true or false, got 3",
        "stages.moe.upcycle.top_k": "top_k 5 is more than the 4 experts",
    }.items():
        assert words in told[name], told[name]


def test_faults_inside_the_member_of_a_union_that_the_value_has_the_shape_of(write):
    weighted = GOOD.replace("data: [words, clips]", "data: {words: 0, clips: much}\n    mixture: {sampling: weight}")
    assert faults(write(weighted)) == [
        "x.yaml:20:19: stages.moe.data.words: must be greater than 0, got 0",
        "x.yaml:20:29: stages.moe.data.clips: expected a number, got 'much'",
    ]
    listed = GOOD.replace("{experts: 4}", "{layers: [0, two]}")
    assert faults(write(listed)) == ["x.yaml:22:27: stages.moe.upcycle.layers.1: expected a whole number, got 'two'"]


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (("[moe, connector]", "[moe, moe]"), "19:19: stages.moe.trains.1: "),
        (("    upcycle: {experts: 4}\n", ""), "19:14: stages.moe.trains.0: "),
        (("steps: 10\n", "steps: 10\n    upcycle: {}\n"), "23:5: stages.moe.upcycle: "),
        (("{lr: 1e-3}", "{lr: 1e-3, warmup: 11}"), "17:31: stages.align.optim.warmup: "),
        (("{lr: 1e-3}", "{part_lr: {language: 1}}"), "17:23: stages.align.optim.part_lr.language: "),
        (("{lr: 1e-3}", "{lr: 1e-3, min_lr: 2e-3}"), "17:31: stages.align.optim.min_lr: 0.002 is more than the peak"),
        (
            ("{lr: 1e-3}", "{min_lr: 1e-6, schedule: linear}"),
            "17:21: stages.align.optim.min_lr: only 'schedule: cosine' decays to a rate",
        ),
        (("{lr: 1e-3}", "{lr: .inf}"), "17:17: stages.align.optim.lr: expected a finite number"),
        (("data: [words, clips]", "data: [words, words]"), "20:19: stages.moe.data.1: "),
        (("data: [words, clips]", "data: {words: 1}"), "20:5: stages.moe.data: "),
        (
            ("data: [words]", "data: [words]\n    batch: {rows: 8, rows_per_rank: 3}"),
            "16:37: stages.align.batch.rows_per_rank: ",
        ),
        (("    steps: 20", "    steps: 20\n    mixture: {caps: {word: 3}}"), "22:22: stages.moe.mixture.caps.word: "),
        (("    steps: 20", "    steps: 20\n    mixture: {temperature: 2}"), "22:28: stages.moe.mixture.temperature: "),
        (("    steps: 20", "    steps: 20\n    evals: [gone]"), "22:13: stages.moe.evals.0: "),
        (
            ("words.json, format: llava", "w.json, format: llava, options: {imgae: x}"),
            "10:50: data.words.options.imgae: unknown option, did you mean 'image'?",
        ),
        (
            ("words.json, format: llava", "w.json, format: scenes, options: {n: 0}"),
            "10:41: data.words.options: scenes: n must",
        ),
        (
            ("words.json, format: llava", "w.json, format: lava"),
            "10:33: data.words.format: unknown data format 'lava', did you mean 'llava'?",
        ),
        (("  moe:", "  m.oe:"), "18:3: stages.m.oe: "),
        (("name: tiny", "name: ../tiny"), "1:7: name: "),
        (("  clips: {", "  clips: {streaming: true, "), "22:5: stages.moe.epochs: "),
        (
            ("  connector:", "  video: {frame_text: 'see <image> {index} '}\n  connector:"),
            "5:23: model.video.frame_text: ",
        ),
        (
            ("  connector:", "  video: {subtitles: {text: '<video>{text} '}}\n  connector:"),
            "5:29: model.video.subtitles.text: ",
        ),
        (("path: tower", "path: 'sparsevlm:patches'"), "3:18: model.vision.path: 'sparsevlm:patches' is no tower"),
        (("path: tower", "path: tower, beside: [{path: 'sparsevlm:patches'}]"), "3:41: model.vision.beside.0.path: "),
        (("language: {", "language: {extra_tokens: [<a>, <video>], "), "4:34: model.language.extra_tokens.1: "),
        (("language: {", "language: {extra_tokens: [<a>, <b>, <a>], "), "4:39: model.language.extra_tokens.2: "),
    ],
)
def test_options_that_do_not_go_together(write, edit, place):
    text = GOOD.replace(*edit)
    if "streaming" in edit[1]:
        text = text.replace("steps: 20", "epochs: 1")
        place = place.replace("22:5", "21:13")
    assert text != GOOD
    found = faults(write(text))
    assert len(found) == 1 and found[0].startswith(f"x.yaml:{place}"), found


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: [x\nseed: 1\n", "x.yaml:2:"),
        ("name: x\n\tseed: 1\n", "x.yaml:2:1: broken YAML"),
        ("", "x.yaml:1:1: a recipe is a mapping of options, got nothing"),
        ("- a\n", "x.yaml:1:1: a recipe is a mapping of options, got a list"),
        ("name: x\n---\nname: y\n", "x.yaml:2:1: broken YAML"),
        ("name: \x07\n", "x.yaml:1:"),
    ],
)
def test_broken_files_are_one_fault_with_a_line(write, text, place):
    path = write("")
    path.write_text(text)
    found = faults(path)
    assert len(found) == 1 and found[0].startswith(place), found


def test_unreadable_files(write, tmp_path):
    write(GOOD)
    assert faults(Path("gone.yaml")) == ["gone.yaml: cannot read gone.yaml: No such file or directory"]
    Path("latin.yaml").write_bytes(b"name: caf\xe9")
    assert faults(Path("latin.yaml")) == ["latin.yaml: cannot read latin.yaml: it is not UTF-8 text"]
    assert len(faults(tmp_path)) == 1  # a folder


def test_keys_tags_and_cycles_are_faults(write):
    found = faults(write(GOOD + "1: one\noutput: !!python/name:os.system ''\nevals: &a {x: *a}\n"))
    assert any(line.startswith("x.yaml:23:1: a key must be text, got 1") for line in found)
    assert any(line.startswith("x.yaml:24:9: output: YAML tag") for line in found)
    assert any("an alias may not contain itself" in line for line in found)


def test_scalars_are_those_of_yaml_1_2(write):
    text = GOOD.replace("1e-3}", "1e-3, eps: 1E-9, weight_decay: +1.5e-2, warmup: 0}").replace(
        "path: words.json", "path: words.json, license: 2026-01-01, split: yes, revision: '1e-4'"
    )
    recipe = load_recipe(write(text))
    optim = recipe.stages["align"].optim
    assert (optim.lr, optim.eps, optim.weight_decay) == (1e-3, 1e-9, 1.5e-2)
    source = recipe.data["words"]
    assert (source.license, source.split, source.revision) == ("2026-01-01", "yes", "1e-4")


def test_anchors_and_merge_keys(write):
    text = GOOD.replace("  words: {", "  words: &w {").replace(
        "  clips: {path: clips.json, format: llava}", "  clips: {<<: *w, path: c}"
    )
    recipe = load_recipe(write(text))
    assert (recipe.data["clips"].path, recipe.data["clips"].format) == ("c", "llava")


# -- base: ------------------------------------------------------------------------------------------------------------


def test_base_merges_mappings_and_replaces_the_rest(write):
    write(GOOD, "shared/deep/root.yaml")
    write("base: deep/root.yaml\nname: middle\nstages: {align: {steps: 11}}\n", "shared/middle.yaml")
    leaf = write(
        """\
        base: ../shared/middle.yaml
        model: {connector: [{type: linear}], video: {fps: null}}
        data: {clips: null}
        stages:
          align: {optim: {warmup: 5}}
          moe: {data: [words]}
          more: {trains: [language], data: [words], steps: 1}
        """,
        "mine/leaf.yaml",
    )
    recipe = load_recipe(leaf)
    assert recipe.base is None
    assert recipe.name == "middle"
    assert recipe.model.connector == [{"type": "linear"}]
    assert recipe.model.video.fps is None  # null is a value here ...
    assert list(recipe.data) == ["words"]  # ... and takes away what cannot be null
    assert list(recipe.stages) == ["align", "moe", "more"]
    align = recipe.stages["align"]
    assert (align.steps, align.optim.lr, align.optim.warmup) == (11, 1e-3, 5)


def test_null_resets_a_section_to_its_defaults(write):
    write(GOOD)
    recipe = load_recipe(
        write("base: x.yaml\nstages: {align: {optim: null}, moe: {steps: null, epochs: 2}}\n", "y.yaml")
    )
    assert recipe.stages["align"].optim.lr == 1e-4
    assert (recipe.stages["moe"].steps, recipe.stages["moe"].epochs) == (None, 2)


def test_faults_point_into_the_file_that_holds_the_value(write):
    write(GOOD.replace("{experts: 4}", "{experts: 4, top_k: 3}").replace("lr: 1e-3", "lr: none"), "low.yaml")
    leaf = write("base: low.yaml\nstages:\n  moe:\n    upcycle: {experts: 2}\n    stepz: 3\n", "high.yaml")
    assert faults(leaf) == [
        "high.yaml:5:5: stages.moe.stepz: unknown option, did you mean 'steps'?",
        "low.yaml:17:17: stages.align.optim.lr: expected a number, got 'none'",
        "low.yaml:22:34: stages.moe.upcycle.top_k: top_k 3 is more than the 2 experts",
    ]


def test_bases_that_cannot_be(write):
    write("base: b.yaml\n", "a.yaml")
    write("name: x\nbase: c.yaml\n", "b.yaml")
    circle = write("base: a.yaml\n", "c.yaml")
    assert faults(circle) == ["b.yaml:2:7: base: goes round in a circle: c.yaml -> a.yaml -> b.yaml -> c.yaml"]
    assert faults(write("name: x\nbase: gone.yaml\n")) == [
        "x.yaml:2:7: base: cannot read gone.yaml: No such file or directory"
    ]
    assert "x.yaml:1:7: base: expected the path of a recipe, got a list" in faults(write("base: [a.yaml]\n"))
    write("name: [x\n", "broken.yaml")
    assert faults(write("base: broken.yaml\n"))[0].startswith("broken.yaml:2:1: broken YAML")
