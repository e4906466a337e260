"""Starts of LoRA that are made from the weights, or from what the layers see: PiSSA, OLoRA, CorDA, EVA.

Legend: O outputs, I inputs of a layer, r rank, s scaling, S rows of samples that a layer saw.

PiSSA, OLoRA and CorDA begin with a product s B0 A0 that is not zero and train on W - s B0 A0. PEFT writes that residual
over the weight. So do we while training; what is saved is the difference s (B A - B0 A0) as a LoRA of rank 2 r on the
untouched W (PEFT's `subtract_mutated_init`), so that the parent stays the parent.

Sources: PiSSA (Meng et al., arXiv:2404.02948, section 3), OLoRA (Büyükakyüz, arXiv:2406.01775, algorithm 1), CorDA
(Yang et al., arXiv:2406.05223, section 3.2, instruction-previewed mode), EVA (Paischer et al., arXiv:2410.07170,
section 3); ``peft/tuners/lora/{layer,corda,eva}.py`` of PEFT 0.21, with which they are tested.

*Deviations.* EVA: exact principal components of all tokens of the samples instead of an incremental decomposition of
target tokens, and every layer keeps rank r (PEFT: rho = 1), so that a plan's counts are those of the run. CorDA: the
covariance is gathered sample by sample over all items that a layer sees together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsevlm.recipe.adapter.lora import FROM_DATA, REWRITING, Lora

START = "adapter_start"
"""Attribute of a model whose weights were rewritten: its A0 and B0, by ``LAYER.lora_A`` and ``LAYER.lora_B``."""

_BYTES = 2**31
"""Memory for second moments; layers beyond it are gathered in further passes over the samples."""


def scaling(spec: Lora) -> float:
    """Return what B A is multiplied by."""
    return spec.alpha / (spec.r**0.5 if spec.rslora else spec.r)


def check_layers(model: nn.Module, modules: Sequence[str], parameters: Sequence[str], spec: Lora) -> None:
    """Refuse layers that these starts are not defined for; works on the meta device.

    Raises:
        ValueError: One is no matrix of a linear layer, or too small for the rank.
    """
    if parameters:
        raise ValueError(f"{parameters[0]} is a stacked weight or a router's, where 'init: {spec.init}' is not defined")
    for name in modules:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"'init: {spec.init}' is defined for linear layers, but the target {name} is a {type(module).__name__}"
            )
        shape = getattr(module.weight, "ds_shape", module.weight.shape)  # of a shard, the whole's
        limit = shape[_inputs_at(module)] if spec.init == "eva" else min(shape)
        if spec.r > limit:
            raise ValueError(
                f"'init: {spec.init}' takes r directions of each layer, but {name} ({tuple(shape)}) has "
                f"{limit} and r is {spec.r}; lower r or leave the layer out"
            )


def _inputs_at(module: nn.Module) -> int:
    return 0 if isinstance(module, Conv1D) else 1


def _matrix(module: Any) -> Tensor:
    """Return a layer's weight as float32 ``(O, I)``."""
    weight = module.weight.detach().float()
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def draw_start(
    model: nn.Module, modules: Sequence[str], spec: Lora, run: Callable[[Any], object] | None = None, samples: Any = ()
) -> dict[str, Tensor]:
    """Return A0 ``(r, I)`` and B0 ``(O, r)`` of each layer, by ``LAYER.lora_A`` and ``LAYER.lora_B``, in float32.

    Args:
        model: Without an adapter.
        modules: Names of the layers.
        spec: The recipe's section.
        run: Sends one sample through the model; for those made from data.
        samples: What `run` takes.

    Raises:
        ValueError: A layer saw too few tokens.
    """
    start = {}
    for name, (a, b) in _draw(model, modules, spec, run, samples):
        start[f"{name}.lora_A"], start[f"{name}.lora_B"] = a.contiguous().cpu(), b.contiguous().cpu()
    return start


def _draw(
    model: nn.Module, modules: Sequence[str], spec: Lora, run: Callable[[Any], object] | None, samples: Any
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    if spec.init not in FROM_DATA:
        for name in modules:
            weight = _matrix(model.get_submodule(name))
            yield name, pissa(weight, spec) if spec.init == "pissa" else olora(weight, spec)
        return
    assert run is not None, "a start that is made from data needs samples"
    for part in _portions(model, modules):
        seen = _gather(model, part, run, samples, corda=spec.init == "corda")
        for name in part:
            weight, (count, mean, second) = _matrix(model.get_submodule(name)), seen.pop(name)
            if count <= spec.r:
                raise ValueError(f"'init: {spec.init}' needs more than r = {spec.r} tokens, but {name} saw {count}")
            if spec.init == "corda":
                yield name, corda(weight, second.to(weight), spec)
            else:
                components = principal(second - torch.outer(mean, mean), spec.r).to(weight)
                yield name, (components, weight.new_zeros(weight.shape[0], spec.r))


def pissa(weight: Tensor, spec: Lora) -> tuple[Tensor, Tensor]:
    """Return A0 and B0 whose scaled product is the best approximation of rank r, the singular values shared evenly."""
    if spec.pissa_iterations:
        u, values, v = torch.svd_lowrank(weight, spec.r, niter=spec.pissa_iterations)
        vh = v.T
    else:
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (values[: spec.r] / scaling(spec)).sqrt()
    return root[:, None] * vh[: spec.r], u[:, : spec.r] * root


def olora(weight: Tensor, spec: Lora) -> tuple[Tensor, Tensor]:
    """Return the first rows of R and the first columns of Q."""
    q, r = torch.linalg.qr(weight)
    return r[: spec.r], q[:, : spec.r]


def corda(weight: Tensor, covariance: Tensor, spec: Lora) -> tuple[Tensor, Tensor]:
    """Return the first directions of W C, with C the covariance of the inputs, brought back by its inverse.

    C is damped until it can be inverted well, as PEFT does it.
    """
    eye, damp = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device), 0.01
    while True:
        damped = covariance + eye * covariance.diagonal().mean() * damp
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damp *= 2
    u, values, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    root = (values[: spec.r] / scaling(spec)).sqrt()
    return root[:, None] * (vh[: spec.r] @ inverse), u[:, : spec.r] * root


