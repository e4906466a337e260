"""How an answer is scored against its references. Pure functions of strings.

A metric is two functions: `canonical` brings a free-form reply to the form in which replies are compared, and `credit`
says what every canonical reply would earn on an example. The score of a reply is a look-up of one in the other, and
the best constant answer (the chance level) is the largest column sum of the credits.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_APOSTROPHES = re.compile("['’‘ʼ]")
_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_><@`,?!*“”„«»–—]""")

_CHOICE_PATTERNS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"(?i:option|choice)?\s*\(?([A-Za-z])[).:]*$",
        r"([A-Z])[.):,\n]",
        r"([a-z])\)",
        r"\(([A-Za-z])\)",
        r".*?(?i:\banswer(?:\s+is)?\s*:?\s*)(?:(?i:option|choice)\s*)?[(*]*([A-Z])\b",
    )
)


def normalise_answer(text: str) -> str:
    """Bring a short answer to the form in which answers are compared.

    Lower case; no articles, no punctuation, no thousands separators; number words up to ten as digits; single spaces.
    Decimal points (``2.5``), clock times (``10:30``) and a minus sign before a number stay. An answer of which nothing
    would be left (``"a"``, ``"?"``) keeps what it had.

    Source: VQA evaluation code (Goyal et al. 2017, "Making the V in VQA matter", ``vqaEval.py``).
    *Deviations*: apostrophes are dropped instead of put back through a table of contractions (the same pairs become
    equal); punctuation inside a word always separates (the original joins the parts when the same sign occurs beside
    a space elsewhere in the answer); Unicode is folded (NFKC) and ``*`` stripped, since chat models write Markdown;
    a minus sign is kept, so that -5 is not 5.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    kept = " ".join(text.split())
    text = _APOSTROPHES.sub("", text)
    text = re.sub(r"(?<=\d),+(?=\d)", "", text)
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"(?<!\d):|:(?!\d)", " ", text)
    text = _PUNCTUATION.sub(" ", text)
    text = re.sub(r"(?<!\s)(?<!^)-|-(?!\d)", " ", text)
    words = [NUMBER_WORDS.get(word, word) for word in text.split()]
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words) or kept


def extract_yes_no(text: str) -> str:
    """Return ``"yes"`` or ``"no"`` for a reply, or ``""`` for an empty one.

    Only the first sentence counts. It means *no* when one of its words is "no" or "not" (or ends in "n't"), else yes.

    Source: POPE (Li et al. 2023, "Evaluating object hallucination in large vision-language models", ``evaluate.py``).
    *Deviations*: words are compared without regard to case and attached punctuation ("NO!"), a line break also ends
    the sentence, "isn't" counts as "is not", and an empty reply is no answer instead of a yes.
    """
    sentence = re.split(r"[.\n]", text.strip(), maxsplit=1)[0].lower().replace("’", "'")
    words = re.findall(r"[\w']+", sentence)
    if not words:
        return ""
    return "no" if any(word in ("no", "not") or word.endswith("n't") for word in words) else "yes"


def says_yes_or_no(text: str) -> bool:
    """Return whether a reply holds a yes or a negation at all; without one POPE's rule counts it as yes."""
    words = re.findall(r"[\w']+", re.split(r"[.\n]", text.strip(), maxsplit=1)[0].lower())
    return "yes" in words or extract_yes_no(text) == "no"


def extract_choice(text: str, choices: Sequence[str]) -> str:
    """Return the letter of the option that a reply chooses, or ``""``.

    Tried in order: the whole reply is a letter (``B``, ``(b)``, ``Option B.``); it begins with one (``B. a dog``,
    ``(B) a dog``); it says "answer is B" or "answer: B" with a capital letter; it is the text of exactly one option
    (compared as `normalise_answer` does). Nothing is guessed beyond that: a reply that only mentions an option does
    not choose it.

    Source: the ScienceQA evaluation of LLaVA-1.5 (``eval_science_qa.py``). *Deviations*: brackets and lower case are
    understood, and the text of an option counts.
    """
    letters = ascii_uppercase[: len(choices)]
    reply = text.strip().strip("*_`\"'").strip()
    for pattern in _CHOICE_PATTERNS:
        found = pattern.match(reply)
        if found and found.group(1).upper() in letters:
            return found.group(1).upper()
    normalised = normalise_answer(reply)
    same = [letter for letter, choice in zip(letters, choices) if normalise_answer(choice) == normalised]
    return same[0] if len(same) == 1 else ""


