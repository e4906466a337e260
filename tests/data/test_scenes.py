from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from sparsevlm.data.formats import RowContext
from sparsevlm.data.formats.scenes import PATH, ScenesFormat
from sparsevlm.data.scene_drawing import (
    COLOURS,
    IMAGE_SIZE,
    NUM_FRAMES,
    SHAPES,
    SIZES,
    SPLITS,
    ZONES,
    Look,
    Thing,
    draw_frame,
)
from sparsevlm.data.scenes import KINDS, NUMBERS, QUESTION_KINDS, scene_sample, scene_turns, vocabulary
from sparsevlm.recipe.schema import Source
from sparsevlm.vision.tokens import MediaKind

CLOSED_KINDS = [kind for kind in QUESTION_KINDS if kind not in ("yes_no", "text")]


def pixels(sample) -> list[np.ndarray]:
    return [
        np.asarray(frame)
        for media in sample.media()
        for frame in (media.source if media.kind is MediaKind.VIDEO else [media.source])
    ]


def test_a_sample_is_a_pure_function_of_its_arguments():
    for index in range(len(KINDS)):
        first, again = (scene_sample("train", index, seed=3, kinds=KINDS, turns=3) for _ in range(2))
        assert [m.text for m in first.messages] == [m.text for m in again.messages]
        assert first.meta == again.meta
        assert all(np.array_equal(a, b) for a, b in zip(pixels(first), pixels(again), strict=True))
    assert len({pixels(scene_sample("train", 3, seed=seed))[0].tobytes() for seed in range(9)}) == 9


def test_splits_share_no_look_and_no_frame():
    looks: dict[str, set[Look]] = {}
    frames: dict[str, set[bytes]] = {}
    for split in SPLITS:
        scenes = [scene_turns(split, index, seed, KINDS)[0] for seed in (0, 1) for index in range(500)]
        assert {scene.split for scene in scenes} == {split}
        looks[split] = {thing.look for scene in scenes for frame in scene.frames for thing in frame}
        frames[split] = {draw_frame(frame, scene.ground).tobytes() for scene in scenes for frame in scene.frames}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not looks[a] & looks[b]
        assert not frames[a] & frames[b]


def test_about_eight_in_ten_looks_are_for_training():
    looks = [Look("circle", "red", "small", (r, g, 40), 5.0) for r in range(190, 230) for g in range(20, 60)]
    shares = {split: count / len(looks) for split, count in Counter(look.split for look in looks).items()}
    assert shares["train"] == pytest.approx(0.8, abs=0.03)
    assert shares["test"] == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_are_evenly_spread_and_one_word(kind):
    answers = QUESTION_KINDS[kind]["answers"]
    found = Counter(scene_turns("test", index, kinds=[kind])[1][0].answer for index in range(3 * len(answers)))
    assert found == dict.fromkeys(answers, 3)
    assert all(re.fullmatch(r"\w+", answer) for answer in answers)


@pytest.mark.parametrize("kind", CLOSED_KINDS)
def test_questions_do_not_tell_their_answers(kind):
    by_question: dict[str, set[str]] = {}
    for index in range(300):
        _, (turn,) = scene_turns("train", index, kinds=[kind])
        assert turn.answer not in turn.question.split()
        by_question.setdefault(turn.question, set()).add(turn.answer)
    assert all(len(answers) > 2 for answers in by_question.values())


def test_yes_and_no_are_asked_in_the_same_words():
    answers: dict[str, Counter] = {}
    for index in range(4000):
        _, (turn,) = scene_turns("train", index, kinds=["yes_no"])
        answers.setdefault(turn.question, Counter())[turn.answer] += 1
    for question, counts in answers.items():
        assert 0.35 < counts["yes"] / counts.total() < 0.65 or counts.total() < 50, (question, counts)


def nearest_zone(thing: Thing) -> str:
    return min(ZONES, key=lambda zone: np.hypot(thing.x - ZONES[zone][0], thing.y - ZONES[zone][1]))


def direction_of(scene) -> str | None:
    dx, dy = (b - a for a, b in zip((scene.first.x, scene.first.y), (scene.last.x, scene.last.y), strict=True))
    if max(abs(dx), abs(dy)) < 2 * min(abs(dx), abs(dy)) or dx == dy == 0:
        return None
    return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")


def answer_of(scene, turn) -> str | None:
    """Answer a question from what is drawn where, by other means than the generator's."""
    words = turn.question.split()
    thing = scene.last if "end" in words else scene.first
    if turn.kind == "binding":
        named = [thing.look for thing in scene.frames[0] if {thing.look.shape, thing.look.colour} & set(words)]
        assert len(named) == 1  # exactly one thing is meant
        return named[0].colour if "colour" in words else named[0].shape
    if turn.kind == "count":
        return NUMBERS[len(scene.frames[0]) - 1]
    if turn.kind == "motion":
        return direction_of(scene)
    if turn.kind == "position" or words[0] == "where":
        return nearest_zone(thing)
    return thing.look.colour if "colour" in words else getattr(thing.look, turn.kind)


@pytest.mark.parametrize("kind", CLOSED_KINDS)
def test_answers_follow_from_the_scene(kind):
    for index in range(150):
        scene, turns = scene_turns("test", index, kinds=[kind], turns=4)
        for turn in turns:
            if turn.kind not in ("yes_no", "caption"):
                assert turn.answer == answer_of(scene, turn), (scene, turn)


