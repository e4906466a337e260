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

from sparsevlm.data.rows import RowContext, open_rows
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

    def examples(self, spec: Eval, base_dir: Path) -> list[Example]:
        """Read the file; see `EvalTask.examples`."""
        path = base_dir / spec.path
        root = base_dir / spec.media_root if spec.media_root else path.parent
        rows = open_rows(Source(path=spec.path, format="vqa", limit=spec.limit), base_dir)
        examples = [self._example(raw, index, path.name, root) for index, raw in enumerate(rows)]
        if examples and all(example.fault for example in examples):
            raise ValueError(
                f"{path}: none of its {len(examples)} rows can be used; the first: {examples[0].fault}. "
                "See docs/evaluation.md for the columns, and the option 'columns' to rename them"
            )
        return examples

    def _example(self, raw: Any, index: int, file: str, root: Path) -> Example:
        where = f"{file}:row {index}"
        if not isinstance(raw, dict):
            return Example(
                Sample((), str(index), where=where), fault=f"the row is a {type(raw).__name__}, not an object"
            )
        get = {name: raw.get(self.columns.get(name, name)) for name in COLUMNS}.get
        identity = str(index if get("id") is None else get("id"))
        kind = "all" if get("kind") is None else str(get("kind"))
        core = get("core") is not False
        metric: Any = get("metric") or self.metric
        context = RowContext(source=file, index=index, id=identity, where=where, media_root=root)
        sample = context.make(())
        reference = Reference()
        try:
            question = _Question.parse(get, metric)
            reference = question.reference
            prompt = self.prompt or (CHOICE_PROMPT if metric == "choice" else "{question}")
            content = (*_media(get, context), question.fill(prompt))
            sample = context.make([Message("user", content)])
        except BadSampleError as error:
            return Example(sample, kind, reference, _known(metric), core, fault=str(error))
        return Example(sample, kind, reference, metric, core)


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


def _media(get: Any, context: RowContext) -> list[Media]:
    """Return the row's pictures and videos, pictures first."""
    media = []
    for name, kind in (("image", MediaKind.IMAGE), ("video", MediaKind.VIDEO)):
        value = get(name)
        for path in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(path, str):
                raise BadSampleError(f"'{name}' is {path!r}, not a path")
            media.append(Media(kind, context.resolve(path)))
    return media
