"""Stacked experts in 4 or 8 bits: a parameter that is dequantised where it is used, expert by expert.

bitsandbytes quantises linear layers and leaves stacks ``(E, out, in)`` alone, though they are most of a sparse model.
`QuantisedStack` stands in such a parameter's place. It has the shape and the type of the weights, so that kernels, PEFT
and everything that counts take it for the stack, but its own storage is a single NaN: what computes with it gets
weights that are dequantised for this use. Indexing by one expert dequantises that expert alone, and the products with a
frozen matrix dequantise again in backward instead of keeping what they dequantised. So at most one expert of a stack is
there in full precision (with the kernels `eager` and `sorted_mm`), or one stack (`grouped_mm`, and LoRA on experts,
which adds to a whole stack).

Legend: E experts, out and in widths of one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NATIVE = frozenset((
    "shape", "dtype", "device", "requires_grad", "grad", "is_leaf", "ndim", "layout", "is_meta", "is_cuda", "is_cpu",
    "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "grad_fn", "itemsize", "_backward_hooks", "_version",
    "output_nr", "retains_grad", "names", "size", "dim", "ndimension", "numel", "nelement", "is_floating_point",
    "is_complex", "requires_grad_", "element_size", "get_device", "__len__", "__hash__", "is_shared", "set_",
    "data_ptr", "untyped_storage", "storage_offset", "stride", "register_hook", "has_names", "is_contiguous",
    "is_same_size",
))  # fmt: skip
"""What says something about the stack, or about its storage, and needs no weights."""

_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Packed:
    """The quantised experts of one stack.

    Attributes:
        experts: What `quantise_matrix` returned, for each.
        shape: ``(E, out, in)``.
    """

    def __init__(self, experts: Sequence[Any], shape: Sequence[int]) -> None:
        self.experts = list(experts)
        self.shape = torch.Size(shape)

    def dequantise(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return one expert, ``(out, in)``."""
        return self.experts[expert].dequantise(dtype)

    def to(self, device: torch.device) -> None:
        """Move everything, in place."""
        for expert in self.experts:
            expert.to(device)

    @property
    def bytes(self) -> int:
        """Bytes of the numbers and their constants."""
        return sum(expert.bytes for expert in self.experts)