def test_yes_or_no_follows_from_the_scene():
    for index in range(400):
        scene, (turn,) = scene_turns("test", index, kinds=["yes_no"])
        look, claim = scene.first.look, turn.question.split()[-2]
        facts = {look.colour, look.shape, look.size}
        if claim in NUMBERS:
            facts = {NUMBERS[len(scene.frames[0]) - 1]}
        elif turn.question.startswith("is it at"):
            facts = {nearest_zone(scene.first)}
        elif turn.question.startswith("does it move"):
            facts = {direction_of(scene)}
        assert (claim in facts) == (turn.answer == "yes"), (scene, turn)


def test_pictures_show_what_they_say():
    for shape in SHAPES:
        for size, (low, high) in SIZES.items():
            for radius in (low, high):
                picture = draw_frame((Thing(Look(shape, "red", size, COLOURS["red"], radius), 30, 34),), (10, 10, 10))
                rows, columns = np.nonzero(picture[..., 0] > 110)
                assert abs(columns.mean() + 0.5 - 30) < 1 and abs(rows.mean() + 0.5 - 34) < 0.35 * radius
                assert radius * 1.5 < columns.max() - columns.min() + 1 < radius * 2.4


def test_nothing_touches_the_border_or_its_neighbours():
    for index in range(300):
        scene, _ = scene_turns("train", index, kinds=["count", "binding", "motion", "before_after", "size"])
        for frame in scene.frames:
            picture = draw_frame(frame, scene.ground)
            border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert (border == scene.ground).all(), (scene, frame)
            for i, a in enumerate(frame):
                for b in frame[:i]:
                    assert np.hypot(a.x - b.x, a.y - b.y) > a.look.radius + b.look.radius


def test_media_and_meta():
    seen = set()
    for index in range(3 * len(KINDS)):
        sample = scene_sample("validation", index, kinds=KINDS)
        kind = sample.meta["kind"]
        assert kind == KINDS[index % len(KINDS)]
        assert sample.meta["core"] == QUESTION_KINDS.get(kind, {"core": False})["core"]
        assert sample.meta["answers"] == [sample.messages[1].text]
        for media in sample.media():
            seen.add(media.kind)
            frames = pixels(sample)
            assert len(frames) == (NUM_FRAMES if media.kind is MediaKind.VIDEO else 1)
            assert all(frame.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and frame.dtype == np.uint8 for frame in frames)
        assert (kind == "text") == (not list(sample.media()))
    assert seen == {MediaKind.IMAGE, MediaKind.VIDEO}


def test_further_turns_are_of_other_kinds_about_the_same_scene():
    for index in range(60):
        sample = scene_sample("train", index, turns=4)
        _, turns = scene_turns("train", index, turns=4)
        assert [message.text for message in sample.messages[::2]] == [turn.question for turn in turns]
        assert len({turn.kind for turn in turns}) == len(turns) <= 4
        assert len(list(sample.media())) == (sample.meta["kind"] != "text")
        assert all(media in sample.messages[0].content for media in sample.media())


def test_vocabulary_holds_every_word():
    used: set[str] = set()
    for index in range(1500):
        for turn in scene_turns("train", index, kinds=KINDS, turns=5)[1]:
            used |= {*turn.question.split(), *turn.answer.split()}
    assert used == set(vocabulary())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scene_sample("dev", 0), "no split 'dev'"),
        (lambda: scene_sample("train", 0, kinds=["color"]), "no kind 'color'"),
        (lambda: scene_sample("train", 0, kinds=[]), "no kind"),
        (lambda: ScenesFormat(kinds=["color"]), "kinds must be a list out of colour"),
        (lambda: ScenesFormat(captions=2), "captions is a share"),
        (lambda: ScenesFormat(n=0), "n must be"),
        (lambda: ScenesFormat(capt=1), "unknown option 'capt'"),
        (lambda: ScenesFormat().rows(Source(path="a.json", format="scenes")), "path must be 'sparsevlm:scenes'"),
        (lambda: ScenesFormat().rows(Source(path=PATH, format="scenes", split="dev")), "no split 'dev'"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_format_mixes_captions_and_kinds_evenly():
    kinds = ["colour", "count", "motion", "text"]
    made = ScenesFormat(n=80, kinds=kinds, captions=0.5, turns=2, seed=5)
    rows = made.rows(Source(path=PATH, format="scenes", split="validation"))
    samples = [made.sample(row, RowContext("toy", row, id=str(row))) for row in rows]
    assert Counter(sample.meta["kind"] for sample in samples) == {"caption": 40} | dict.fromkeys(kinds, 10)
    assert {sample.source for sample in samples} == {"toy"} and len({sample.id for sample in samples}) == 80
    assert all("validation" in sample.where for sample in samples)
    questions = [sample for sample in samples if sample.meta["kind"] == "count"]
    assert all(len(sample.messages) == 4 for sample in questions)


def test_shipped_parts_are_small_and_know_every_word():
    from transformers import AutoTokenizer

    from sparsevlm.model.parts import ASSETS

    parts = ASSETS / "quickstart"
    weights = list(parts.rglob("*.safetensors"))
    assert len(weights) == 2 and sum(file.stat().st_size for file in weights) <= 3_000_000
    tokenizer = AutoTokenizer.from_pretrained(str(parts / "language"))
    for word in (*vocabulary(), "<user>", "<assistant>", "<image>", "<video>", "<eos>", "<pad>"):
        (token,) = tokenizer.encode(word, add_special_tokens=False)
        assert token != tokenizer.unk_token_id and tokenizer.decode([token]) == word
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    marked = [token for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert tokenizer.convert_ids_to_tokens(marked) == ["red", "<eos>"]
    assert tokenizer.unk_token_id not in made["input_ids"]
