"""Scoring against loops written the long way round."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevlm.eval.metrics import (
    METRICS,
    Reference,
    constant_answer,
    extract_choice,
    extract_yes_no,
    normalise_answer,
    vqa_official_credit,
    vqa_soft_credit,
    yes_no_report,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red", "red"),
        ("  The red   car. ", "red car"),
        ("a", "a"),  # nothing else would be left: an option's letter, say
        ("an apple and the pear", "apple and pear"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("1, 000", "1 000"),
        ("2.5", "2.5"),
        ("2.", "2"),
        ("10:30", "10:30"),
        ("time: 10", "time 10"),
        ("-5", "-5"),
        ("3-5", "3 5"),
        ("t-shirt", "t shirt"),
        ("don't", "dont"),
        ("don’t", "dont"),
        ("**Red**!", "red"),
        ('"red"', "red"),
        ("left/right", "left right"),
        ("?", "?"),
        ("", ""),
        ("top\n left", "top left"),
        ("50%", "50%"),
        ("ＲＥＤ", "red"),
    ],
)
def test_normalise_answer(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@given(st.text(alphabet="aA tTheE.,:-'’?!*0125/()\n"))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once
    assert once == once.strip() and "  " not in once


@given(st.text(min_size=1, alphabet="abc XY12.,"), st.sampled_from(["{}", " {} ", "{}.", "{}!", "The {}"]))
def test_exact_ignores_case_articles_and_final_punctuation(text: str, frame: str) -> None:
    word = f"w{text}".strip(" .,")
    assert METRICS["exact"].score(frame.format(word.upper()), Reference((word,))) == 1.0


def test_exact_accepts_any_of_the_answers_and_nothing_else() -> None:
    reference = Reference(("grey", "gray"))
    scores = {text: METRICS["exact"].score(text, reference) for text in ("Gray.", "grey", "gray cat", "")}
    assert scores == {"Gray.": 1.0, "grey": 1.0, "gray cat": 0.0, "": 0.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("yes, there is a dog.", "yes"),
        ("No", "no"),
        ("NO!", "no"),
        ("No, there is none.", "no"),
        ("There is not a dog", "no"),
        ("There isn't a dog", "no"),
        ("There isn’t a dog", "no"),
        ("Yes. There is no cat, though.", "yes"),
        ("Yes\nNo", "yes"),
        ("nobody knows", "yes"),  # POPE looks for words, not for parts of words
        ("a dog", "yes"),  # and takes whatever does not deny for a yes
        ("", ""),
        (" . ", ""),
    ],
)
def test_yes_no(text: str, expected: str) -> None:
    assert extract_yes_no(text) == expected


def pope_script(text: str) -> str:
    """The rule as POPE's evaluation script spells it."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    words = text.replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


@given(st.lists(st.sampled_from(["yes", "Yes", "no", "No", "not", "a", "dog", "there", "is", ","]), min_size=1))
def test_yes_no_agrees_with_popes_script(words: list[str]) -> None:
    text = " ".join(words)
    if text.strip(" ,"):
        assert extract_yes_no(text) == pope_script(text)


@pytest.mark.parametrize("text", ["B", "b", "(B)", "B.", "b)", "B. a cat", "B: cat", "(b) cat", "B) cat", "B\nbecause",
                                  "The answer is B.", "The answer is (B)", "Answer: B", "the answer is: B, a cat",
                                  "Option B", "**B**", "a cat", "A cat.", "It is a cat. The answer is B",
                                  "Option A is wrong, so the answer is option B"])  # fmt: skip
def test_choice_found(text: str) -> None:
    assert extract_choice(text, ["dog", "a cat", "cow"]) == "B"


@pytest.mark.parametrize("text", ["", "D", "a horse", "the dog or the cat", "I think so", "E. elephant",
                                  "the answer is a horse"])  # fmt: skip
