"""The files of a run, as the report needs them. A run in progress lacks some, and its last line may be half written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsevlm.report.routing import LORA_EXPERTS, MOE, LiveRouting, Routing, live_routing, read_routing
from sparsevlm.rundir import COMPLETE

METRICS, STAGE_FILE, SKIPPED, ROUTING, RECIPE = (
    "metrics.jsonl",
    "stage.json",
    "skipped.jsonl",
    "routing.json",
    "recipe.yaml",
)
"""Names as training writes them (`sparsevlm.train.stage`, which is a layer above)."""


@dataclass(frozen=True)
class Stage:
    """What one stage has written so far.

    Attributes:
        name: The stage.
        complete: Whether its completion marker is there.
        rows: Lines of metrics.jsonl.
        record: stage.json; empty until the stage is complete.
        planned: Its options in the run's recipe; empty where there is no recipe.
        skipped: Records that could not be used, by reason.
        routing: What routing.json says; None for dense stages and until the stage is complete.
        live: Routing while training; None where no line has any.
        group: Routers that `routing` and `live` are of: of MoE layers, or of LoRA experts.
        others: The same stage with the routing of another group, where it has two.
        written: When the last log line was written.
    """

    name: str
    complete: bool
    rows: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, Any] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    routing: Routing | None = None
    live: LiveRouting | None = None
    group: str = MOE
    others: tuple[Stage, ...] = ()
    written: datetime | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """The stage's row of summary.json; empty until it is complete."""
        return self.record.get("summary", {})

    @property
    def steps(self) -> int:
        """Last step that was logged."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def planned_steps(self) -> int | None:
        """Steps that the recipe asks for; None where it counts in epochs."""
        return self.planned.get("steps")

    @property
    def trains(self) -> list[str]:
        """Parts that train."""
        return list(self.summary.get("trains") or self.planned.get("trains") or [])

    @property
    def sparse(self) -> bool:
        """Whether anything is known about routed experts."""
        return self.routing is not None or self.live is not None or bool(self._planned_routers)

    @property
    def _planned_routers(self) -> Mapping[str, Any]:
        """What the recipe says of the group's routers; empty where this stage makes none."""
        adapter = self.planned.get("adapter") or {}
        experts = adapter if adapter.get("type") == LORA_EXPERTS else {}
        return experts if self.group == LORA_EXPERTS else self.planned.get("upcycle") or {}

    @property
    def by_modality(self) -> bool:
        """Whether tokens go to experts by what they are: nothing there is learned or to be balanced."""
        router = self._planned_routers.get("router") or {}
        return (self.routing.scoring if self.routing is not None else router.get("scoring")) == "modality"

    @property
    def experts_per_token(self) -> int | None:
        """Experts a token is sent to; None where no file says it."""
        if self.routing is not None:
            return self.routing.top_k
        edit = self._planned_routers
        return edit["top_k"] * edit.get("granularity", 1) if "top_k" in edit else None


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: The directory.
        stages: Stages that have written anything, in the order of training.
        waiting: Stages of the recipe that have not.
        recipe: The resolved recipe, as text.
        faults: Files that could not be read, with the reason.
    """

    path: Path
    stages: list[Stage]
    waiting: list[str] = field(default_factory=list)
    recipe: str = ""
    faults: list[str] = field(default_factory=list)


def read_run(path: str | Path) -> Run:
    """Read what is there of a run.

    Args:
        path: A run directory, a single stage of one, or a folder with a ``routing.json``.

    Raises:
        ValueError: There is no such directory, or nothing in it that a report could show.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path}: no such run directory; give the directory that `sparsevlm train` writes")
    faults: list[str] = []
    recipe = _text(folder / RECIPE, faults)
    planned = _planned_stages(recipe, folder / RECIPE, faults)
    single = any((folder / name).is_file() for name in (METRICS, STAGE_FILE, ROUTING))
    if single:
        name = folder.resolve().name
        stage = _read_stage(folder, name, planned.get(name, {}), faults)
        return Run(folder, [stage], recipe=recipe, faults=faults)
    found = [
        child.name
        for child in folder.iterdir()
        if any((child / name).is_file() for name in (METRICS, STAGE_FILE, ROUTING))
    ]
    if not found and not planned:
        names = ", ".join(sorted(child.name for child in folder.iterdir() if child.name[0] != ".")) or "nothing"
        raise ValueError(
            f"{path}: no stage of a run here (found: {names}). A stage is a folder with a {METRICS} or a {ROUTING}"
        )
    order = [name for name in planned if name in found]
    order += sorted((name for name in found if name not in planned), key=lambda name: (_age(folder / name), name))
    stages = [_read_stage(folder / name, name, planned.get(name, {}), faults) for name in order]
    return Run(folder, stages, [name for name in planned if name not in found], recipe, faults)


def _read_stage(folder: Path, name: str, planned: Mapping[str, Any], faults: list[str]) -> Stage:
    metrics = folder / METRICS
    rows = [row for row in read_lines(metrics) if "step" in row and "loss" in row]
    record = _json(folder / STAGE_FILE, faults)
    routing = _read_routing(folder, faults)
    live = {group: found for group in (LORA_EXPERTS, MOE) if (found := live_routing(rows, group)) is not None}
    stage = Stage(
        name=name,
        complete=(folder / COMPLETE).is_file(),
        rows=rows,
        record=record,
        planned=dict(planned or record.get("inputs", {}).get("stage", {})),
        skipped=Counter(str(row.get("reason", "?")) for row in read_lines(folder / SKIPPED)),
        written=datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None,
    )
    trained = LORA_EXPERTS if replace(stage, group=LORA_EXPERTS).sparse else MOE
    groups = list(dict.fromkeys([*routing, *live])) or [trained]
    first, *others = (replace(stage, group=key, routing=routing.get(key), live=live.get(key)) for key in groups)
    return replace(first, others=tuple(others))


def _read_routing(folder: Path, faults: list[str]) -> dict[str, Routing]:
    """Return what routing.json says of each group of routers, that of its own first."""
    document = _json(folder / ROUTING, faults)
    if not document:
        return {}
    try:
        documents = [document, *document.get("others", [])]
        return {str(each.get("group", MOE)): read_routing(each, folder) for each in documents}
    except (ValueError, AttributeError, TypeError) as error:
        faults.append(f"{folder / ROUTING}: {error}")
        return {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line that is being written, or that a killed run left torn, is dropped."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # also of bytes that are no UTF-8
            break
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _planned_stages(recipe: str, file: Path, faults: list[str]) -> dict[str, dict[str, Any]]:
    """Return the stages of a recipe in its order; it is not checked, since it may be of another version."""
    if not recipe:
        return {}
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        tree = YAML(typ="safe", pure=True).load(recipe)
        return {str(name): dict(stage) for name, stage in tree["stages"].items()}
    except (YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        faults.append(f"{file}: not a recipe ({type(error).__name__})")
        return {}


def _json(file: Path, faults: list[str]) -> dict[str, Any]:
    text = _text(file, faults)
    if not text:
        return {}
    try:
        document = json.loads(text)
    except ValueError as error:
        faults.append(f"{file}: not JSON ({error})")
        return {}
    if not isinstance(document, dict):
        faults.append(f"{file}: expected a JSON object, got {type(document).__name__}")
        return {}
    return document


def _text(file: Path, faults: list[str]) -> str:
    if not file.is_file():
        return ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{file}: {error}")
        return ""


def _age(folder: Path) -> int:
    files = [folder / name for name in (METRICS, STAGE_FILE, ROUTING)]
    return min(file.stat().st_mtime_ns for file in files if file.is_file())
