"""Uploads what a run makes while it runs: a thread of the launching process that starts one upload after the other.

What is to be uploaded stands on the disk: complete stages whose upload is not noted in their `pushed.json`, and
snapshots (`hub_snapshots`). So a run that is started again uploads what was missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.export.hub_job import Job
from sparsevlm.export.hub_record import read_pushes, state_of
from sparsevlm.export.hub_scan import mask
from sparsevlm.recipe.hub import describe_hub
from sparsevlm.recipe.load import RecipeError, option_fault
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train import hub_snapshots as snapshots

if TYPE_CHECKING:
    from rich.console import Console

POLL = 1.0
"""Seconds between looks for a snapshot."""
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0
"""Seconds before a failed upload is tried again: the first time, doubled each time, and at most."""
LONGEST_PUSH = 6 * 3600.0
"""Seconds after which an upload is ended and begun again; what has arrived is not sent again."""
CHECK_LIMIT = 60.0
"""Seconds that the start of a run waits for the Hub."""
_REFUSED = 2


@dataclass
class _Pending:
    """An upload to be done: a stage, or (with a step) a snapshot of one."""

    stage: str
    directory: Path
    step: int | None = None
    error: str = ""
    given_up: bool = False

    def __str__(self) -> str:
        return f"stage {self.stage}" + (f", step {self.step}" if self.step is not None else "")


def check_hub(recipe: Recipe, console: Console) -> None:
    """Look before training whether the Hub takes what the run will make; makes the repository.

    Raises:
        RecipeError: It does not: no token, one that may not write, or a public repository.
    """
    hub = recipe.hub
    if hub is None:
        return
    first = next(name for name in recipe.stages if hub.stages is None or name in hub.stages)
    done = _start(Job(hub.repo, hub.private, revisions=[first]), CHECK_LIMIT, threading.Event())
    if done is None:
        console.print(f"hub: {describe_hub(hub, list(recipe.stages))}", highlight=False, markup=False)
        return
    error, code = done
    if code == _REFUSED:
        raise RecipeError([option_fault(recipe, ("hub", "repo"), error.removeprefix("--"))])
    console.print(f"hub: {error}. Training starts; uploads are tried again", highlight=False, markup=False)


def _start(job: Job, limit: float, stop: threading.Event) -> tuple[str, int] | None:
    """Do a job in a process of its own.

    Args:
        job: The job.
        limit: Seconds after which it is ended.
        stop: Ends it at once.

    Returns:
        None when it is done, else what went wrong and the exit code.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "sparsevlm.export.hub_job"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=told, env=environment)
        assert process.stdin is not None
        try:
            process.stdin.write(job.text().encode())
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it could not start; its message follows
        until = time.monotonic() + limit
        while process.poll() is None and time.monotonic() < until and not stop.wait(0.1):
            pass
        late = process.poll() is None
        process.kill()
        code = process.wait()
        process.stdin.close()
        if late:
            return f"no end after {limit:.0f} s" if not stop.is_set() else "it was not done in time", 1
        out.seek(0)
        told.seek(0)
        answer, complaint = out.read().decode(errors="replace"), told.read().decode(errors="replace")
    try:
        error = json.loads(answer.strip().splitlines()[-1])["error"]
    except (ValueError, IndexError, KeyError):
        last = complaint.strip().splitlines()[-1:] or [f"its process ended with {code}"]
        return mask(last[0]), 1
    return None if error is None else (mask(error), code)


