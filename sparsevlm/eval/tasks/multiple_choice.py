"""Multiple-choice questions from a file: `vqa` with `choice` as its metric."""

from __future__ import annotations

from sparsevlm.eval.tasks.vqa import MetricName, VqaTask
from sparsevlm.registry import EVAL_TASKS


@EVAL_TASKS.register("multiple_choice")
class MultipleChoiceTask(VqaTask):
    """Questions with `choices`, answered by a letter (or by the text of an option)."""

    metric: MetricName = "choice"
    """How rows are scored that name no `metric` themselves."""
