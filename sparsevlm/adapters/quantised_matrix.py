"""One matrix in 4 or 8 bits, and the linear layer around it, through bitsandbytes. Imported where it is needed.

4 bits: blocks of 64 numbers, each with its largest absolute value; double quantisation holds these in 8 bits, in blocks
of 256 (QLoRA, Dettmers et al., arXiv:2305.14314, section 3). 8 bits: rows, each with its largest absolute value
(LLM.int8(), arXiv:2208.07339, without its outliers). All is quantised on the CPU from float32, so that equal weights
give equal bits, whatever they were loaded as and wherever they run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as B
from torch import Tensor, nn

from sparsevlm.adapters.quantise import BLOCK
from sparsevlm.adapters.quantised_stack import frozen_linear

_PARAMS4: Any = bnb.nn.Params4bit
_PARAMS8: Any = bnb.nn.Int8Params


@dataclass
class Packed4:
    """A matrix in 4 bits, of bitsandbytes' `quantize_4bit`."""

    numbers: Tensor
    state: Any

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix."""
        return _dequantise4(self.numbers, self.state, dtype)

    def to(self, device: torch.device) -> None:
        """Move it, in place."""
        self.numbers = self.numbers.to(device)
        self.state.to(device)

    @property
    def bytes(self) -> int:
        """Bytes of numbers and constants; the table of the 16 (and 256) values is no matrix's own."""
        return _bytes4(self.numbers, self.state)


@dataclass
class Packed8:
    """A matrix in 8 bits, of bitsandbytes' `int8_vectorwise_quant`."""

    numbers: Tensor
    scales: Tensor

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix."""
        return _dequantise8(self.numbers, self.scales, dtype)

    def to(self, device: torch.device) -> None:
        """Move it, in place."""
        self.numbers, self.scales = self.numbers.to(device), self.scales.to(device)

    @property
    def bytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.numbers.nbytes + self.scales.nbytes


def quantise_matrix(weight: Tensor, kind: str, double: bool) -> Packed4 | Packed8:
    """Quantise one matrix ``(out, in)``; the result is on the CPU.

    Args:
        weight: The matrix; not changed.
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: Quantise the constants of 4 bits, too.
    """
    weight = weight.detach().to("cpu", torch.float32).contiguous()
    if kind != "int8":
        numbers, state = B.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double, quant_type=kind)
        return Packed4(numbers, state)
    half = weight.clamp(-65504, 65504).to(torch.float16)  # as bitsandbytes rounds first
    empty = half.abs().amax(1) == 0  # rows that would be divided by zero
    half[empty, 0] = 1
    numbers, scales, _ = B.int8_vectorwise_quant(half)
    numbers[empty], scales[empty] = 0, 0
    return Packed8(numbers, scales)


def _dequantise4(numbers: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    absmax = state.absmax
    if state.nested:
        absmax = B.dequantize_blockwise(absmax, state.state2) + state.offset
    wide = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    # As one row: on CPUs bitsandbytes 0.50.2 takes wrong constants where rows of a multiple of 16 end inside a block.
    count = state.shape.numel()
    flat = torch.ops.bitsandbytes.dequantize_4bit(
        numbers, absmax.float(), state.blocksize, state.quant_type, (count + count % 2,), wide
    )
    return flat.reshape(-1)[:count].reshape(state.shape).to(dtype)


def _dequantise8(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return B.int8_vectorwise_dequant(numbers, scales).to(dtype)


def _bytes4(numbers: Tensor, state: Any) -> int:
    constants = state.absmax.nbytes
    if state.nested:
        constants += state.state2.absmax.nbytes + state.offset.nbytes
    return numbers.nbytes + constants


def _arithmetic(x: Tensor, chosen: torch.dtype | None) -> torch.dtype:
    """Return the type to compute in: the chosen one, else autocast's, else the input's."""
    device = x.device.type
    if chosen is not None:
        return chosen
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _Quantised:
    """What both layers do the same."""

    chosen_dtype: torch.dtype | None
    bias: nn.Parameter | None

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the weight ``(out, in)``."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Leave out the constants, which bitsandbytes adds: what is quantised is not saved, but quantised again."""
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)  # pyright: ignore

    def _run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute in the type of ``x``."""
        return frozen_linear(x, self.dequantise, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``, in the type of ``x``, under autocast in its type as any linear layer."""
        dtype = _arithmetic(x, self.chosen_dtype)
        with torch.autocast(x.device.type, enabled=False):
            output = self._run(x.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return output if self.chosen_dtype is None else output.to(x.dtype)


class Linear4(_Quantised, bnb.nn.Linear4bit):
    """bitsandbytes' `Linear4bit`, which takes its own way of computing on some CPUs in evaluation, and casts biases.

    *Deviation*: neither happens here, so that training and evaluation compute the same.
    """

    def __init__(self, linear: nn.Linear, kind: str, double: bool, dtype: torch.dtype | None) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=double,
            quant_type=kind,
            device=torch.device("meta"),  # pyright: ignore
        )
        device = linear.weight.device
        packed = quantise_matrix(linear.weight, kind, double)
        assert isinstance(packed, Packed4)
        packed.to(device)
        self.weight = _PARAMS4(
            packed.numbers,
            requires_grad=False,
            quant_state=packed.state,
            blocksize=BLOCK,
            compress_statistics=double,
            quant_type=kind,
            module=self,
            bnb_quantized=True,
        )
        self.quant_state = packed.state
        self.bias = linear.bias
        self.chosen_dtype = dtype
        self.train(linear.training)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the weight ``(out, in)``."""
        return _dequantise4(self.weight.data, self.quant_state, dtype)

    def _run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type == "cpu":
            return super()._run(x, bias)
        return bnb.matmul_4bit(x, self.weight, bias=bias, quant_state=self.quant_state)  # pyright: ignore

    @property
    def bytes(self) -> int:
        """Bytes of the weight and its constants."""
        return _bytes4(self.weight.data, self.quant_state)


class Linear8(_Quantised, bnb.nn.Linear8bitLt):
    """bitsandbytes' `Linear8bitLt`, its weights in 8 bits.

    *Deviations*: on the CPU the input is not quantised (there bitsandbytes quantises it in evaluation, but not in
    training). On other devices it is bitsandbytes' product of 8-bit numbers, with the input quantised row by row.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=False,
            has_fp16_weights=False,
            device=torch.device("meta"),  # pyright: ignore
        )
        device = linear.weight.device
        packed = quantise_matrix(linear.weight, "int8", False)
        assert isinstance(packed, Packed8)
        packed.to(device)
        self.weight = _PARAMS8(packed.numbers, requires_grad=False, has_fp16_weights=False)
        self.state.SCB = packed.scales
        self.bias = linear.bias
        self.chosen_dtype = dtype
        self.train(linear.training)

    def _scales(self) -> Tensor:
        """Return the scales where the weight is: bitsandbytes leaves them behind when a whole model moves."""
        scales: Any = self.state.SCB
        if scales.device != self.weight.device:
            self.state.SCB = scales = scales.to(self.weight.device)
        return scales

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the weight ``(out, in)``."""
        return _dequantise8(self.weight.data, self._scales(), dtype)

    def _run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type == "cpu":
            return super()._run(x, bias)
        self.state.CB, self.state.SCB = self.weight.data, self._scales()
        self.state.is_training = self.training
        return bnb.matmul(x, self.weight, bias=bias, state=self.state)  # pyright: ignore

    @property
    def bytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.weight.nbytes + self._scales().nbytes
