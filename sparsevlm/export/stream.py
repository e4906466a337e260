"""Upcycling a checkpoint on disk, tensor by tensor: no more than one layer's experts is ever in memory.

What the experts and routers start from is `moe/expand.py`'s, the same numbers as for a model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsevlm.export.disk_layout import disk_plan, to_disk
from sparsevlm.export.folder import copy_files, refuse_full, refuse_in_use, written_aside
from sparsevlm.export.shards import Entry, ShardWriter, parse_size, total_bytes
from sparsevlm.export.source import Source, fetch, read_ffn
from sparsevlm.export.target import Form, Target, choose_target
from sparsevlm.moe.alike import differences
from sparsevlm.moe.expand import (
    ALIGNED,
    layer_start,
    mixing_weights,
    moe_fields,
    preserves_function,
    routed_weights,
    shared_weights,
)
from sparsevlm.moe.ffn import FfnLayout, expert_weights, read_layout
from sparsevlm.surgery import resolve_layers

if TYPE_CHECKING:
    from sparsevlm.recipe.moe import Upcycle

_BALANCE_BIAS = "gate.e_score_correction_bias"


@dataclass(frozen=True)
class StreamReport:
    """What was done.

    Attributes:
        source: The dense model, as the user named it.
        source_class: Its class.
        target_class: Class of what was written.
        native: The target is a class of transformers.
        reasons: Why it is not.
        layers: Decoder layers that are MoE now.
        num_layers: Decoder layers.
        num_experts: E.
        num_experts_per_tok: k.
        expert_width: Hidden units of an expert.
        needs_eager: The class's default kernel refuses experts of this width.
        parameters_before: Stored parameters of the dense model.
        parameters_after: Stored parameters now.
        parameters_activated: Those that one token uses: k of E experts, and all else.
        preserves_function: Whether the start is to compute what the dense model did.
        reason: Why, or why not.
        files: Weight files written.
        nbytes: Their size.
        difference: Largest difference of the logits, None where that was not looked at.
        largest_logit: Largest logit of the dense model on that sample.
        sample: What the sample was.
    """

    source: str
    source_class: str
    target_class: str
    native: bool
    reasons: tuple[str, ...]
    layers: tuple[int, ...]
    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    expert_width: int
    needs_eager: bool
    parameters_before: int
    parameters_after: int
    parameters_activated: int
    preserves_function: bool
    reason: str
    files: int
    nbytes: int
    difference: float | None = None
    largest_logit: float | None = None
    sample: str = ""


def upcycle_checkpoint(
    source: str,
    out: Path,
    spec: Upcycle,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    form: Form = "auto",
    check: bool = True,
    sample: Path | None = None,
) -> StreamReport:
    """Write the sparse model that a dense one on disk becomes.

    Everything is written to a hidden directory beside ``out`` that takes its name at the very end.

    Args:
        source: Directory, run, packaged part or Hub id of the dense model.
        out: Directory to write; must not exist, or be empty.
        spec: What to do; as the recipe's `upcycle`.
        seed: Of everything that is drawn at random.
        max_shard_size: Largest weight file, ``5GB``.
        form: Class of the result.
        check: Load both models at the end, in float32, and compare their logits.
        sample: Text on which k-means runs and logits are compared; default for the latter: random tokens.

    Raises:
        ValueError: Anything that the arguments cause: ``out`` is in use, the source is no dense model, an option does
            not suit it, no class holds the result, the disk is too small, or the result does not compute what it
            should.
    """
    refuse_in_use(out)
    limit = parse_size(max_shard_size)
    if spec.router.init == "kmeans" and sample is None:
        raise ValueError("--router-init kmeans looks at what the layers are given: name a text file with --sample")
    with ExitStack() as stack:
        dense = stack.enter_context(Source(source, fetch(source)))
        others = [stack.enter_context(Source(name, fetch(name))) for name in spec.experts_from]
        job = Job(dense, others, spec, seed, form)
        refuse_full(out, total_bytes(job.plan.values()))
        with written_aside(out) as partial:
            if spec.router.init == "kmeans":
                assert sample is not None
                job.centroids = _centroids(job, sample)
            writer = ShardWriter(partial, job.plan, limit)
            stack.callback(writer.close)
            for tensors in job.tensors():
                while tensors:  # one at a time: transformers splits stacks by copying them
                    name = next(iter(tensors))
                    for key, tensor in to_disk(job.target.model, {name: tensors.pop(name)}).items():
                        writer.write(key, tensor)
            writer.finish()
            copy_files(dense.directory, partial)
            job.target.config.save_pretrained(partial)
            measured: dict[str, Any] = {}
            if check:
                from sparsevlm.export.logits import compare

                measured = compare(job, partial, sample)
    return job.report(files=len(set(writer.files.values())), **measured)


class Job:
    """One upcycling: what is read, what is made of it, and the plan of what is written.

    Args:
        source: The dense model.
        others: The models of `experts_from`.
        spec: What to do.
        seed: Of everything that is drawn at random.
        form: Class of the result.

    Attributes:
        layers: Decoder layers that become MoE.
        target: Class and configuration of the result.
        plan: Key on disk -> shape and type, in the order in which they are written.
        centroids: Of each layer ``(copies, H)``, for `router.init: kmeans`.

    Raises:
        ValueError: See `upcycle_checkpoint`.
    """

    def __init__(self, source: Source, others: Sequence[Source], spec: Upcycle, seed: int, form: Form) -> None:
        self.source, self.others, self.spec, self.seed = source, others, spec, seed
        for other in others:
            _refuse_different(source, other)
        self.layers = resolve_layers(spec.layers, source.num_layers)
        self.layouts = {layer: read_layout(source.ffn(layer), source.text_config) for layer in self.layers}
        widths = {layout.intermediate_size for layout in self.layouts.values()}
        if len(widths) > 1 and spec.granularity > 1:
            raise ValueError(f"layers have FFNs of {len(widths)} widths: leave --granularity at 1, or choose --layers")
        self.moe = moe_fields(spec, self.layers, next(iter(self.layouts.values())).intermediate_size)
        self.target: Target = choose_target(source, self.moe, form)
        self.centroids: Mapping[int, Tensor] | None = None
        self._expected = self.target.model.state_dict()
        self._units = list(self._divide())
        self.plan = disk_plan(self.target.model, (self._entries(layer, names) for layer, names in self._units))

    @property
    def needs_eager(self) -> bool:
        """Whether the default kernel of transformers' classes refuses these sizes (ours chooses another by itself)."""
        sizes = (self.expert_width, *(layout.hidden_size for layout in self.layouts.values()))
        return self.target.native and any(size % ALIGNED for size in sizes)

    @property
    def expert_width(self) -> int:
        """Hidden units of an expert."""
        return self.moe["moe_intermediate_size"] or next(iter(self.layouts.values())).intermediate_size

    def mlp(self, layer: int) -> str:
        """Return what stands before the names of a layer's FFN, in the source."""
        return f"{self.source.layers}.{layer}.mlp."

    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """Yield all weights of the result by name, a MoE layer or a single tensor at a time."""
        for layer, names in self._units:
            if layer is None:
                yield {name: self._carried(name.removeprefix(self.target.prefix)) for name in names}
            else:
                yield self._moe_layer(layer, names)

    def report(self, **more: Any) -> StreamReport:
        """Say what was done."""
        experts: int = self.moe["num_experts"]
        top_k: int = self.moe["num_experts_per_tok"]
        after = sum(entry.numel for entry in self.plan.values())
        stacks = sum(
            tensor.numel()
            for layer in self.layers
            for name, tensor in self._expected.items()
            if name.startswith(f"{self.target.prefix}{self.mlp(layer)}experts.")
        )
        preserves, reason = preserves_function(self.spec)
        return StreamReport(
            source=self.source.name,
            source_class=type(self.source.model).__name__,
            target_class=type(self.target.model).__name__,
            native=self.target.native,
            reasons=self.target.reasons,
            layers=tuple(self.layers),
            num_layers=self.source.num_layers,
            num_experts=experts,
            num_experts_per_tok=top_k,
            expert_width=self.expert_width,
            needs_eager=self.needs_eager,
            parameters_before=sum(self.source.entry(name).numel for name in self.source.names),
            parameters_after=after,
            parameters_activated=after - stacks // experts * (experts - top_k),
            preserves_function=preserves,
            reason=reason,
            nbytes=total_bytes(self.plan.values()),
            **more,
        )

    def _divide(self) -> Iterator[tuple[int | None, list[str]]]:
        """Yield what is made together: all names of a MoE layer's block, or one name that is carried over."""
        blocks = {self.target.prefix + self.mlp(layer): layer for layer in self.layers}
        members: dict[int, list[str]] = {layer: [] for layer in self.layers}
        owner = {name: layer for name in self._expected for start, layer in blocks.items() if name.startswith(start)}
        for name, layer in owner.items():
            members[layer].append(name)
        kept = set(self.source.names)
        seen: set[int] = set()
        for name in self._expected:
            layer = owner.get(name)
            if layer is None and name.removeprefix(self.target.prefix) in kept:
                yield None, [name]
            elif layer is not None and layer not in seen:
                seen.add(layer)
                yield layer, members[layer]
            elif layer is None:
                tied = name.removeprefix(self.target.prefix) in self.source.model.all_tied_weights_keys
                assert tied, f"{name} of {type(self.target.model).__name__} has no counterpart in the dense model"

    def _entries(self, layer: int | None, names: Sequence[str]) -> dict[str, Entry]:
        """Return shape and type of what will be made."""
        if layer is None:
            return {name: self.source.entry(name.removeprefix(self.target.prefix)) for name in names}
        dtype = self._dtype(layer)
        # The balance bias stays in float32, whatever the type of the weights.
        own = {name: torch.float32 if name.endswith(_BALANCE_BIAS) else dtype for name in names}
        return {name: Entry(tuple(self._expected[name].shape), own[name]) for name in names}

    def _dtype(self, layer: int) -> torch.dtype:
        """Return the type of a layer's FFN, which its experts and router take."""
        return self.source.entry(f"{self.mlp(layer)}{self.layouts[layer].down}.weight").dtype

    def _carried(self, name: str) -> Tensor:
        """Return a weight that is no expert's: the source's, or the mean of the models that the experts come from."""
        if not self.others:
            return self.source.read(name)
        first = self.others[0].read(name)
        if not first.is_floating_point():
            return first
        total = first.float()
        for other in self.others[1:]:
            total += other.read(name).float()
        return (total / len(self.others)).to(self.source.entry(name).dtype)

    def _moe_layer(self, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the weights of a MoE layer."""
        layout = self.layouts[layer]
        dense, copies = self._ffns(layer, layout)
        router, stacks = layer_start(
            dense[0],
            self.spec,
            seed=self.seed,
            layer=layer,
            sources=copies,
            centroids=None if self.centroids is None else self.centroids[layer],
        )
        dtype = dense[0]["down_proj"].dtype
        made = routed_weights(self.spec, router.to(dtype), stacks)
        made |= {name: weight.to(dtype) for name, weight in mixing_weights(self.spec, layout.hidden_size).items()}
        shared = shared_weights(self.spec, dense[1], layout.down)
        made |= {f"shared_expert.{name}": weight for name, weight in shared.items()}
        prefix = self.target.prefix + self.mlp(layer)
        zeros = {**dict.fromkeys(self.target.zeros, dtype), _BALANCE_BIAS: torch.float32}
        for name in names:
            short = name.removeprefix(prefix)
            if short not in made:
                assert short in zeros, f"nothing gives {name} of {type(self.target.model).__name__} its values"
                made[short] = torch.zeros(self._expected[name].shape, dtype=zeros[short])
        assert len(made) == len(names), f"{type(self.target.model).__name__} has no place for {sorted(made)} in {names}"
        return {prefix + name: tensor for name, tensor in made.items()}

    def _ffns(
        self, layer: int, layout: FfnLayout
    ) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor]], list[dict[str, Tensor]] | None]:
        """Return the layer's own FFN, as one expert and by its own names, and the FFNs that become the experts.

        All in the source's type, whatever those of the models are that the experts come from.
        """
        if not self.others:
            ffn = read_ffn(self.source, layer)
            return (expert_weights(ffn, layout), dict(ffn.state_dict())), None
        dtype = self._dtype(layer)
        copies = [
            {name: weight.to(dtype) for name, weight in expert_weights(read_ffn(other, layer), layout).items()}
            for other in self.others
        ]
        mean = {
            name: self._carried(self.mlp(layer) + name)
            for name in (self.source.ffn(layer).state_dict() if self.spec.shared_expert != "none" else ())
        }
        return (copies[0], mean), copies


def _refuse_different(source: Source, other: Source) -> None:
    """Refuse an expert's model that is not of the source's shape, or means something else by its weights."""
    ours, theirs = source.names, other.names
    differ = sorted(set(ours) ^ set(theirs)) or [n for n in ours if source.entry(n).shape != other.entry(n).shape]
    if differ:
        raise ValueError(
            f"--expert-from {other.name} is not of the shape of {source.name}: they differ in {len(differ)} weights "
            f"({', '.join(differ[:3])}); experts come from fine-tuned versions of one model"
        )
    found = differences(source.text_config, other.text_config)
    if found:
        raise ValueError(
            f"--expert-from {other.name} is no branch of {source.name}: {found}; experts come from fine-tuned versions "
            "of one model"
        )


def _centroids(job: Job, sample: Path) -> dict[int, Tensor]:
    """Return centroids of what the MoE layers' FFNs are given on a text."""
    from sparsevlm.export.logits import ffn_centroids

    return ffn_centroids(job, sample)
