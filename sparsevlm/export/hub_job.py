"""One upload in a process of its own, for a run that goes on meanwhile: reads a job, prints what became of it.

    echo '{"path": …, "repo": …}' | python -m sparsevlm.export.hub_job

A process, not a thread: hashing takes no time from training, and one that hangs can be ended. It ends itself with the
one that started it, whose pipe it reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_REFUSED, _FAILED, _ORPHANED = 2, 1, 3
_GENTLE = 10


@dataclass(frozen=True)
class Job:
    """What to upload.

    Attributes:
        repo: ``OWNER/NAME``.
        private: As for `hub.push`.
        path: A stage or a snapshot of one; None: only look whether the repository can be written to, making it.
        revisions: Branches that it goes to.
        license: As for `hub.push`.
        adapter_only: As for `hub.push`, where it holds an adapter; a base that is nowhere yet goes to `base_revision`.
        base_revision: Branch.
    """

    repo: str
    private: bool
    path: str | None = None
    revisions: list[str] = field(default_factory=list)
    license: str | None = None
    adapter_only: bool = False
    base_revision: str = "base"

    def text(self) -> str:
        """Return it as a line."""
        return json.dumps(asdict(self)) + "\n"


def run(job: Job) -> None:
    """Do a job.

    Raises:
        ValueError: The Hub refuses, or something is wrong with the files.
        OSError: The Hub could not be reached.
    """
    from sparsevlm.adapters.saved import is_adapter
    from sparsevlm.export import hub
    from sparsevlm.export.hub_client import ensure_repo

    if job.path is None:
        ensure_repo(job.repo, private=job.private, branches=job.revisions)
        return
    how: dict[str, Any] = {"private": job.private, "license": job.license}
    alone = job.adapter_only and is_adapter(job.path)
    if alone:
        _push_base(job, how)
    for revision in job.revisions:
        hub.push(job.path, job.repo, revision=None if revision == "main" else revision, adapter_only=alone, **how)


def _push_base(job: Job, how: dict[str, Any]) -> None:
    """Upload the model that an adapter belongs to, where that was not done yet."""
    from huggingface_hub import constants

    from sparsevlm.adapters.saved import find_parent
    from sparsevlm.export import hub
    from sparsevlm.export.hub_record import read_pushes

    base = find_parent(Path(str(job.path)))
    if not any((row.endpoint, row.repo) == (constants.ENDPOINT, job.repo) for row in read_pushes(base)):
        hub.push(base, job.repo, revision=job.base_revision, **how)


def main() -> int:
    """Read a job from standard input, do it, print ``{"error": null}`` or what went wrong."""
    if hasattr(os, "nice"):
        os.nice(_GENTLE)
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    error, code = None, 0
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the answer is all that is printed
            run(job)
    except ValueError as refused:
        error, code = str(refused), _REFUSED
    except OSError as failed:
        error, code = str(failed), _FAILED
    print(json.dumps({"error": error}), flush=True)
    # At once: threads of a client may wait for a server for ever.
    os._exit(code)


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(_ORPHANED)


if __name__ == "__main__":
    main()
