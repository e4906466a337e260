"""Tasks: what they ask, and what they make of bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsevlm.data.scenes import QUESTION_KINDS, scene_sample
from sparsevlm.eval.base import EvalTask, Example
from sparsevlm.eval.metrics import METRICS
from sparsevlm.eval.run import build_task, evaluate
from sparsevlm.recipe.schema import Eval
from sparsevlm.registry import EVAL_TASKS
from sparsevlm.vision.tokens import MediaKind
from tests import tiny


def read(
    task: str, path: Path | str, base_dir: Path = Path(), limit: int | None = None, **options: Any
) -> list[Example]:
    spec = Eval(task=task, path=str(path), limit=limit, options=options)
    return build_task(spec).examples(spec, base_dir)


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.picture("red").save(tmp_path / "a.png")
    tiny.picture("blue").save(tmp_path / "b.png")
    return tmp_path


@pytest.mark.parametrize("name", EVAL_TASKS.names())
def test_every_task_is_documented_and_strict(name: str) -> None:
    task = EVAL_TASKS.get(name)
    assert issubclass(task, EvalTask) and task.__doc__
    assert all(field.description for field in task.model_fields.values()), "an option without documentation"
    with pytest.raises(ValueError, match="surely_unknown"):
        build_task(Eval(task=name, path="-", options={"surely_unknown": 1}))


# ---- scenes ----------------------------------------------------------------------------------------------------------


def test_scenes_ask_what_the_generator_made() -> None:
    examples = read("scenes", "sparsevlm:scenes", n=30, seed=2)
    assert len(examples) == 30
    for i, example in enumerate(examples):
        sample = scene_sample("test", i, 2)
        assert example.kind == sample.meta["kind"] and list(example.reference.answers) == sample.meta["answers"]
        assert example.core == QUESTION_KINDS[example.kind]["core"]
        assert example.sample.messages[-1].role == "user"
        assert example.sample.messages[-1].text == sample.messages[0].text
        assert METRICS[example.metric].score(sample.messages[1].text, example.reference) == 1.0
    assert {example.kind for example in examples} == set(QUESTION_KINDS)


def test_scenes_options() -> None:
    examples = read("scenes", "sparsevlm:scenes", n=6, kinds=["colour", "motion"], split="validation", limit=4)
    assert [example.kind for example in examples] == ["colour", "motion"] * 2
    assert all(example.sample.id.startswith("validation-") for example in examples)
    for wrong, message in (({"split": "tst"}, "did you mean 'test'"), ({"kinds": ["color"]}, "did you mean 'colour'")):
        with pytest.raises(ValueError, match=message):
            read("scenes", "sparsevlm:scenes", **wrong)
    with pytest.raises(ValueError, match=r"sparsevlm:scenes.*got 'x\.json'"):
        read("scenes", "x.json")


# ---- question files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["questions.json", "questions.jsonl"])
def test_rows_become_examples(folder: Path, name: str) -> None:
    rows = [
        {"id": 7, "image": "a.png", "question": "What colour?", "answer": "red", "kind": "colour"},
        {"image": ["a.png", "b.png"], "question": "How many?", "answers": ["two", 2], "core": False},
        {"question": "Is ice cold?", "answer": "Yes", "metric": "yes_no"},
        {"video": "a.png", "question": "Which?", "choices": ["cat", "dog"], "answer": "dog", "metric": "choice"},
        {"question": "Soft?", "answers": ["a", "a", "b"], "metric": "vqa_soft"},
    ]
    first, second, third, fourth, fifth = read("vqa", write(folder / name, rows))
    assert (first.sample.id, first.kind, first.core, first.metric) == ("7", "colour", True, "exact")
    assert [media.source.name for media in second.sample.media()] == ["a.png", "b.png"]
    assert (second.sample.id, second.kind, second.core) == ("1", "all", False)
    place = "row 1" if name.endswith(".json") else "line 2"
    assert second.reference.answers == ("two", "2") and second.sample.where == f"{name}:{place}"
    assert third.sample.messages[0].content == ("Is ice cold?",) and third.metric == "yes_no"
    assert [media.kind for media in fourth.sample.media()] == [MediaKind.VIDEO]
    assert fourth.reference.answers == ("B",) and fourth.reference.choices == ("cat", "dog")
    assert fourth.sample.messages[0].text.startswith("Which?\nA. cat\nB. dog\n")
    assert fifth.reference.answers == ("a", "a", "b")
    assert not any(example.fault for example in (first, second, third, fourth, fifth))
    assert len(read("vqa", folder / name, limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("text", "'text' is not an object"),
        ({"answer": "red"}, "'question' is None"),
        ({"question": " ", "answer": "red"}, "'question' is ' '"),
        ({"question": "?"}, "'answer'"),
        ({"question": "?", "answers": []}, "'answer'"),
        ({"question": "?", "answer": {"text": "red"}}, "'answer'"),
        ({"question": "?", "answer": "red", "image": "gone.png"}, "gone.png"),
        ({"question": "?", "answer": "red", "image": "../a.png"}, "leaves the media root"),
        ({"question": "?", "answer": "red", "image": 3}, "image is 3, not a path"),
        ({"question": "?", "answer": "red", "metric": "bleu"}, "unknown metric 'bleu'"),
        ({"question": "?", "answer": "maybe", "metric": "yes_no"}, "'yes' or 'no'"),
        ({"question": "?", "answer": "A", "metric": "choice"}, "'choices' is None"),
        ({"question": "?", "answer": "C", "choices": ["x", "y"], "metric": "choice"}, "'C' is none of the options"),
        ({"question": "?", "answer": 2, "choices": ["x", "y"], "metric": "choice"}, "2 is none of the options"),
        ({"question": "?", "answer": "red", "metric": "vqa_soft"}, "several annotators"),
    ],
)
def test_bad_rows_are_named_and_count_as_wrong(folder: Path, row: Any, fault: str) -> None:
    good = {"question": "colour?", "answer": "red"}
    examples = read("vqa", write(folder / "q.json", [good, row]))
    assert not examples[0].fault and fault in examples[1].fault
    assert examples[1].sample.where == "q.json:row 1"
    with pytest.raises(ValueError, match=r"none of its 1 rows can be used"):
        read("vqa", write(folder / "all_bad.json", [row]))


def test_a_damaged_line_is_one_fault(folder: Path) -> None:
    path = write(folder / "q.jsonl", [{"question": "?", "answer": "red"}] * 2)
    path.write_text(path.read_text() + '{"question": "cut o')
    faults = [example.fault for example in read("vqa", path)]
    assert faults[:2] == ["", ""] and "malformed row" in faults[2]


def test_placeholders_in_the_question_say_where_the_pictures_go(folder: Path) -> None:
    rows = [
        {"image": ["a.png", "b.png"], "question": "From <image> to <image>: what changed?", "answer": "colour"},
        {"image": "a.png", "question": "<image> and <image>?", "answer": "colour"},
    ]
    right, wrong = read("vqa", write(folder / "q.json", rows))
    content = right.sample.messages[0].content
    assert [part if isinstance(part, str) else part.source.name for part in content] == [
        "From ", "a.png", " to ", "b.png", ": what changed?",
    ]  # fmt: skip
    assert "2 <image> placeholders" in wrong.fault


def test_known_answers_of_unreadable_rows_count_for_the_chance_level(folder: Path) -> None:
    rows = [{"question": "?", "answer": "red"}, {"question": "?", "answer": "red", "image": "gone.png"}]
    assert [example.credit for example in read("vqa", write(folder / "q.json", rows))] == [{"red": 1.0}] * 2


def test_media_root(folder: Path) -> None:
    inner = folder / "files"
    inner.mkdir()
    write(inner / "q.json", [{"question": "?", "answer": "red", "image": "a.png"}])
    spec = Eval(task="vqa", path="files/q.json", media_root=".")
    assert not build_task(spec).examples(spec, folder)[0].fault


def test_prompt_and_columns_read_popes_files(folder: Path) -> None:
    rows = [{"question_id": 1, "image": "a.png", "text": "Is there a {choices} dog?", "label": "no"}]
    (example,) = read(
        "vqa",
        write(folder / "pope.jsonl", rows),
        metric="yes_no",
        columns={"id": "question_id", "question": "text", "answer": "label"},
        prompt="{question}\nPlease answer yes or no.",
    )
    assert example.sample.messages[0].text == "Is there a {choices} dog?\nPlease answer yes or no."
    assert example.sample.id == "1" and example.reference.answers == ("no",)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prompt": "no place"}, "question"), ({"columns": {"quest": "x"}}, "quest"), ({"metric": "bleu"}, "bleu")],
)
def test_wrong_options(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read("vqa", folder / "q.json", **options)


@pytest.mark.parametrize("answer", ["B", "b", "B.", 1, "dog", "Dog"])
def test_multiple_choice_takes_letters_indices_and_texts(folder: Path, answer: Any) -> None:
    rows = [{"question": "Which {choices}?", "choices": ["cat", "dog", "cow"], "answer": answer}]
    (example,) = read("multiple_choice", write(folder / "q.json", rows))
    assert example.reference.answers == ("B",) and example.metric == "choice"
    text = example.sample.messages[0].text
    assert text.startswith("Which {choices}?\nA. cat\nB. dog\nC. cow\n")
    assert [METRICS["choice"].score(reply, example.reference) for reply in ("B", "dog", "A", "")] == [1, 1, 0, 0]


def test_files_that_are_no_question_files(folder: Path) -> None:
    (folder / "broken.json").write_text('[{"question"')
    for name in ("broken.json", "missing.json"):
        with pytest.raises(ValueError, match=name):
            read("vqa", folder / name)
    with pytest.raises(ValueError, match="no questions"):
        evaluate(None, None, Eval(task="vqa", path=str(write(folder / "empty.json", []))), progress=False)


def test_from_file_to_figures_with_the_tiny_model(folder: Path, tiny_model: Any) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:40])
    rows = [
        {"image": "a.png", "question": "what color ?", "answer": "red", "kind": "color"},
        {"image": "cut.png", "question": "what color ?", "answer": "blue", "kind": "color"},
        {"question": "is it red ?", "answer": "yes", "kind": "claim", "metric": "yes_no"},
    ]
    model, processor = tiny_model
    spec = Eval(task="vqa", path=str(write(folder / "q.json", rows)), max_new_tokens=4)
    result = evaluate(model, processor, spec, progress=False)
    assert result["color"]["n"] == 2 and result["color"]["chance"] == 0.5
    (fault,) = result.report["faults"]
    assert fault["id"] == "1" and fault["where"] == "q.json:row 1" and "not a picture" in fault["reason"]
    again = evaluate(model, processor, spec, progress=False)
    assert [reply.text for reply in again.replies] == [reply.text for reply in result.replies]
    blind = evaluate(model, processor, spec.model_copy(update={"options": {"blind": True}}), progress=False)
    assert blind.replies[0].text == blind.replies[1].text  # the same question, nothing seen
