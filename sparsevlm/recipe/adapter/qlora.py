"""`adapter: {type: qlora}`: low-rank additions to matrices in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from sparsevlm.recipe.adapter.lora import Lora
from sparsevlm.recipe.section import CrossFault, names


class QLora(Lora):
    """Low-rank additions to frozen matrices that are held in 4 or 8 bits (QLoRA, arXiv:2305.14314).

    All options of `lora`, and what the frozen weights are rounded to, through bitsandbytes (`pip install
    'sparsevlm[quant]'`). Experts are quantised too, one by one, and dequantised where they are used. Embeddings, output
    head, routers, norms and biases stay as they are.
    """

    zero: ClassVar[int] = 2

    type: Literal["qlora"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Kind of adapter."""
    quantisation: Literal["nf4", "fp4", "int8"] = "nf4"
    """What weights are rounded to: 4 bits of a normal distribution's quantiles, or of a floating-point number, in
    blocks of 64; or 8 bits, in rows."""
    double_quant: bool = True
    """Quantise the constants of 4-bit blocks, too: 0.13 bits a weight instead of 0.5."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that weights are dequantised to for a product; `auto`: that of the stage's arithmetic (`precision`)."""
    quantise: list[Literal["language", "vision", "connector"]] = Field(default=["language"], min_length=1)
    """Parts that are quantised: attention, FFNs and experts of the language model, linear layers of the tower, of the
    connector. A quantised connector does not train in full."""

    @model_serializer(mode="wrap")
    def _with_a_meaning(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is refused with 8 bits: a recipe that is written down must be one that can be read."""
        options = handler(self)
        return {k: v for k, v in options.items() if k != "double_quant" or self.quantisation != "int8"}

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        yield from super().cross_faults(raw)
        start = raw.get("init", "default")
        if isinstance(start, str) and start not in ("default", "gaussian"):
            yield ("init",), f"'init: {start}' needs weights that are not quantised: 'default' or 'gaussian'"
        if raw.get("quantisation") == "int8" and "double_quant" in raw:
            yield ("double_quant",), "'double_quant' is about the constants of 4-bit blocks; leave it out with int8"
        parts = names(raw.get("quantise"))
        for i, part in enumerate(parts):
            if part in parts[:i]:
                yield ("quantise", i), f"{part!r} is named twice"