@dataclass(frozen=True)
class Reference:
    """What an example accepts.

    Attributes:
        answers: Accepted answers; for `vqa_soft` one an annotator, repetitions included; for `choice` letters. Empty
            where none is known.
        choices: Texts of the options of a multiple-choice question.
    """

    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A way of scoring.

    Attributes:
        canonical: Form of a reply in which it is compared; ``""`` for a reply that says nothing.
        credit: Canonical reply -> what it earns on an example, in ``(0, 1]``; every other reply earns 0.
    """

    canonical: Callable[[str, Reference], str]
    credit: Callable[[Reference], dict[str, float]]

    def score(self, text: str, reference: Reference) -> float:
        """Return what a reply earns, in ``[0, 1]``."""
        return self.credit(reference).get(self.canonical(text, reference), 0.0)


def vqa_soft_credit(answers: Sequence[str]) -> dict[str, float]:
    """Return the soft accuracy of every answer that an annotator gave: ``min(n / 3, 1)`` for n annotators.

    Source: VQA (Antol et al. 2015, section 5). With a single annotator n is 1 and nothing could score above a third;
    such files want the metric `exact`.
    """
    counts = Counter(normalise_answer(answer) for answer in answers)
    return {answer: min(count / 3, 1.0) for answer, count in counts.items()}


def vqa_official_credit(answers: Sequence[str]) -> dict[str, float]:
    """Return the soft accuracy as the VQA server computes it.

    It is `vqa_soft_credit` averaged over leaving out one annotator after the other: three of ten give 0.9 instead of 1.
    Published VQAv2 and TextVQA numbers are of this kind.
    Source: ``vqaEval.py`` of the VQA API. It needs two annotators or more.
    """
    counts = Counter(normalise_answer(answer) for answer in answers)
    total = len(answers)
    return {
        answer: (count * min((count - 1) / 3, 1.0) + (total - count) * min(count / 3, 1.0)) / total
        for answer, count in counts.items()
    }


METRICS: dict[str, Metric] = {
    "exact": Metric(
        canonical=lambda text, _: normalise_answer(text),
        credit=lambda reference: {normalise_answer(answer): 1.0 for answer in reference.answers},
    ),
    "yes_no": Metric(
        canonical=lambda text, _: extract_yes_no(text),
        credit=lambda reference: {extract_yes_no(answer): 1.0 for answer in reference.answers},
    ),
    "choice": Metric(
        canonical=lambda text, reference: extract_choice(text, reference.choices),
        credit=lambda reference: dict.fromkeys(reference.answers, 1.0),
    ),
    "vqa_soft": Metric(
        canonical=lambda text, _: normalise_answer(text),
        credit=lambda reference: vqa_soft_credit(reference.answers),
    ),
    "vqa_official": Metric(
        canonical=lambda text, _: normalise_answer(text),
        credit=lambda reference: vqa_official_credit(reference.answers),
    ),
}
"""Metrics by the name that data files and options use."""


def constant_answer(credits: Iterable[dict[str, float]]) -> tuple[str, float]:
    """Return the answer that earns most when given to every example, and the accuracy it reaches.

    With one reference answer an example this is the majority answer. Ties go to the answer first in the alphabet.

    Args:
        credits: `Metric.credit` of every example.
    """
    totals: dict[str, float] = {}
    count = 0
    for credit in credits:
        count += 1
        for answer, earned in credit.items():
            totals[answer] = totals.get(answer, 0.0) + earned
    if not totals:
        return "", 0.0
    best = min(totals, key=lambda answer: (-totals[answer], answer))
    return best, totals[best] / count


def yes_no_report(pairs: Iterable[tuple[str | None, bool | None]]) -> dict[str, float | int]:
    """Return what POPE reports for yes/no questions; *yes* is the positive class.

    Args:
        pairs: The reply (None where the question could not be asked) and whether the reference is yes (None where it is
            not known: wrong, whatever the reply), an example each.

    Returns:
        ``accuracy``, ``precision``, ``recall``, ``f1``, ``yes_share`` (0 where a denominator is 0), ``n``, and
        ``undecided``: replies that are missing or empty (wrong, neither yes nor no) or hold no yes and no negation
        (counted as yes, as POPE does).
    """
    outcomes: Counter[tuple[str, bool | None]] = Counter()
    undecided = 0
    for reply, positive in pairs:
        answer = extract_yes_no(reply or "")
        outcomes[answer, positive] += 1
        undecided += not says_yes_or_no(reply or "")
    true_positive, false_positive = outcomes["yes", True], outcomes["yes", False]
    true_negative = outcomes["no", False]
    total = outcomes.total()
    positives = sum(outcomes[answer, True] for answer in ("yes", "no", ""))

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 0.0

    return {
        "accuracy": share(true_positive + true_negative, total),
        "precision": share(true_positive, true_positive + false_positive),
        "recall": share(true_positive, positives),
        "f1": share(2 * true_positive, true_positive + false_positive + positives),
        "yes_share": share(true_positive + false_positive, total),
        "n": total,
        "undecided": undecided,
    }