def test_choice_not_guessed(text: str) -> None:
    assert extract_choice(text, ["dog", "a cat", "cow"]) == ""


def test_choice_of_twins_is_not_decided_by_text() -> None:
    assert extract_choice("same", ["same", "Same.", "other"]) == ""


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=12))
def test_official_accuracy_equals_leaving_one_annotator_out(answers: list[str]) -> None:
    naive_plain, naive = {}, {}
    for answer in set(answers):
        naive_plain[answer] = min(sum(other == answer for other in answers) / 3, 1)
        scores = []
        for i in range(len(answers)):
            others = answers[:i] + answers[i + 1 :]
            scores.append(min(others.count(answer) / 3, 1))
        naive[answer] = sum(scores) / len(scores)
    assert vqa_soft_credit(answers) == pytest.approx({normalise_answer(k): v for k, v in naive_plain.items()})
    assert vqa_official_credit(answers) == pytest.approx({normalise_answer(k): v for k, v in naive.items()})


def test_soft_accuracy_of_the_paper() -> None:
    reference = Reference(("red",) * 2 + ("Dark red",) * 5 + ("blue",) * 3)
    soft, official = METRICS["vqa_soft"], METRICS["vqa_official"]
    assert [soft.score(text, reference) for text in ("Red", "dark red", "blue", "green")] == pytest.approx(
        [2 / 3, 1, 1, 0]
    )
    assert official.score("blue", reference) == pytest.approx(0.9)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_constant_answer_is_the_best_single_reply(metric: str) -> None:
    rng = random.Random(0)
    words = {"yes_no": ["yes", "no"], "choice": ["A", "B", "C"]}.get(metric, ["red", "Red.", "the blue", "2", "two"])
    choices = ("x", "y", "z") if metric == "choice" else ()
    for _ in range(20):
        references = [
            Reference(tuple(rng.choices(words, k=1 if metric in ("yes_no", "choice") else rng.randint(2, 5))), choices)
            for _ in range(rng.randint(1, 9))
        ]
        scores = {
            word: sum(METRICS[metric].score(word, reference) for reference in references) / len(references)
            for word in words
        }
        answer, accuracy = constant_answer(METRICS[metric].credit(reference) for reference in references)
        assert accuracy == pytest.approx(max(scores.values()))
        reached = [METRICS[metric].score(answer, reference) for reference in references]
        assert sum(reached) / len(reached) == pytest.approx(accuracy)


def test_constant_answer_of_nothing_known() -> None:
    assert constant_answer([{}, {}]) == ("", 0.0)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "a dog", "", None]), st.booleans()), max_size=30))
def test_yes_no_report_against_a_confusion_table(pairs: list[tuple[str | None, bool]]) -> None:
    counts = dict.fromkeys(itertools.product(["yes", "no", "neither"], [True, False]), 0)
    for reply, positive in pairs:
        said = {"yes": "yes", "a dog": "yes", "no": "no"}.get(reply or "", "neither")
        counts[said, positive] += 1
    total, tp, fp = len(pairs), counts["yes", True], counts["yes", False]
    fn = counts["no", True] + counts["neither", True]
    report = yes_no_report(pairs)
    assert report["n"] == total
    assert report["accuracy"] == ((tp + counts["no", False]) / total if total else 0)
    assert report["precision"] == (tp / (tp + fp) if tp + fp else 0)
    assert report["recall"] == (tp / (tp + fn) if tp + fn else 0)
    assert report["yes_share"] == ((tp + fp) / total if total else 0)
    if tp:
        precision, recall = report["precision"], report["recall"]
        assert report["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert report["undecided"] == sum(reply in (None, "", "a dog") for reply, _ in pairs)


def test_a_reply_without_a_known_answer_is_wrong() -> None:
    report = yes_no_report([("yes", None), ("no", None), ("yes", True)])
    assert report["n"] == 3 and report["accuracy"] == pytest.approx(1 / 3)
