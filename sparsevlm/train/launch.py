"""Runs a recipe's stages in order, here or in torchrun's processes, and goes on where a killed run stopped."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevlm.recipe.load import RecipeError, dump_recipe, load_recipe, option_fault
from sparsevlm.recipe.schema import Recipe
from sparsevlm.train import checkpoints
from sparsevlm.train.expert_parallel import find_faults, find_model_faults
from sparsevlm.train.fingerprint import check_unchanged
from sparsevlm.train.hub_push import HubPusher, check_hub
from sparsevlm.train.sharding import uses_deepspeed
from sparsevlm.train.summary import STAGE_FILE, StageSummary, print_run, write_summary

if TYPE_CHECKING:
    from rich.console import Console

RECIPE = "recipe.yaml"
LOCK = ".lock"
DATA_FILES = (".json", ".jsonl", ".parquet")
WAIT_FOR_LOCK = 60.0
"""Seconds that a run waits for the processes of an earlier one, which may just be going down."""


class LaunchError(RuntimeError):
    """A process of a stage failed; its own message stands above."""


def train(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    gpus: int | None = None,
    nproc: int | None = None,
    nnodes: int = 1,
    node_rank: int = 0,
    rdzv: str | None = None,
    output: str | Path | None = None,
) -> list[StageSummary]:
    """Run a recipe.

    Finished stages are skipped, an interrupted one goes on from its last complete checkpoint. With several machines
    every one runs the same command with its own `node_rank`, on a run directory that all see.

    Args:
        recipe_path: The YAML file.
        overrides: ``dotted.path=value`` each.
        gpus: Processes on this machine, one a GPU.
        nproc: Processes on this machine, on CPU (or instead of `gpus`).
        nnodes: Machines.
        node_rank: Which of them this is.
        rdzv: ``HOST:PORT`` of machine 0, where they meet.
        output: Run directory instead of the recipe's.

    Returns:
        A row a stage, as in ``RUN/summary.json``.

    Raises:
        RecipeError: The recipe is wrong, or does not fit its parts, its data or the number of processes.
        ValueError: A finished stage was made from another recipe, or something is wrong with the data.
        LaunchError: A process failed.
    """
    from rich.console import Console

    from sparsevlm.train.evaluation import refresh_evals

    recipe = load_recipe(recipe_path, overrides)
    run_dir = Path(output or recipe.run_dir)
    processes = _processes(gpus, nproc, nnodes, rdzv)
    console = Console(file=sys.stderr)
    _check(recipe, processes * nnodes, console)
    if node_rank == 0:
        check_hub(recipe, console)
    run_dir.mkdir(parents=True, exist_ok=True)
    locked = _locked(run_dir, console) if node_rank == 0 else contextlib.nullcontext()
    with locked as lock, HubPusher(recipe, run_dir, console, active=node_rank == 0) as hub:
        if node_rank == 0:
            checkpoints.write_atomically(run_dir / RECIPE, dump_recipe(recipe))
        parent: Path | None = None
        for name in recipe.stages:
            stage_dir = run_dir / name
            if _is_finished(recipe, name, stage_dir, parent):
                console.print(f"{name}: complete in {stage_dir}", highlight=False)
                if node_rank == 0:
                    refresh_evals(recipe, name, stage_dir, console)
            elif processes * nnodes == 1 and not uses_deepspeed(recipe, recipe.stages[name], 1):
                _run_here(recipe, name, parent, run_dir, console)
            else:
                nodes = (processes, nnodes, node_rank, rdzv)
                _run_processes(recipe, name, parent, run_dir, nodes, lock, console)
            parent = stage_dir
            rows = write_summary(run_dir, list(recipe.stages)) if node_rank == 0 else []
            hub.stage_done(name)
        if rows:
            print_run(rows, Console())
            console.print(f"run directory: {run_dir}", highlight=False)
    return rows


def _processes(gpus: int | None, nproc: int | None, nnodes: int, rdzv: str | None) -> int:
    """Return the processes on this machine."""
    if gpus is not None and nproc is not None and gpus != nproc:
        raise ValueError(f"--gpus {gpus} and --nproc {nproc} contradict each other; give one of them")
    if nnodes > 1 and rdzv is None:
        raise ValueError(f"--nnodes {nnodes} needs --rdzv HOST:PORT, an address of machine 0 that all machines reach")
    if gpus is not None:
        import torch

        found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        if gpus > found:
            raise ValueError(f"--gpus {gpus}, but this machine has {found}; use --nproc {gpus} for processes on CPU")
    return gpus or nproc or 1


def _check(recipe: Recipe, world_size: int, console: Console) -> None:
    """Refuse what would stop a later stage, before the first one is trained.

    Raises:
        RecipeError: All that was found, each at its line.
    """
    from sparsevlm.model.parts import part_config
    from sparsevlm.train.loader import accumulation_steps, fit_rows
    from sparsevlm.train.plan import plan

    recipe = fit_rows(recipe, world_size)
    faults = []
    for name, stage in recipe.stages.items():
        try:
            accumulation_steps(stage.batch, world_size)
        except ValueError as error:
            faults.append(option_fault(recipe, ("stages", name, "batch", "rows"), str(error)))
    used = {source for stage in recipe.stages.values() for source in stage.data}
    places = [("data", name, recipe.data[name].path) for name in sorted(used)]
    for section, name, path in [*places, *(("evals", name, spec.path) for name, spec in recipe.evals.items())]:
        for file in [path] if isinstance(path, str) else path:
            if Path(file).suffix in DATA_FILES and not Path(file).is_file():
                faults.append(option_fault(recipe, (section, name, "path"), f"no file {file!r} in {Path.cwd()}"))
    faults += find_faults(recipe, world_size)
    if faults:
        raise RecipeError(faults)
    towers = [recipe.model.vision, *recipe.model.vision.beside]
    parts = [*(tower.path for tower in towers), recipe.model.language.path]
    for path in parts:
        part_config(path, recipe.model.trust_remote_code)  # what is on the Hub is then in its cache, where `plan` looks
    if not recipe.model.trust_remote_code:
        for note in plan(recipe, world=world_size)["notes"]:
            console.print(f"note: {note}", highlight=False, markup=False)
    elif faults := find_model_faults(recipe, world_size):
        raise RecipeError(faults)


def _is_finished(recipe: Recipe, name: str, stage_dir: Path, parent: Path | None) -> bool:
    """Tell whether a stage can be kept.

    Raises:
        ValueError: It is complete, but was made with other options or from another parent.
    """
    import json

    from sparsevlm.train.stage import finished_at

    if checkpoints.read_marker(stage_dir) is None:
        return False
    record = json.loads((stage_dir / STAGE_FILE).read_text(encoding="utf-8"))
    check_unchanged(record["inputs"], recipe, name, str(stage_dir))
    if parent is not None and record["parent"]["finished"] != finished_at(parent):
        raise ValueError(
            f"stage {name!r} in {stage_dir} was trained from an earlier {parent.name} than the one in {parent}; delete "
            f"{stage_dir} to train it anew"
        )
    return True


def _run_here(recipe: Recipe, name: str, parent: Path | None, run_dir: Path, console: Console) -> None:
    """Run a stage in this process."""
    # One process, one GPU; else the trainer would spread over all of them.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    from sparsevlm.train.stage import run_stage

    run_stage(recipe, name, parent, run_dir, console=console)
    gc.collect()


def _run_processes(
    recipe: Recipe,
    name: str,
    parent: Path | None,
    run_dir: Path,
    nodes: tuple[int, int, int, str | None],
    lock: Any,
    console: Console,
) -> None:
    """Run a stage under torchrun."""
    from sparsevlm.train.prepare import save_start

    processes, nnodes, node_rank, rdzv = nodes
    if node_rank == 0:
        save_start(recipe, name, parent, run_dir / name, console)
        gc.collect()
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--nnodes={nnodes}"]
    if nnodes == 1:
        command.append("--standalone")
    else:
        # A machine may have to wait until machine 0 has evaluated the stage before and prepared this one.
        command += [f"--node-rank={node_rank}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rdzv}"]
        command += [f"--rdzv-id={recipe.name}-{name}", "--rdzv-conf=join_timeout=86400,last_call_timeout=30"]
    command += ["-m", "sparsevlm.train.launch", str(run_dir), name]
    if parent is not None:
        command += ["--parent", str(parent)]
    console.print(f"{name}: {processes * nnodes} processes", highlight=False)
    code = _call(command, _environment(processes), lock)
    if code:
        raise LaunchError(f"stage {name!r} failed in one of its processes (exit code {code}); its message is above")


def _environment(processes: int) -> dict[str, str]:
    """Return the environment of the ranks."""
    import torch

    environment = dict(os.environ)
    if not torch.accelerator.is_available():
        threads = max(1, (os.cpu_count() or 1) // processes)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def _call(command: list[str], environment: dict[str, str], lock: Any) -> int:
    """Run a command to its end; it dies with this process, and keeps the run locked as long as it lives."""
    descriptors = () if lock is None else (lock.fileno(),)
    process = subprocess.Popen(
        command, env=environment, pass_fds=descriptors, preexec_fn=_die_with_parent if sys.platform == "linux" else None
    )
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent is killed."""
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


