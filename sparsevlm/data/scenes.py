"""Scenes: seeded synthetic pictures and clips with captions, questions and answers, made on the fly.

`scene_sample(split, index, seed)` is a pure function: the same arguments give the same conversation, pixel by pixel.
Held-out scenes are never training scenes (see `scene_drawing`). Answers are one word and, within a kind, evenly
spread, so that always giving the commonest answer earns as little as possible.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import Any

from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.data.scene_drawing import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPLITS,
    ZONES,
    Scene,
    SceneMaker,
    draw_scene,
)
from sparsevlm.vision.tokens import MediaKind

NUMBERS = ("one", "two", "three", "four", "five")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}

QUESTION_KINDS: dict[str, dict[str, Any]] = {
    "colour": {"core": True, "answers": list(COLOURS)},
    "shape": {"core": True, "answers": list(SHAPES)},
    "size": {"core": True, "answers": list(SIZES)},
    "position": {"core": True, "answers": list(ZONES)},
    "count": {"core": True, "answers": list(NUMBERS)},
    "yes_no": {"core": True, "answers": ["yes", "no"]},
    "motion": {"core": True, "answers": list(DIRECTIONS)},
    "before_after": {"core": True, "answers": [*COLOURS, *ZONES]},
    "binding": {"core": False, "answers": [*COLOURS, *SHAPES]},
    "text": {"core": False, "answers": [*COLOURS, *SHAPES, *SIZES, *ZONES]},
}
"""Kinds of questions, whether they count towards the bar, and their answers. `binding` asks about one of several
things; `text` shows no picture but describes the scene in words."""

KINDS = (*QUESTION_KINDS, "caption")
"""All kinds of first turns."""

_WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": ("which colour do you see ?", "what colour is it ?"),
    "shape": ("which shape do you see ?", "what shape is it ?"),
    "size": ("which size do you see ?", "how big is it ?"),
    "position": ("where is it ?", "in which place is it ?"),
    "count": ("how many do you see ?", "how many are there ?"),
    "motion": ("which way does it move ?", "where does it go ?"),
    "caption": ("describe it .", "what do you see ?"),
}
_CLAIMS: dict[str, str] = {
    "colour": "do you see something {} ?",
    "shape": "do you see a {} ?",
    "size": "do you see something {} ?",
    "zone": "is it at the {} ?",
    "number": "do you see {} ?",
    "direction": "does it move {} ?",
}
_CLAIM_VALUES: dict[str, Sequence[str]] = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "size": list(SIZES),
    "zone": list(ZONES),
    "number": NUMBERS,
    "direction": list(DIRECTIONS),
}
FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "still": ("colour", "shape", "size", "position", "yes_no", "caption"),
    "group": ("count", "colour", "shape", "yes_no", "caption"),
    "moving": ("motion", "before_after", "colour", "shape", "size", "yes_no", "caption"),
    "changing": ("before_after", "shape", "size", "position", "yes_no", "caption"),
    "several": ("binding", "caption"),
}
"""Kinds that can be asked of each setting (motion only where it is straight)."""


@dataclass(frozen=True)
class Turn:
    """A question of some kind and its answer."""

    kind: str
    question: str
    answer: str


def _direction(scene: Scene) -> str | None:
    """Return the direction of a straight motion, None for anything else."""
    ends = (scene.first.zone, scene.last.zone)
    return next((name for name, pairs in DIRECTIONS.items() if ends in pairs), None)


def caption(scene: Scene) -> str:
    """Describe a scene in one sentence of space-separated words."""
    look = scene.first.look
    if scene.setting == "group":
        number = len(scene.frames[0])
        noun = look.shape if number == 1 else PLURALS[look.shape]
        return f"{NUMBERS[number - 1]} {look.size} {look.colour} {noun} ."
    if scene.setting == "moving":
        ends = f"from the {scene.first.zone} to the {scene.last.zone}"
        return f"a {look.size} {look.colour} {look.shape} moves {ends} ."
    if scene.setting == "changing":
        turn = f"turns from {look.colour} to {scene.last.look.colour}"
        return f"a {look.size} {look.shape} at the {scene.first.zone} {turn} ."
    things = [
        f"a {thing.look.size} {thing.look.colour} {thing.look.shape} at the {thing.zone}"
        for thing in sorted(scene.frames[0], key=lambda thing: list(ZONES).index(thing.zone))
    ]
    return " and ".join(things) + " ."


def _make_scene(maker: SceneMaker, kind: str, answer: str) -> Scene:
    """Draw a scene in which ``answer`` is the answer to a question of ``kind`` (any scene for yes/no and captions)."""
    rng = maker.rng
    if kind in ("colour", "shape", "size"):
        if rng.random() < 0.25:  # some attributes are asked of clips
            start, end = rng.sample(list(ZONES), 2)
            return maker.moving(start, end, **{kind: answer})
        return maker.still(**{kind: answer})
    if kind == "position":
        return maker.still(zone=answer)
    if kind == "count":
        return maker.group(NUMBERS.index(answer) + 1)
    if kind == "motion":
        return maker.moving(*rng.choice(DIRECTIONS[answer]))
    if kind == "before_after":
        values = list(COLOURS) if answer in COLOURS else list(ZONES)
        ends = [answer, rng.choice([value for value in values if value != answer])]
        rng.shuffle(ends)
        return maker.changing(*ends) if answer in COLOURS else maker.moving(*ends)
    if kind == "binding":
        return maker.several(rng.randint(2, 4), **{_attribute(answer): answer})
    if kind == "text":
        return maker.still(**{_attribute(answer): answer})
    setting = rng.choice(("still", "still", "group", "moving", "changing" if kind == "caption" else "moving"))
    if setting == "still":
        return maker.still()
    if setting == "group":
        return maker.group(rng.randint(1, len(NUMBERS)))
    if setting == "moving":
        return maker.moving(*rng.choice(list(chain(*DIRECTIONS.values()))))
    return maker.changing(*rng.sample(list(COLOURS), 2))


def _attribute(value: str) -> str:
    """Return which attribute of a thing a word names."""
    known = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "zone": ZONES}
    return next(name for name, values in known.items() if value in values)


def _claim(rng: Random, scene: Scene, truth: bool) -> str:
    """Return a yes/no question that is to be answered with ``truth``."""
    look = scene.first.look
    facts = {"colour": look.colour, "shape": look.shape, "size": look.size}
    if scene.setting in ("still", "changing"):
        facts["zone"] = scene.first.zone
    if scene.setting == "changing":
        del facts["colour"]
    if scene.setting == "group":
        facts["number"] = NUMBERS[len(scene.frames[0]) - 1]
        del facts["size"]  # things in groups are always small
    if (direction := _direction(scene)) is not None:
        facts["direction"] = direction
    about = rng.choice(sorted(facts))
    value = facts[about] if truth else rng.choice([other for other in _CLAIM_VALUES[about] if other != facts[about]])
    return _CLAIMS[about].format(value)


def _before_after(rng: Random, scene: Scene, answer: str | None) -> tuple[str, str]:
    """Ask for the first or the last state of a clip."""
    ends = [(thing.look.colour if scene.setting == "changing" else thing.zone) for thing in (scene.first, scene.last)]
    which = rng.randrange(2) if answer is None else ends.index(answer)
    subject = "what colour is it" if scene.setting == "changing" else "where is it"
    return f"{subject} {('at first', 'in the end')[which]} ?", ends[which]


def _binding(rng: Random, scene: Scene, answer: str | None) -> tuple[str, str]:
    """Ask for an attribute of one of several things."""
    look = scene.first.look if answer is not None else rng.choice(scene.frames[0]).look
    wanted = rng.choice(("colour", "shape")) if answer is None else _attribute(answer)
    if wanted == "colour":
        return f"what colour is the {look.shape} ?", look.colour
    return f"what shape is the {look.colour} thing ?", look.shape


def ask(rng: Random, scene: Scene, kind: str, answer: str | None = None) -> Turn:
    """Ask a question of ``kind`` about a scene; ``answer`` fixes what the answer must be."""
    if kind == "yes_no":
        answer = answer or rng.choice(("yes", "no"))
        return Turn(kind, _claim(rng, scene, answer == "yes"), answer)
    if kind == "before_after":
        return Turn(kind, *_before_after(rng, scene, answer))
    if kind == "binding":
        return Turn(kind, *_binding(rng, scene, answer))
    if kind == "text":
        assert answer is not None
        about = {"zone": "position"}.get(_attribute(answer), _attribute(answer))
        return Turn(kind, f"{caption(scene)} {rng.choice(_WORDINGS[about])}", answer)
    look = scene.first.look
    answers = {
        "colour": look.colour,
        "shape": look.shape,
        "size": look.size,
        "position": scene.first.zone,
        "count": NUMBERS[len(scene.frames[0]) - 1],
        "motion": _direction(scene),
        "caption": caption(scene),
    }
    wordings = _WORDINGS[kind][:1] if scene.setting == "group" and kind != "count" else _WORDINGS[kind]
    found = answers[kind]
    assert found is not None and answer in (None, found), f"{kind}: {found!r} is not the wanted {answer!r}"
    return Turn(kind, rng.choice(wordings), found)


def scene_turns(
    split: str, index: int, seed: int = 0, kinds: Sequence[str] | None = None, turns: int = 1
) -> tuple[Scene, list[Turn]]:
    """Return the facts and the questions of a conversation, nothing drawn yet.

    Args:
        split: One of `SPLITS`.
        index: Number of the conversation, from 0.
        seed: Another seed gives other conversations of the same split.
        kinds: Kinds of the first turn, taken in turn by index; default: all of `QUESTION_KINDS`.
        turns: Most turns; those after the first are further questions about the same scene, each of another kind.

    Raises:
        ValueError: Unknown split or kind.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes have no split {split!r} (known: {', '.join(SPLITS)})")
    kinds = list(QUESTION_KINDS) if kinds is None else list(kinds)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"scenes know no kind {', '.join(map(repr, unknown)) or 'at all'} (known: {', '.join(KINDS)})")
    rng = Random(f"scenes/{split}/{seed}/{index}")
    round_, which = divmod(index, len(kinds))
    kind = kinds[which]
    answers = QUESTION_KINDS[kind]["answers"] if kind in QUESTION_KINDS else [""]  # captions have no list
    answer = answers[round_ % len(answers)]  # taken in turn too: evenly spread in any run of rows
    scene = _make_scene(SceneMaker(rng, split), kind, answer)
    found = [ask(rng, scene, kind, answer or None)]
    if kind != "text":
        more = [other for other in FOLLOW_UPS[scene.setting] if other != kind]
        if _direction(scene) is None:
            more = [other for other in more if other != "motion"]
        rng.shuffle(more)
        more = sorted(more[: max(0, turns - 1)], key="caption".__eq__)  # last: a caption tells the other answers
        found += [ask(rng, scene, other) for other in more]
    return scene, found


