"""What our methods have in common as tuners of PEFT: what they add depends on the input, so it is never merged."""

from __future__ import annotations

from typing import ClassVar

from peft.tuners.tuners_utils import BaseTuner


class UnmergeableTuner(BaseTuner):
    """A tuner that refuses to merge, and to take apart what was not merged."""

    merge_refused: ClassVar[str]
    """Why, and what to do instead."""
    target_module_mapping: dict[str, list[str]] = {}

    def _check_merge_allowed(self) -> None:
        raise ValueError(self.merge_refused)

    def unmerge_adapter(self) -> None:
        """Refuse, as nothing was merged."""
        raise ValueError(self.merge_refused)
