"""Questions from a file: short answers, yes/no, soft accuracy over annotators, multiple choice.

A row (see `docs/evaluation.md`)::

    {"id": "7", "image": "cat.jpg", "question": "What animal is this?", "answer": "cat", "kind": "animal"}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from sparsevlm.data.columns import as_list
from sparsevlm.data.placeholders import IMAGE, VIDEO, Placeholders
from sparsevlm.data.rows import RowContext, Rows, shown
from sparsevlm.data.sample import BadSampleError, Media, Message, Sample
from sparsevlm.eval.base import EvalTask, Example, asks_yes_no
from sparsevlm.eval.metrics import Reference, extract_choice
from sparsevlm.recipe.schema import Source
from sparsevlm.registry import EVAL_TASKS
from sparsevlm.vision.tokens import MediaKind

if TYPE_CHECKING:
    from sparsevlm.recipe.schema import Eval

MetricName = Literal["exact", "yes_no", "choice", "vqa_soft", "vqa_official"]
COLUMNS = ("id", "image", "video", "question", "answer", "answers", "choices", "kind", "core", "metric")
CHOICE_PROMPT = "{question}\n{choices}\nAnswer with the option's letter from the given choices directly."
"""LLaVA-1.5's wording (paper, appendix A; also that of ScienceQA in its evaluation)."""


@EVAL_TASKS.register("vqa")
class VqaTask(EvalTask):
    """Questions of a JSON, JSONL or parquet file."""

    metric: MetricName = "exact"
    """How rows are scored that name no `metric` themselves."""
    prompt: str | None = None
    """Text around the question, e.g. `"{question}\\nAnswer the question using a single word or phrase."`. `{choices}`
    stands for the lettered options. Default: the bare question; for `choice` LLaVA-1.5's wording."""
    columns: dict[str, str] = Field(default={})
    """Our name -> the file's, where they differ: `{id: question_id, question: text, answer: label}` reads POPE's
    files."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(columns) - set(COLUMNS))
        if unknown:
            raise ValueError(f"columns maps unknown names {', '.join(unknown)} (known: {', '.join(COLUMNS)})")
        return columns

    @field_validator("prompt")
    @classmethod
    def _prompt_holds_question(cls, prompt: str | None) -> str | None:
        if prompt is not None and "{question}" not in prompt:
            raise ValueError(f"prompt {prompt!r} does not contain {{question}}")
        return prompt

    @property
    def choice_prompt(self) -> str:
        """Text around a question with options where `prompt` says none."""
        return CHOICE_PROMPT

    def examples(self, spec: Eval, base_dir: Path) -> list[Example]:
        """Read the file; see `EvalTask.examples`."""
        from sparsevlm.data.sources import open_rows

        rows = open_rows(Source(path=spec.path, format="vqa"), base_dir)
        assert isinstance(rows, Rows)  # nothing here asks for a stream
        root = base_dir / spec.media_root if spec.media_root else None
        count = min(len(rows), spec.limit or len(rows))
        examples = [self._example(rows, index, root) for index in range(count)]
        if examples and all(example.fault for example in examples):
            raise ValueError(
                f"{spec.path}: none of its {len(examples)} rows can be used; the first: {examples[0].fault}. "
                "See docs/evaluation.md for the columns, and the option 'columns' to rename them"
            )
        return examples

    def _example(self, rows: Rows, index: int, root: Path | None) -> Example:
        where = rows.where(index)
        try:
            raw = rows[index]
            if not isinstance(raw, dict):
                raise BadSampleError(f"malformed row: {shown(raw)} is not an object")
        except BadSampleError as error:
            return Example(Sample((), str(index), where=where), fault=str(error))
        get = {name: raw.get(self.columns.get(name, name)) for name in COLUMNS}.get
        identity = str(index if get("id") is None else get("id"))
        context = RowContext("", index, identity, where, root or rows.folder(index), rows.caches)
        kind = "all" if get("kind") is None else str(get("kind"))
        core = get("core") is not False
        metric: Any = get("metric") or self.metric
        reference, messages, fault = Reference(), (), ""
        try:
            question = _Question.parse(get, metric)
            reference = question.reference
            prompt = self.prompt or (self.choice_prompt if metric == "choice" else "{question}")
            messages = (Message("user", _content(question.fill(prompt), get, context)),)
        except BadSampleError as error:
            fault = str(error)
        return Example(context.make(messages), kind, reference, _known(metric), core, fault)


@dataclass(frozen=True)
class _Question:
    text: str
    reference: Reference

    @classmethod
    def parse(cls, get: Any, metric: str) -> _Question:
        text = get("question")
        if not isinstance(text, str) or not text.strip():
            raise BadSampleError(f"'question' is {text!r}, not a text")
        if metric != _known(metric):
            raise BadSampleError(f"unknown metric {metric!r} (known: {', '.join(MetricName.__args__)})")
        answers = get("answers") if get("answers") is not None else get("answer")
        answers = answers if isinstance(answers, list) else [answers]
        choices = get("choices") if metric == "choice" else None
        if metric == "choice":
            if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
                raise BadSampleError(f"'choices' is {choices!r}; a choice question has a list of 2 to 26 options")
            choices = [str(choice) for choice in choices]
            answers = [_letter(answer, choices) for answer in answers]
        if not answers or any(not isinstance(a, (str, int, float)) or isinstance(a, bool) for a in answers):
            raise BadSampleError(f"'answer' (or 'answers') is {answers!r}; expected a text, a number or a list of them")
        reference = Reference(tuple(str(answer) for answer in answers), tuple(choices or ()))
        if metric == "yes_no" and not asks_yes_no(reference):
            raise BadSampleError(f"a yes_no question has the answer 'yes' or 'no', got {answers!r}")
        if metric.startswith("vqa_") and len(answers) < 2:
            raise BadSampleError(f"metric {metric} needs the answers of several annotators, got {answers!r}")
        return cls(text.strip(), reference)

    def fill(self, prompt: str) -> str:
        choices = zip(ascii_uppercase, self.reference.choices)
        lettered = "\n".join(f"{letter}. {choice}" for letter, choice in choices)
        # The question goes in last: it may hold braces of its own.
        return prompt.replace("{choices}", lettered).replace("{question}", self.text)


def _letter(answer: Any, choices: list[str]) -> str:
    """Return the letter of a correct option given as letter, as text or as index from 0."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return ascii_uppercase[answer]
    if isinstance(answer, str):
        if choices.count(answer) == 1:
            return ascii_uppercase[choices.index(answer)]
        letter = extract_choice(answer, choices)
        if letter:
            return letter
    raise BadSampleError(f"answer {answer!r} is none of the options {choices!r}, nor a letter or an index of one")


def _known(metric: Any) -> str:
    """Return the metric, or `exact` for one that does not exist (its example has a fault then)."""
    return metric if metric in MetricName.__args__ else "exact"


def _content(text: str, get: Any, context: RowContext) -> tuple[str | Media, ...]:
    """Return a turn: media where the text has placeholders for them, else before the text, pictures first."""
    images = [context.media(MediaKind.IMAGE, value) for value in as_list(get("image"))]
    videos = [context.media(MediaKind.VIDEO, value) for value in as_list(get("video"))]
    if IMAGE not in text and VIDEO not in text:
        return (*images, *videos, text)
    places = Placeholders(images, videos)
    content = tuple(places.split(text))
    places.finish()
    return content