class HubPusher:
    """Uploads stages and snapshots in the background; use it in a `with`, which ends with a bounded wait.

    Args:
        recipe: The recipe; without `hub` nothing is done.
        run_dir: The run.
        console: Where warnings go.
        active: False on machines that do not upload.
        endpoint: Address of the Hub; default huggingface_hub's.
    """

    def __init__(
        self, recipe: Recipe, run_dir: Path, console: Console, *, active: bool = True, endpoint: str | None = None
    ) -> None:
        self.hub = recipe.hub if active else None
        self.names = [name for name in recipe.stages if self.hub and (not self.hub.stages or name in self.hub.stages)]
        self.run_dir, self.console, self._endpoint = run_dir, console, endpoint
        self._pending: list[_Pending] = []
        self._snapshot: _Pending | None = None
        self._lock = threading.Lock()
        self._wake, self._closing, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)

    @property
    def endpoint(self) -> str:
        """Address of the Hub."""
        if self._endpoint is None:
            from huggingface_hub import constants

            self._endpoint = constants.ENDPOINT
        return self._endpoint

    def __enter__(self) -> HubPusher:
        if self.hub is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        if self.hub is None:
            return
        with self._lock:
            waiting = [str(job) for job in self._pending]
        if kind is None and waiting:
            self._say(f"waiting for the upload of {', '.join(waiting)}, {self.hub.wait:g} s at most")
        self._closing.set()
        self._wake.set()
        self._thread.join(self.hub.wait if kind is None else 0.0)
        self._stop.set()
        self._wake.set()
        self._thread.join()
        if kind is None:
            self._report()
        elif waiting:
            self._say(f"{', '.join(waiting)}: not uploaded yet; started again, the run does that first")

    def stage_done(self, name: str) -> None:
        """Upload a complete stage, unless that is done; its snapshots are of no use then."""
        if self.hub is None or name not in self.names:
            return
        with self._lock:
            if not any(job.stage == name for job in self._pending) and self._missing(name):
                self._pending.append(_Pending(name, self.run_dir / name))
        self._wake.set()

    def _missing(self, name: str) -> list[str]:
        """Return the branches that do not hold a complete stage as it is; `main` is for the last one only."""
        assert self.hub is not None
        done = [stage for stage in self.names if (self.run_dir / stage / "COMPLETE").is_file()]
        wanted = [name, "main"] if done[-1:] == [name] else [name]
        here, state = (self.endpoint, self.hub.repo), state_of(self.run_dir / name)
        pushes = read_pushes(self.run_dir / name)
        there = {row.revision for row in pushes if (row.endpoint, row.repo, row.state) == (*here, state)}
        return [revision for revision in wanted if revision not in there]

    def _run(self) -> None:
        """Upload one after the other until the run ends and nothing is left, or until it is stopped."""
        failures = 0
        while not self._stop.is_set():
            try:
                job = self._next()
            except OSError as error:  # of the disk
                self._say(f"the snapshots cannot be read: {error}")
                job = None
            if job is None:
                if self._closing.is_set():
                    return
                self._wait(POLL)
                continue
            closing = self._closing.is_set()
            outcome = self._push(job)
            if outcome is None:
                failures = 0
                continue
            job.error, code = outcome
            if self._stop.is_set():
                return
            failures += 1
            pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
            job.given_up = closing and code == _REFUSED
            later = "" if job.given_up else f"; tried again in {pause:.0f} s"
            self._say(f"{job} was not uploaded: {job.error}{later}")
            if not job.given_up:
                self._wait(pause)

    def _wait(self, seconds: float) -> None:
        """Wait, but not on when the run ends."""
        until = time.monotonic() + seconds
        closing = self._closing.is_set()
        while (left := until - time.monotonic()) > 0 and not self._stop.is_set():
            if self._closing.is_set() != closing:
                return
            self._wake.wait(left)
            self._wake.clear()
            if seconds <= POLL:
                return

    def _next(self) -> _Pending | None:
        """Return what to upload now: stages in their order, then the newest snapshot."""
        with self._lock:
            complete = {name for name in self.names if (self.run_dir / name / "COMPLETE").is_file()}
            for name in complete:
                shutil.rmtree(self.run_dir / name / snapshots.FOLDER, ignore_errors=True)
            if self._snapshot is not None and self._snapshot.stage in complete:
                self._snapshot = None
            stage = next((job for job in self._pending if not job.given_up), None)
            if stage is not None or self._closing.is_set():
                return stage
            return self._next_snapshot()

    def _next_snapshot(self) -> _Pending | None:
        """Return the snapshot that is going up, or claim the newest that waits."""
        for name in self.names:
            going, waiting = (snapshots.found(self.run_dir / name, kind) for kind in ("pushing", "step"))
            if waiting and (newest := snapshots.claim(waiting[-1][1])) is not None:
                for step, path in [*going, *waiting[:-1]]:
                    self._say(f"stage {name}, step {step} is left out: step {waiting[-1][0]} is there now")
                    snapshots.drop(path)
                going = [(waiting[-1][0], newest)]
            if going:
                step, path = going[-1]
                if self._snapshot is None or self._snapshot.directory != path:
                    self._snapshot = _Pending(name, path, step)
                return self._snapshot
        return None

    def _push(self, job: _Pending) -> tuple[str, int] | None:
        """Upload; return what went wrong."""
        hub = self.hub
        assert hub is not None
        revisions = [job.stage] if job.step is not None else self._missing(job.stage)
        outcome = _start(
            Job(
                hub.repo,
                hub.private,
                str(job.directory),
                revisions,
                hub.license,
                hub.adapter_only,
                f"{job.stage}-base",
            ),
            LONGEST_PUSH,
            self._stop,
        )
        if outcome is not None:
            return outcome
        with self._lock:
            if job.step is None:
                self._pending.remove(job)
            else:
                self._snapshot = None
                snapshots.drop(job.directory)
        self._say(f"{job} is at {hub.repo} ({', '.join(revisions)})")
        return None

    def _report(self) -> None:
        """Name what is not on the Hub, with the commands that bring it there."""
        hub = self.hub
        assert hub is not None
        options = " --private" if hub.private else ""
        options += f" --license {hub.license}" if hub.license else ""
        for job in self._pending:
            alone = " --adapter-only" if hub.adapter_only and (job.directory / "adapter_config.json").is_file() else ""
            self._say(f"{job} is NOT on the Hub: {job.error or 'there was no time for it'}. By hand:")
            for revision in self._missing(job.stage):
                branch = "" if revision == "main" else f" --revision {revision}"
                self._say(f"  sparsevlm push {job.directory} {hub.repo}{branch}{options}{alone}")

    def _say(self, line: str) -> None:
        self.console.print(f"hub: {line}", highlight=False, markup=False, soft_wrap=True)
