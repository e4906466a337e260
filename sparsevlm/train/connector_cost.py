"""What connector blocks cost, measured: items are sent through them on the meta device.

A closed formula would have to know each block: a resampler's queries meet other matrices than the tokens that they look
at, and looking costs too.

Legend: N visual tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sparsevlm.adapters.logical import logical_shape
from sparsevlm.connectors.base import connector_guide
from sparsevlm.model.modeling_sparsevlm import connector_widths
from sparsevlm.vision.tokens import Guides, ItemShape, VisualTokens

GUIDE_TOKENS = 32
"""Length that questions are taken to have, for blocks that look at them."""


@dataclass(frozen=True)
class Met:
    """A matrix and the tokens that it is multiplied with.

    Attributes:
        inputs: Width before it.
        outputs: Width after it.
        tokens: Rows that are multiplied with it.
        trainable: It trains in this stage.
    """

    inputs: int
    outputs: int
    tokens: int
    trainable: bool

    @property
    def flops(self) -> int:
        """Operations of the forward pass."""
        return 2 * self.inputs * self.outputs * self.tokens

    @property
    def activations(self) -> int:
        """Numbers that the backward pass needs: what goes in, and what comes out."""
        return (self.inputs + self.outputs) * self.tokens


@dataclass(frozen=True)
class BlockCost:
    """What one set of items costs in a block.

    Attributes:
        matrices: In the order in which they are used.
        products: Operations of the forward pass between activations: scores of attention and their use.
    """

    matrices: tuple[Met, ...]
    products: int


def measure_connector(model: Any, items: Sequence[ItemShape]) -> list[BlockCost]:
    """Return what items cost in each connector block.

    A block whose arithmetic depends on values (clustering) cannot run without them: its matrices, where it has any, are
    taken to meet the tokens that leave it, and the rest is left out.

    Args:
        model: A `SparseVLMForConditionalGeneration` on the meta device, `requires_grad` as the stage sets it.
        items: As they leave the tower.
    """
    specs, dims = connector_widths(model.config)
    guides = None
    if connector_guide(specs) is not None:
        text = torch.zeros(1, GUIDE_TOKENS, dtype=torch.long, device="meta")
        guides = Guides(text, text, (0,) * len(items))
    costs = []
    for spec, block, dim in zip(specs, model.model.connector, dims, strict=False):
        tokens = _tokens(items, dim, guides)
        items = spec.output_items(items)
        if guides is not None:
            guides = Guides(guides.input_ids, guides.attention_mask, (0,) * len(items))
        costs.append(_measure(block, tokens, sum(item.grid.num_tokens for item in items)))
    return costs


def _tokens(items: Sequence[ItemShape], dim: int, guides: Guides | None) -> VisualTokens:
    grids, kinds, media, places = zip(*items, strict=True)
    features = torch.empty(sum(grid.num_tokens for grid in grids), dim, device="meta")  # (N, D)
    return VisualTokens(features, grids, kinds, (0,) * len(items), media, places, guides)


def _measure(block: nn.Module, tokens: VisualTokens, leaving: int) -> BlockCost:
    linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
    met: list[Met] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        met.append(_met(module, output.numel() // output.shape[-1]))

    handles = [module.register_forward_hook(note) for module in linear]
    try:
        # Fake tensors, not plain ones of the meta device: transformers knows not to ask them for values of a mask.
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
            block(tokens)
    except RuntimeError:  # values are needed
        return BlockCost(tuple(_met(module, leaving) for module in linear), 0)
    finally:
        for handle in handles:
            handle.remove()
    return BlockCost(tuple(met), counter.get_total_flops() - sum(each.flops for each in met))


def _met(module: Any, tokens: int) -> Met:
    outputs, inputs = logical_shape(module.weight)
    return Met(inputs, outputs, tokens, module.weight.requires_grad)
