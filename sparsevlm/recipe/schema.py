"""The recipe: every option of a run, typed. `docs/recipes.md` and the editor schema are generated from this file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sparsevlm.registry import CONNECTOR_BLOCKS, UnknownNameError, suggest

Part = Literal["vision", "connector", "language", "embeddings", "moe"]
"""What a stage can train. `language` is the whole language model; `embeddings` (input and output) and `moe`
(routers and experts) are the parts of it that can be named alone."""

LayerChoice = Literal["alternate", "all", "first_half", "second_half"] | list[int]


def _parse_connector_block(raw: Any) -> Any:
    """Validate a block through its registered spec; nested faults keep their field (see `recipe.load`)."""
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise PydanticCustomError("connector_block", "a connector block is a mapping with a 'type', e.g. {{type: mlp}}")
    try:
        CONNECTOR_BLOCKS.get(raw["type"]).model_validate(raw)
    except UnknownNameError as error:
        raise PydanticCustomError("connector_block", "{reason}", {"reason": str(error)}) from None
    except ValidationError as error:
        raise PydanticCustomError("nested", "{reason}", {"reason": str(error), "errors": error.errors()}) from None
    return raw


ConnectorBlock = Annotated[dict[str, Any], BeforeValidator(_parse_connector_block)]


class Strict(BaseModel):
    """Base of all recipe sections: unknown keys are faults, docstrings below fields are their documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Vision(Strict):
    """The vision tower and how pictures are brought to its size."""

    path: str
    """Hub id, local directory, or `sparsevlm:NAME` for a part that the package ships. Any transformers vision model:
    ViT with or without CLS token, or a timm network as `TimmWrapper`."""
    layer: int | list[int] = -1
    """Hidden layer whose features are taken (negative counts from the end; a list concatenates their features)."""
    select: Literal["auto", "patch", "full"] = "auto"
    """`patch` drops the tokens before the grid (CLS, registers), `full` keeps them (not possible with blocks that need
    a grid), `auto` drops them where the tower has any."""
    image_size: int | None = None
    """Side in pixels that pictures are brought to; default: what the tower was trained at."""
    resize: Literal["stretch", "crop", "pad"] = "pad"
    """`stretch` ignores the aspect ratio, `crop` resizes the short side and cuts the centre, `pad` resizes the long
    side and fills to a square with the mean colour."""
    mean: tuple[float, float, float] | None = None
    """Channel means; default: the tower's preprocessor file, else its config, else 0.5."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations; default as for `mean`."""


class Language(Strict):
    """The language model."""

    path: str
    """Hub id, local directory, or `sparsevlm:NAME` for a part that the package ships. Any causal language model."""
    chat_template: str = "auto"
    """`auto` takes the tokenizer's template if it marks the assistant's tokens, else refuses. Or one that the package
    ships (`chatml`, `vicuna_v1`, `plain`), or a path to a Jinja file with `{% generation %}` markers."""
    attention: Literal["auto", "packed_sdpa", "sdpa", "flash_attention_2", "flash_attention_3", "eager"] = "auto"
    """Attention implementation. `auto`: flash_attention_2 where it is installed and a GPU is there, else packed_sdpa
    (causal SDPA per document of a packed row)."""


class Video(Strict):
    """How frames are drawn from videos."""

    fps: float | None = Field(default=1.0, gt=0)
    """Frames a second; null draws `max_frames` evenly whatever the length."""
    min_frames: int = Field(default=1, ge=1)
    """Shorter clips are sampled more densely to reach this many, as far as they have frames."""
    max_frames: int = Field(default=64, ge=1)
    """Longer clips are thinned evenly to this many."""


class Model(Strict):
    """The parts and what joins them."""

    vision: Vision
    """The vision tower."""
    language: Language
    """The language model."""
    connector: list[ConnectorBlock] = Field(default=[{"type": "mlp"}], min_length=1)
    """Blocks that map visual features to the language model, in order. The last must end at the language model's
    width."""
    video: Video = Video()
    """Frame sampling."""
    image_token: str = "<image>"
    """Placeholder of an image in the prompt; added to the tokenizer when it is not there."""
    video_token: str = "<video>"
    """Placeholder of a video."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which stage outputs are kept. Master weights are trained in float32 unless `bfloat16` is chosen here."""
    trust_remote_code: bool = False
    """Allow parts whose code comes from the Hub."""


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


class Mixture(Strict):
    """How sources are mixed in a stage."""

    sampling: Literal["concat", "weight", "temperature", "sqrt_size"] = "concat"
    """`concat`: every row once an epoch. `weight`: by the weights given. `temperature`: share proportional to
    size^(1/T). `sqrt_size`: share proportional to the square root of size (InstructBLIP)."""
    temperature: float = Field(default=1.0, gt=0)
    """T of `temperature`."""
    caps: dict[str, int] = {}
    """At most so many rows of a source (Yi-VL's 50,000, for example)."""