class QuantisedStack(nn.Parameter):
    """A stack ``(E, out, in)``, or one of its experts ``(out, in)``, whose weights are dequantised when used.

    Attributes:
        packed: The quantised experts, shared by all views.
        expert: The expert that this is; None for the stack.
        flipped: The last two dimensions are exchanged.
    """

    packed: Packed
    expert: int | None
    flipped: bool

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        packed: Packed,
        dtype: torch.dtype,
        device: torch.device,
        expert: int | None = None,
        flipped: bool = False,
    ) -> QuantisedStack:
        shape = list(packed.shape if expert is None else packed.shape[1:])
        if flipped:
            shape[-2:] = shape[-1], shape[-2]
        nothing = torch.full((1,), float("nan"), dtype=dtype, device=device).expand(shape)
        self: Any = torch.Tensor._make_subclass(cls, nothing, False)
        self.packed, self.expert, self.flipped = packed, expert, flipped
        return self

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights as a plain tensor of this shape; default: in the type that this has."""
        dtype = dtype or self.dtype
        if self.expert is not None:
            weights = self.packed.dequantise(self.expert, dtype)
        else:
            weights = torch.empty(self.packed.shape, dtype=dtype, device=self.device)
            for i in range(len(weights)):
                weights[i] = self.packed.dequantise(i, dtype)
        return weights.transpose(-2, -1) if self.flipped else weights

    def _like(self, **changes: Any) -> QuantisedStack:
        """Return another view of the same experts."""
        kept = {"dtype": self.dtype, "device": self.device, "expert": self.expert, "flipped": self.flipped}
        return _STACK(self.packed, **(kept | changes))

    def _moved(self, *args: Any, **kwargs: Any) -> QuantisedStack:
        """Stand for `Tensor.to`: a type is what the weights are dequantised to; packed experts move along."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore
        if device is not None and device.type != "meta":
            self.packed.to(device)
        return self._like(dtype=dtype or self.dtype, device=device or self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedStack:
        packed = copy.deepcopy(self.packed, memo)
        return _STACK(packed, self.dtype, self.device, self.expert, self.flipped)

    def __repr__(self) -> str:
        return f"QuantisedStack(shape={tuple(self.shape)}, dtype={self.dtype}, bytes={self.packed.bytes})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("quantised experts are not saved: the model they were quantised from is")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):  # of a property, which knows its own name
            name = func.__self__.__name__
            if name == "data" and func.__name__ == "__get__":
                return args[0]
            native = name in _NATIVE or func.__name__ != "__get__"
        else:
            native = name in _NATIVE
        if native:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], QuantisedStack) else None
        if first is not None:
            found = _view(first, name, args[1:], kwargs)
            if found is not None:
                return found
        if func is F.linear and len(args) > 1 and isinstance(args[1], QuantisedStack) and not _holds_stack(args[0]):
            return frozen_linear(args[0], args[1].dequantise, *args[2:], **kwargs)
        if name in ("grouped_mm", "_grouped_mm") and len(args) > 1 and not _holds_stack(args[0]):
            return _GroupedMm.apply(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        return func(*_plain(args), **_plain(kwargs))


_STACK: Any = QuantisedStack  # as its `__new__` takes it


def _view(stack: QuantisedStack, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what a method gives that needs no weights, None for any other."""
    if name == "__getitem__" and isinstance(args[0], int) and stack.expert is None and not stack.flipped:
        return stack._like(expert=range(len(stack.packed.experts))[args[0]])
    if name == "detach":
        return stack._like()
    if name in ("to", "cuda", "cpu"):
        if name != "to":
            args = (torch.device(name, *args) if name == "cuda" else torch.device("cpu"),)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype)
        return stack._moved(*args, **{key: value for key, value in kwargs.items() if key != "memory_format"})
    if name in _CASTS:
        return stack._like(dtype=_CASTS[name])
    if name in ("transpose", "swapaxes") and sorted(int(dim) % stack.dim() for dim in args) == [
        stack.dim() - 2,
        stack.dim() - 1,
    ]:
        return stack._like(flipped=not stack.flipped)
    if name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        return getattr(torch.empty(0, dtype=stack.dtype, device=stack.device), name)(*args, **kwargs)
    return None


def _holds_stack(value: Any) -> bool:
    return isinstance(value, QuantisedStack)


def _plain(value: Any) -> Any:
    """Return a structure with every stack in it dequantised."""
    if isinstance(value, QuantisedStack):
        return value.dequantise()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(entry) for entry in value)
    return value


class _FrozenLinear(torch.autograd.Function):
    """``x W^T + b`` with a frozen W that is made anew for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Any, bias: Tensor | None) -> Tensor:  # pyright: ignore
        ctx.make, ctx.has_bias = make, bias is not None
        return F.linear(x, make(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        grad_x = grad @ ctx.make(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias


def frozen_linear(x: Tensor, make: Any, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b``; W is frozen, and is not kept for backward.

    As `torch.nn.functional.linear`, the arithmetic is that of autocast where it is on.

    Args:
        x: ``(..., in)``.
        make: Returns W ``(out, in)`` in a type.
        bias: ``(out,)``.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _FrozenLinear.apply(x.to(dtype), make, None if bias is None else bias.to(dtype))  # pyright: ignore
    return _FrozenLinear.apply(x, make, bias)  # pyright: ignore


class _GroupedMm(torch.autograd.Function):
    """`torch.nn.functional.grouped_mm` with a frozen stack that is made anew for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: QuantisedStack, offs: Tensor) -> Tensor:  # pyright: ignore
        ctx.stack, ctx.offs = stack, offs
        return F.grouped_mm(x, stack.dequantise(), offs=offs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weights = ctx.stack.dequantise().transpose(-2, -1)
        return F.grouped_mm(grads[0].contiguous(), weights, offs=ctx.offs), None, None