def principal(covariance: Tensor, count: int) -> Tensor:
    """Return the directions of largest variance ``(count, I)``, each with its largest entry positive."""
    directions = torch.linalg.eigh(covariance)[1].T.flip(0)[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign()


def _portions(model: nn.Module, modules: Sequence[str]) -> Iterator[list[str]]:
    """Yield layers in groups whose second moments fit into memory."""
    widest = max(_matrix(model.get_submodule(name)).shape[1] for name in modules)
    each, left = max(1, _BYTES // (8 * widest**2)), iter(modules)
    while part := list(islice(left, each)):
        yield part


def _gather(
    model: nn.Module, modules: Sequence[str], run: Callable[[Any], object], samples: Any, *, corda: bool
) -> dict[str, tuple[int, Tensor, Tensor]]:
    """Return each layer's number of rows S, their mean ``(I,)`` and second moment ``(I, I)`` in float64.

    For CorDA the second moment is PEFT's: that of each sample divided by its largest entry, summed over its rows.
    """
    counts = dict.fromkeys(modules, 0)
    calls = dict.fromkeys(modules, 0)
    means: dict[str, Any] = dict.fromkeys(modules, 0.0)
    seconds: dict[str, Any] = dict.fromkeys(modules, 0.0)

    def hook(name: str) -> Any:
        def look(_: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double()  # (S, I)
            if not len(rows):
                return
            if corda:
                rows = rows / rows.max().abs()
            counts[name] += len(rows)
            calls[name] += 1
            means[name] += rows.sum(0)
            seconds[name] += rows.T @ rows

        return look

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    try:
        for sample in samples:
            run(sample)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (
            counts[name],
            means[name] / max(counts[name], 1),
            seconds[name] / max(calls[name] if corda else counts[name], 1),
        )
        for name in modules
    }


@torch.no_grad()
def apply_start(model: nn.Module, start: Mapping[str, Tensor], spec: Lora, adapter: str) -> None:
    """Set A and B, and take their product off the weights where the start says so; the layers are PEFT's.

    The weights may be ZeRO-3's shards; all ranks call it then.

    Raises:
        ValueError: The start is of other layers or another rank.
    """
    for name in dict.fromkeys(key.rpartition(".")[0] for key in start):
        layer: Any = model.get_submodule(name)
        a, b = (start[f"{name}.lora_{matrix}"].to(layer.base_layer.weight.device) for matrix in "AB")
        for parameter, value in ((layer.lora_A[adapter].weight, a), (layer.lora_B[adapter].weight, b)):
            if parameter.shape != value.shape:
                raise ValueError(f"the start of {name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
            parameter.data = value.clone().to(parameter.dtype)
        if spec.init in REWRITING:
            weight = layer.base_layer.weight
            with gather_params_ctx(weight):  # whole on every rank, where ZeRO-3 keeps shards
                residual = _matrix(layer.base_layer) - scaling(spec) * b @ a
                weight.copy_(residual.T if isinstance(layer.base_layer, Conv1D) else residual)
    if spec.init in REWRITING:
        setattr(model, START, dict(start))


@torch.no_grad()
def take_back(model: nn.Module, *, merged: bool) -> None:
    """Undo `apply_start` before an adapter is taken off: what it took off the weights is added, exact to rounding.

    Not so where the adapter is `merged`: residual and adapter make up the weight together.
    """
    start = vars(model).pop(START, None) or {}
    if merged:
        return
    for name in dict.fromkeys(key.rpartition(".")[0] for key in start):
        layer: Any = model.get_submodule(name)
        weight = layer.base_layer.weight
        if weight.is_meta:
            continue
        a, b = (start[f"{name}.lora_{matrix}"].to(weight.device) for matrix in "AB")
        whole = _matrix(layer.base_layer) + next(iter(layer.scaling.values())) * b @ a
        weight.data = (whole.T if isinstance(layer.base_layer, Conv1D) else whole).to(weight.dtype)


def as_plain(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors under PEFT's names as those of a LoRA of rank 2 r on the untouched weights.

    s (B A - B0 A0) = s [B, -B0] [A; A0].
    """
    plain = dict(tensors)
    for key, first in getattr(model, START, {}).items():
        value = plain[f"{key}.weight"].detach().cpu()
        both = [value, first.to(value.dtype)] if key.endswith(".lora_A") else [value, -first.to(value.dtype)]
        plain[f"{key}.weight"] = torch.cat(both, dim=0 if key.endswith(".lora_A") else 1)
    return plain


def plain_fields(model: nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    """Return PEFT's configuration for `as_plain`: twice the rank, the same scaling."""
    if not getattr(model, START, None):
        return fields
    factor = 2**0.5 if fields["use_rslora"] else 2
    return fields | {"r": 2 * fields["r"], "lora_alpha": factor * fields["lora_alpha"]}