class Batch(Strict):
    """What makes one optimizer step."""

    rows: int = Field(default=8, ge=1)
    """Rows an optimizer step over all ranks. A row is a sample, or a pack of samples when packing."""
    rows_per_rank: int = Field(default=1, ge=1)
    """Rows a rank holds at once; the rest is gradient accumulation."""
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


class Optim(Strict):
    """Optimizer and schedule of a stage."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    part_lr: dict[Part, float] = {}
    """Learning rates of single parts."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warmup, to zero at the last step (`constant`: none)."""
    warmup: float = Field(default=0.03, ge=0)
    """Share of the steps below 1, number of steps from 1 on."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; never on biases, norms and embeddings."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the gradient norm; 0 turns clipping off."""


class Upcycle(Strict):
    """Copies dense FFNs into routed experts before the stage trains (MoE-LLaVA stage 3)."""

    layers: LayerChoice = "alternate"
    """Decoder layers that become MoE: `alternate` (0, 2, 4, …), `all`, a half, or a list of indices."""
    experts: int = Field(default=4, ge=2)
    """Experts a layer."""
    top_k: int = Field(default=2, ge=1)
    """Experts a token is sent to."""
    router_init_std: float = Field(default=0.02, ge=0)
    """Standard deviation of the fresh router weights."""
    aux_loss_coef: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss."""
    experts_implementation: str = "grouped_mm"
    """Kernel of the experts: `grouped_mm`, `batched_mm`, `eager`, or a name registered with transformers."""

    @model_validator(mode="after")
    def _top_k_within_experts(self) -> Upcycle:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")
        return self


class Sharding(Strict):
    """How a stage is spread over processes (DeepSpeed ZeRO)."""

    zero: Literal[0, 1, 2, 3] = 0
    """0: plain data parallelism without DeepSpeed. 1: optimizer states, 2: also gradients, 3: also parameters are
    sharded."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer states (`optimizer`) or also parameters (`all`, ZeRO-3 only) in host memory."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Sharding:
        if self.offload == "optimizer" and self.zero == 0:
            raise ValueError("offload: optimizer needs zero: 1, 2 or 3")
        if self.offload == "all" and self.zero != 3:
            raise ValueError("offload: all needs zero: 3")
        return self


class Stage(Strict):
    """One step of the way: load the parent, edit, choose what trains, train, save."""

    trains: list[Part] = Field(min_length=1)
    """Parts that train; everything else is frozen."""
    data: list[str] | dict[str, float] = Field(min_length=1)
    """Names of sources, or source: weight."""
    mixture: Mixture = Mixture()
    """How the sources are mixed."""
    upcycle: Upcycle | None = None
    """Turn FFNs into experts before this stage."""
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

    @model_validator(mode="after")
    def _check(self) -> Stage:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        extra = [
            part
            for part in self.optim.part_lr
            if part not in self.trains and not (part in ("embeddings", "moe") and "language" in self.trains)
        ]
        if extra:
            raise ValueError(
                f"optim.part_lr names {', '.join(extra)}, which this stage does not train ({', '.join(self.trains)})"
            )
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

    @model_validator(mode="after")
    def _check_names(self) -> Recipe:
        faults = []
        moe = False
        for name, stage in self.stages.items():
            at = ("stages", name)
            for source in stage.data:
                if source not in self.data:
                    faults.append(((*at, "data"), f"no source {source!r} in data{suggest(source, list(self.data))}"))
            for source in stage.mixture.caps:
                if source not in stage.data:
                    faults.append(
                        ((*at, "mixture", "caps", source), f"caps names {source!r}, which is not in this stage's data")
                    )
            for task in stage.evals or []:
                if task not in self.evals:
                    faults.append(((*at, "evals"), f"no evaluation {task!r} in evals{suggest(task, list(self.evals))}"))
            if stage.upcycle is not None and moe:
                faults.append(((*at, "upcycle"), "an earlier stage already upcycled the model"))
            moe = moe or stage.upcycle is not None
            if "moe" in stage.trains and not moe:
                faults.append(
                    ((*at, "trains"), "trains 'moe', but neither this stage nor an earlier one has 'upcycle'")
                )
        if faults:
            raise PydanticCustomError(
                "nested",
                "{reason}",
                {
                    "reason": "; ".join(text for _, text in faults),
                    "errors": [{"loc": loc, "msg": text, "type": "value_error"} for loc, text in faults],
                },
            )
        return self

    @property
    def run_dir(self) -> str:
        """Directory of the run."""
        return self.output or f"runs/{self.name}"

    def sharding_of(self, stage: Stage) -> Sharding:
        """Return the sharding that a stage runs with."""
        return stage.sharding or self.sharding