def scene_sample(split: str, index: int, seed: int = 0, kinds: Sequence[str] | None = None, turns: int = 1) -> Sample:
    """Return one conversation about a scene, with its picture or clip drawn.

    Arguments and errors are those of `scene_turns`.

    Returns:
        A sample whose `meta` holds ``kind``, ``answers`` and ``core`` of the first turn.
    """
    scene, found = scene_turns(split, index, seed, kinds, turns)
    kind = found[0].kind
    media = []
    if kind != "text":
        media = [Media(MediaKind.VIDEO if scene.is_clip else MediaKind.IMAGE, draw_scene(scene), fps=1.0)]
    messages = []
    for turn in found:
        messages += [Message("user", (*media, turn.question)), Message("assistant", (turn.answer,))]
        media = []
    return Sample(
        tuple(messages),
        id=f"{split}-{seed}-{index}",
        source="scenes",
        where=f"sparsevlm:scenes {split} {index}",
        meta={
            "kind": kind,
            "answers": [found[0].answer],
            "core": bool(QUESTION_KINDS.get(kind, {}).get("core", False)),
        },
    )


def vocabulary() -> list[str]:
    """Return every word that captions, questions and answers are made of, sorted."""
    templates = [
        *chain(*_WORDINGS.values()),
        *_CLAIMS.values(),
        "what colour is it where is it at first in the end ?",
        "what colour is the what shape is the thing ?",
        "a moves turns from to the at and . yes no",
    ]
    values = [*chain(*_CLAIM_VALUES.values()), *PLURALS.values()]
    return sorted({*re.findall(r"\w+|[^\w\s{}]", " ".join(templates)), *values})
