"""The recipe: every option of a run, typed. `docs/recipes.md` and the editor schema are generated from this file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from sparsevlm.recipe.adapter import Adapter, adapter_faults, order_faults, sharding_faults, trains_beside
from sparsevlm.recipe.feature_cache import FeatureCache, cache_faults
from sparsevlm.recipe.hub import Hub, hub_faults
from sparsevlm.recipe.model import ConnectorBlock, Language, Model, Video, Vision
from sparsevlm.recipe.moe import LayerChoice, Router, Upcycle
from sparsevlm.recipe.optim import MOE_PARTS, Optim, Part, Sharding
from sparsevlm.recipe.section import KEY, CrossFault, Origin, Positive, Strict, names, number, view
from sparsevlm.registry import DATA_FORMATS, EVAL_TASKS, UnknownNameError, suggest

__all__ = [
    "Adapter", "Batch", "ConnectorBlock", "Eval", "Hub", "Language", "LayerChoice", "Mixture", "Model", "Optim", "Part",
    "Recipe", "Router", "Sharding", "Source", "Stage", "Strict", "Upcycle", "Video", "Vision",
]  # fmt: skip


class Source(Strict):
    """One set of records."""

    path: str | list[str]
    """JSON, JSONL or parquet file(s), a folder of pictures, a Hugging Face data set id, or `sparsevlm:scenes`."""
    format: str
    """How a row becomes a conversation: a registered data format."""
    media_root: str | None = None
    """Folder that media paths are relative to and may not leave; default: the folder of the file."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    name: str | None = None
    """Configuration name of a Hugging Face data set."""
    revision: str | None = None
    """Revision of a Hugging Face data set."""
    streaming: bool = False
    """Read a Hugging Face data set as a stream instead of downloading it first."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many rows only."""
    options: dict[str, Any] = {}
    """Options of the format (column names, kinds of scenes, …)."""
    license: str | None = None
    """Licence of the data, written to the model card."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        if not isinstance(raw.get("format"), str):
            return
        try:
            form = DATA_FORMATS.get(raw["format"])
        except UnknownNameError as error:
            yield ("format",), str(error)
            return
        options = view(raw.get("options"))
        unknown = [name for name in options if name not in form.defaults]
        for name in unknown:
            known = ", ".join(form.defaults) or "none"
            yield ("options", name, KEY), f"unknown option{suggest(name, list(form.defaults)) or f' (known: {known})'}"
        if not unknown:
            try:
                form(**options)
            except ValueError as error:
                yield ("options",), str(error)


class Mixture(Strict):
    """How sources are mixed in a stage."""

    sampling: Literal["concat", "weight", "temperature", "sqrt_size"] = "concat"
    """`concat`: every row once an epoch. `weight`: by the weights given. `temperature`: share proportional to
    size^(1/T). `sqrt_size`: share proportional to the square root of size (InstructBLIP)."""
    temperature: float = Field(default=1.0, gt=0)
    """T of `temperature`."""
    caps: dict[str, Annotated[int, Field(ge=1)]] = {}
    """At most so many rows of a source (Yi-VL's 50,000, for example)."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        sampling = raw.get("sampling", "concat")
        if number(raw.get("temperature", 1.0)) not in (1.0, None) and sampling != "temperature":
            yield ("temperature",), f"only 'sampling: temperature' uses a temperature, sampling is {sampling!r}"


class Batch(Strict):
    """What makes one optimizer step."""

    rows: int = Field(default=8, ge=1)
    """Rows an optimizer step over all ranks. A row is a sample, or a pack of samples when packing."""
    rows_per_rank: int = Field(default=1, ge=1)
    """Rows a rank holds at once, at most: fewer where more ranks share the step. The rest is gradient accumulation."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens a row, visual ones included. Longer samples are cut, never through a visual block."""
    max_visual_tokens: int | None = Field(default=None, ge=1)
    """Second budget when packing: visual tokens a row. Default: no limit of its own."""
    packing: bool | Literal["auto"] = "auto"
    """Put several samples in one row. `auto` packs where attention keeps them apart at no cost (packed_sdpa, flash)."""
    group_by_length: bool = True
    """Without packing: rows of like length together, to waste less padding."""
    workers: int = Field(default=2, ge=0)
    """Processes a rank that read and decode."""
    max_skipped_share: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of the records read so far could not be used (checked from 20 records on)."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        rows, held = number(raw.get("rows", 8)), number(raw.get("rows_per_rank", 1))
        if rows is not None and held is not None and held >= 1 and rows % held:
            at = "rows_per_rank" if "rows_per_rank" in raw else "rows"
            yield (at,), f"rows {rows} is not a multiple of rows_per_rank {held}"
        if raw.get("max_visual_tokens") is not None and raw.get("packing") is False:
            yield ("max_visual_tokens",), "a budget of visual tokens needs packing, which is false"


class Stage(Strict):
    """One step of the way: load the parent, edit, choose what trains, train, save."""

    trains: list[Part] = Field(default=["moe"], min_length=1)
    """Parts that train; everything else is frozen. May be left out beside `upcycle`: then the MoE layers with their
    routers, and beside `adapter`: then `[adapter, connector]`."""
    data: list[str] | dict[str, Positive] = Field(min_length=1)
    """Names of sources, or source: weight."""
    mixture: Mixture = Mixture()
    """How the sources are mixed."""
    upcycle: Upcycle | None = None
    """Turn FFNs into experts before this stage."""
    adapter: Adapter | None = None
    """Train an adapter on frozen weights; the stage's directory then holds the adapter and what trains beside it."""
    rope_factor: float | None = Field(default=None, gt=1)
    """Let the language model read so many times as much from this stage on: its rotary positions are divided by this
    (linear scaling, as LLaMA-VID's stage of long videos)."""
    image_size: int | None = Field(default=None, ge=1)
    """Side in pixels that pictures are brought to from this stage on; default: as before, at first what
    `model.vision.image_size` says."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data. Give this or `steps`."""
    batch: Batch = Batch()
    """Batch of an optimizer step."""
    optim: Optim = Optim()
    """Optimizer."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; `bf16` is autocast over float32 weights, or pure where `model.dtype` is
    bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant)."""
    sharding: Sharding | None = None
    """Sharding of this stage alone; default: the recipe's."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints to resume from; default: a tenth of the stage, at most 500."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics."""
    evals: list[str] | None = None
    """Evaluations after this stage; default: all of the recipe."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        steps, epochs = raw.get("steps"), raw.get("epochs")
        if steps is None and epochs is None:
            yield (), "give one of 'steps' and 'epochs'"
        if steps is not None and epochs is not None:
            yield ("epochs",), "give only one of 'steps' and 'epochs'"
        upcycles = raw.get("upcycle") is not None
        adapter, optim = raw.get("adapter"), view(raw.get("optim"))
        default = trains_beside(adapter) if adapter is not None else ["moe"] if upcycles else None
        trains = names(raw.get("trains", default))
        for i, part in enumerate(trains):
            if part in trains[:i]:
                yield ("trains", i), f"part {part!r} is named twice"
        if "trains" not in raw and default is None:
            yield ("trains",), "name the parts that train; this can be left out beside 'upcycle' or 'adapter' only"
        yield from adapter_faults(trains, adapter, get_args(Part))
        # parts that another one contains
        within = {
            "language": ("embeddings", "ffn", *MOE_PARTS),
            "moe": MOE_PARTS[1:],
            "connector": ("connector.qformer", "connector.projector"),
        }
        trained = {*trains, *(inner for part in trains for inner in within.get(part, ()))}
        for part in names(optim.get("part_lr")):
            if trains and part in get_args(Part) and part not in trained:
                yield (
                    ("optim", "part_lr", part, KEY),
                    f"this stage does not train {part!r} (it trains {', '.join(trains)})",
                )
        warmup, total = number(optim.get("warmup")), number(steps)
        if warmup is not None and total is not None and warmup >= 1 and warmup > total:
            yield ("optim", "warmup"), f"{warmup:g} steps of warmup are more than the {total} steps of the stage"
        data, mixture = raw.get("data"), view(raw.get("mixture"))
        sampling = mixture.get("sampling", "concat")
        if isinstance(data, dict):
            if sampling != "weight":
                yield ("data",), f"weights are used by 'mixture: {{sampling: weight}}' only, sampling is {sampling!r}"
        elif isinstance(data, list):
            for i, source in enumerate(data):
                if source in data[:i]:
                    yield ("data", i), f"source {source!r} is named twice"
            if sampling == "weight":
                yield (
                    ("data",),
                    "'sampling: weight' needs a weight for each source, e.g. {captions: 0.3, questions: 0.7}",
                )
        for source in names(mixture.get("caps")):
            if source not in names(data):
                yield (
                    ("mixture", "caps", source, KEY),
                    f"{source!r} is not in this stage's data{suggest(source, names(data))}",
                )

    @model_validator(mode="after")
    def _default_trains(self) -> Stage:
        if self.adapter is not None and "trains" not in self.model_fields_set:
            self.trains = trains_beside(self.adapter)  # pyright: ignore
        return self


class Eval(Strict):
    """One evaluation."""

    task: str
    """Registered evaluation task."""
    path: str
    """Its data: a file, or `sparsevlm:scenes`."""
    media_root: str | None = None
    """Folder of the media; default: the folder of the file."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many examples only."""
    batch_size: int = Field(default=16, ge=1)
    """Examples generated together."""
    max_new_tokens: int = Field(default=16, ge=1)
    """Longest answer."""
    options: dict[str, Any] = {}
    """Options of the task."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        if isinstance(raw.get("task"), str):
            try:
                EVAL_TASKS.get(raw["task"])(**view(raw.get("options")))
            except UnknownNameError as error:
                yield ("task",), str(error)
            except ValidationError as error:
                yield from ((("options", *fault["loc"]), fault) for fault in error.errors())


class Recipe(Strict):
    """A whole run."""

    base: str | None = None
    """Recipe that this one starts from (path relative to this file); mappings are merged, lists and values replaced."""
    name: str
    """Name of the run."""
    output: str | None = None
    """Run directory; default `runs/NAME`."""
    seed: int = 0
    """Seed of initialisation, order and dropout."""
    model: Model
    """The parts."""
    data: dict[str, Source] = Field(min_length=1)
    """Sources by name."""
    stages: dict[str, Stage] = Field(min_length=1)
    """Stages by name, in order."""
    evals: dict[str, Eval] = {}
    """Evaluations by name."""
    sharding: Sharding = Sharding()
    """Sharding of all stages that set none of their own."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    """Trackers; metrics.jsonl is always written."""

    feature_cache: FeatureCache | None = None
    """Keep the features of a tower that does not train; default: they are computed each time."""
    hub: Hub | None = None
    """Upload what the run makes to the Hugging Face Hub."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        if isinstance(raw.get("name"), str) and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", raw["name"]):
            yield ("name",), f"a name becomes a folder: letters, digits, '.', '_' and '-' only, got {raw['name']!r}"
        for section in ("data", "stages", "evals"):
            for name in names(view(raw.get(section))):
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):  # no dot: overrides address by dotted path
                    yield (section, name, KEY), f"a name has letters, digits, '_' and '-' only, got {name!r}"
        yield from cache_faults(raw)
        yield from hub_faults(raw.get("hub"), names(view(raw.get("stages"))))
        sources, tasks = view(raw.get("data")), names(raw.get("evals"))
        yield from ((("stages", *at), what) for at, what in order_faults(view(raw.get("stages"))))
        upcycled = ""
        for name, value in view(raw.get("stages")).items():
            stage, at = view(value), ("stages", name)
            data = stage.get("data")
            for i, source in enumerate(names(data)):
                place = (*at, "data", source, KEY) if isinstance(data, dict) else (*at, "data", i)
                if source not in sources:
                    yield place, f"no source {source!r} in data{suggest(source, names(sources))}"
                elif stage.get("epochs") is not None and view(sources[source]).get("streaming") is True:
                    yield (*at, "epochs"), f"source {source!r} is a stream of unknown length: give 'steps' instead"
            for i, task in enumerate(names(stage.get("evals"))):
                if task not in tasks:
                    yield (*at, "evals", i), f"no evaluation {task!r} in evals{suggest(task, tasks)}"
            if stage.get("upcycle") is not None:
                if upcycled:
                    yield (*at, "upcycle"), f"stage {upcycled!r} already upcycled the model"
                upcycled = upcycled or name
            vision = view(view(raw.get("model")).get("vision"))
            if stage.get("image_size") is not None and (vision.get("native") or vision.get("beside")):
                yield (
                    (*at, "image_size"),
                    "has no meaning with resize: native or several towers; leave 'image_size' out",
                )
            adapter = view(stage.get("adapter"))
            sharding = view(raw.get("sharding") if stage.get("sharding") is None else stage["sharding"])
            yield from (((*at, "adapter", *place), what) for place, what in sharding_faults(adapter, sharding))
            for i, target in enumerate(names(adapter.get("targets"))):
                if target.startswith("moe.") and not upcycled:
                    yield (
                        (*at, "adapter", "targets", i),
                        f"neither this stage nor an earlier one has 'upcycle', so there is no {target!r}",
                    )
            fuses = view(raw.get("model")).get("fusion") is not None
            for option, place in (("trains", at), ("targets", (*at, "adapter"))):
                named = names((stage if option == "trains" else adapter).get(option))
                if "fusion" in named and not fuses:
                    yield (
                        (*place, option, named.index("fusion")),
                        "the model has no 'fusion': say which, `model.fusion: {type: …}`",
                    )
            for i, part in enumerate(names(stage.get("trains"))):
                if part in MOE_PARTS and not upcycled:
                    yield (
                        (*at, "trains", i),
                        f"neither this stage nor an earlier one has 'upcycle', so there is no {part!r}",
                    )

    @property
    def run_dir(self) -> str:
        """Directory of the run."""
        return self.output or f"runs/{self.name}"

    def image_size_in(self, stage: str) -> int | None:
        """Return the side that pictures are brought to in a stage; None for what the tower was trained at."""
        names = list(self.stages)
        until = [self.stages[name].image_size for name in names[: names.index(stage) + 1]]
        own = None if self.model.vision.beside else self.model.vision.image_size
        return next((size for size in reversed(until) if size is not None), own)

    def sharding_of(self, stage: Stage) -> Sharding:
        """Return the sharding that a stage runs with."""
        return stage.sharding or self.sharding