@contextlib.contextmanager
def _locked(run_dir: Path, console: Console) -> Iterator[Any]:
    """Keep other runs out of a run directory.

    Raises:
        ValueError: Another run keeps on using it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    with (run_dir / LOCK).open("w") as handle:
        until = time.monotonic() + WAIT_FOR_LOCK
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(
                        f"another run is using {run_dir}; wait for it, stop it, or set another output"
                    ) from None
                if not told:
                    console.print(f"waiting for the processes of an earlier run in {run_dir}", highlight=False)
                    told = True
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield handle


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of one rank: run a stage of a run directory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--parent", type=Path)
    options = parser.parse_args(arguments)

    from sparsevlm.train.prepare import prepared_start
    from sparsevlm.train.stage import run_stage

    recipe = load_recipe(options.run_dir / RECIPE)
    start = prepared_start(options.run_dir / options.stage, options.parent)
    try:
        run_stage(recipe, options.stage, options.parent, options.run_dir, start=start)
    except ValueError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        # At once: other ranks may wait in a collective operation for this one.
        os._exit(1)
    return 0


def leave(code: int) -> None:
    """End the process without tearing the interpreter down.

    The threads of process groups that DeepSpeed made are still there, and a rank that is torn down under them now and
    then aborts ("terminate called without an active exception"); torchrun would then stop rank 0, which may still
    evaluate.
    """
    atexit._run_exitfuncs()  # trackers finish their uploads there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
