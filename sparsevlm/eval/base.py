"""What an evaluation task is: where its questions come from, and how replies are scored and summed up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from sparsevlm.data.sample import BadSampleError, Message, Sample
from sparsevlm.eval.metrics import METRICS, Metric, Reference, constant_answer, normalise_answer, yes_no_report

if TYPE_CHECKING:
    from sparsevlm.recipe.schema import Eval

Kinds = dict[str, dict[str, Any]]
"""Question kind -> ``{"accuracy", "chance", "n", "core"}``."""


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        sample: The conversation up to the user's last turn.
        kind: Question kind, the row of the result table.
        reference: What is accepted.
        metric: Name of the metric in `METRICS`.
        core: Whether the question counts for the headline figure; a kind does when all its questions do.
        fault: Why the question cannot be asked; it is then counted as answered wrongly, and named.
    """

    sample: Sample
    kind: str = "all"
    reference: Reference = field(default_factory=Reference)
    metric: str = "exact"
    core: bool = True
    fault: str = ""

    @property
    def credit(self) -> dict[str, float]:
        """What every reply would earn (see `Metric.credit`); nothing where no answer is known."""
        return METRICS[self.metric].credit(self.reference) if self.reference.answers else {}


@dataclass(frozen=True)
class Reply:
    """What the model said to an example.

    Attributes:
        example: The question.
        text: The reply; None where the question could not be asked.
        score: What it earned, in ``[0, 1]``.
        fault: Why it could not be asked.
    """

    example: Example
    text: str | None
    score: float
    fault: str = ""

    def record(self) -> dict[str, Any]:
        """Return the reply as a line of the predictions file."""
        sample = self.example.sample
        record = {
            "id": sample.id,
            "kind": self.example.kind,
            "question": sample.messages[-1].text if sample.messages else "",
            "answers": list(self.example.reference.answers),
            "prediction": self.text,
            "score": self.score,
        }
        return record | ({"fault": self.fault, "where": sample.where} if self.fault else {})


class EvalTask(BaseModel):
    """Base of all evaluation tasks; a subclass declares its options as fields and yields examples.

    A task is one file in `sparsevlm/eval/tasks` with ``@EVAL_TASKS.register("name")`` above the class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    blind: bool = False
    """Ask without pictures and videos: what the language model knows or guesses alone."""

    @property
    def ranks(self) -> Literal["sum", "mean"] | None:
        """How options are ranked by their likelihood (see `eval.ranking`); None where the model writes its answers."""
        return None

    def examples(self, spec: Eval, base_dir: Path) -> list[Example]:
        """Return the questions in a fixed order.

        Args:
            spec: The evaluation in the recipe; at most ``spec.limit`` examples are used, more may be returned.
            base_dir: Folder that a relative ``spec.path`` starts from.

        Raises:
            ValueError: The data as a whole cannot be used. A single bad row is an `Example` with a `fault` instead.
        """
        raise NotImplementedError

    def score(self, text: str, example: Example) -> float:
        """Return what a reply earns, in ``[0, 1]``."""
        metric: Metric = METRICS[example.metric]
        return metric.score(text, example.reference)

    def summarise(self, replies: Sequence[Reply]) -> tuple[Kinds, dict[str, Any]]:
        """Return the table by question kind, and the report over all of them (see `docs/evaluation.md`)."""
        kinds = {kind: summarise_kind(group) for kind, group in sorted(by_kind(replies).items())}
        core = [reply for reply in replies if kinds[reply.example.kind]["core"]]
        report: dict[str, Any] = {
            "n": len(replies),
            "accuracy": mean(reply.score for reply in replies),
            "chance": mean(kinds[reply.example.kind]["chance"] for reply in replies),
            "core_accuracy": mean(reply.score for reply in core) if core else None,
            "core_chance": mean(kinds[reply.example.kind]["chance"] for reply in core) if core else None,
            "constant_answers": {
                kind: constant_answer(reply.example.credit for reply in group)[0]
                for kind, group in sorted(by_kind(replies).items())
            },
            "yes_no": yes_no_summary(replies),
            "faults": [
                {"id": reply.example.sample.id, "where": reply.example.sample.where, "reason": reply.fault}
                for reply in replies
                if reply.fault
            ],
        }
        return kinds, report


def by_kind(replies: Iterable[Reply]) -> dict[str, list[Reply]]:
    """Group replies by question kind, each group in order."""
    groups: dict[str, list[Reply]] = {}
    for reply in replies:
        groups.setdefault(reply.example.kind, []).append(reply)
    return groups


def summarise_kind(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return ``accuracy``, ``chance`` (best constant answer), ``n`` and ``core`` of one kind's replies."""
    return {
        "accuracy": mean(reply.score for reply in replies),
        "chance": constant_answer(reply.example.credit for reply in replies)[1],
        "n": len(replies),
        "core": all(reply.example.core for reply in replies),
    }


def yes_no_summary(replies: Sequence[Reply]) -> dict[str, dict[str, float | int]]:
    """Return POPE's figures for every kind whose accepted answers are all yes or no, and for ``overall``."""
    groups = {
        kind: group
        for kind, group in sorted(by_kind(replies).items())
        if {asks_yes_no(reply.example.reference) for reply in group if reply.example.reference.answers} == {True}
    }
    if not groups:
        return {}
    groups["overall"] = [reply for group in groups.values() for reply in group]
    return {
        kind: yes_no_report((reply.text, _is_yes(reply.example.reference)) for reply in group)
        for kind, group in groups.items()
    }


def asks_yes_no(reference: Reference) -> bool:
    """Tell whether exactly one of yes and no is accepted."""
    return {normalise_answer(answer) for answer in reference.answers} in ({"yes"}, {"no"})


def _is_yes(reference: Reference) -> bool | None:
    return normalise_answer(reference.answers[0]) == "yes" if reference.answers else None


def mean(values: Iterable[float]) -> float:
    """Return the mean; 0 of nothing."""
    collected = list(values)
    return sum(collected) / len(collected) if collected else 0.0


def as_question(sample: Sample) -> Sample:
    """Return a conversation cut after the user's last turn.

    Raises:
        BadSampleError: There is no user turn.
    """
    turns = [i for i, message in enumerate(sample.messages) if message.role == "user"]
    if not turns:
        raise BadSampleError(f"{sample.where or sample.id}: the conversation has no user turn to answer")
    return replace(sample, messages=sample.messages[: turns[-1] + 1])


def without_media(sample: Sample) -> Sample:
    """Return a conversation with its pictures and videos left out."""
    messages = tuple(
        Message(message.role, tuple(part for part in message.content if isinstance(part, str)))
        for message in sample.messages
    )
    return replace(sample, messages=messages)
