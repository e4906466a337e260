"""Multiple-choice questions from a file: `vqa` with `choice` as its metric."""

from __future__ import annotations

from typing import Literal

from sparsevlm.eval.tasks.vqa import MetricName, VqaTask
from sparsevlm.registry import EVAL_TASKS


@EVAL_TASKS.register("multiple_choice")
class MultipleChoiceTask(VqaTask):
    """Questions with `choices`, answered by a letter (or by the text of an option)."""

    metric: MetricName = "choice"
    """How rows are scored that name no `metric` themselves."""
    rank: Literal["sum", "mean"] | None = None
    """Take the likeliest option for the reply instead of letting the model write a letter, as InstructBLIP does: by the
    log-likelihood of all its tokens (`sum`) or of one in the mean (`mean`). The prompt is then the bare question unless
    `prompt` says another."""

    @property
    def ranks(self) -> Literal["sum", "mean"] | None:
        """See `EvalTask.ranks`."""
        return self.rank

    @property
    def choice_prompt(self) -> str:
        """See `VqaTask.choice_prompt`."""
        return super().choice_prompt if self.rank is None else "{question}"
