"""The recipe's section on uploading what a run makes, while it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from sparsevlm.recipe.section import KEY, CrossFault, Strict, names, view
from sparsevlm.registry import suggest

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


class Hub(Strict):
    """Upload each stage to the Hugging Face Hub when it ends, beside training (docs/hub.md).

    A stage goes to the branch of its name and, as the newest of the run, to `main`. No failure of the Hub stops a run.
    """

    repo: str
    """OWNER/NAME; made where there is none. The token is that of `hf auth login` or HF_TOKEN."""
    private: bool = True
    """Make it private; a repository that is there and public is then refused."""
    stages: list[str] | None = Field(default=None, min_length=1)
    """Stages to upload; default: all."""
    every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints that are uploaded to the stage's branch as models to load; default: none. Each is
    written to the disk first: up to three beside the stage's own."""
    adapter_only: bool = False
    """Upload adapters without the model that they belong to, which is then referred to: the stage before, or what is
    uploaded to the branch STAGE-base. Else it goes beside them, in the folder `base`."""
    license: str | None = None
    """Licence of the models for their cards, as the Hub spells it: apache-2.0, mit, …"""
    wait: float = Field(default=600, ge=0)
    """Seconds that the end of the run waits for uploads at most; what is missing then is named."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        repo, license = raw.get("repo"), raw.get("license")
        if isinstance(repo, str) and not _REPO.fullmatch(repo):
            yield ("repo",), f"expected OWNER/NAME, e.g. your-name/my-model, got {repo!r}"
        if isinstance(license, str) and not _LICENSE.fullmatch(license):
            yield ("license",), f"give it as the Hub spells it, e.g. apache-2.0, mit, other, got {license!r}"


def hub_faults(raw: Any, stages: list[str]) -> Iterator[CrossFault]:
    """Yield what does not go together in `hub` and the names of the stages; paths start at the recipe."""
    hub = view(raw)
    if not hub:
        return
    for i, name in enumerate(names(hub.get("stages"))):
        if name not in stages:
            yield ("hub", "stages", i), f"no stage {name!r} in stages{suggest(name, stages)}"
    if "main" in stages:
        yield ("stages", "main", KEY), "a stage that 'hub' uploads cannot be called 'main': its branch would be main"


def describe_hub(hub: Hub, stages: list[str]) -> str:
    """Say in a line what is uploaded where."""
    chosen = ", ".join(hub.stages if hub.stages is not None else stages)
    often = f", and every {hub.every} steps to the stage's" if hub.every else ""
    how = "adapters without their base" if hub.adapter_only else ""
    seen = "private" if hub.private else "public"
    extra = f" ({how})" if how else ""
    return f"{hub.repo} ({seen}): {chosen}, each to a branch of its name and to main when it ends{often}{extra}"
