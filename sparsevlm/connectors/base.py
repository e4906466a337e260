"""What a connector block is: a spec that knows arithmetic and a module that knows tensors.

The processor counts placeholder tokens from specs alone, so a spec's `output_grid` is the contract: for every grid and
kind it must name exactly the grid that the module returns, whatever the pixel values.

Legend: N tokens of all items together, D feature width before the block, D' after it; F frames of h x w tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsevlm.vision.tokens import VisualTokens


class GuideText(NamedTuple):
    """How a block wants the texts that it looks at.

    Attributes:
        tokenizer: Hub id or directory of their tokenizer, or ``language`` for the language model's.
        max_tokens: Tokens of a text; what is longer loses its beginning.
        vocab_size: Ids must be below this; None: whatever the tokenizer gives.
    """

    tokenizer: str
    max_tokens: int
    vocab_size: int | None = None


class BlockSpec(BaseModel):
    """Base of all connector block specs; a subclass declares its options as fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    type: str
    """Registered name of the block."""

    parameter_free: ClassVar[bool] = False
    """True when the module holds no parameter."""

    @property
    def marks(self) -> tuple[bool, bool]:
        """Whether the first and the last token of a medium are marks of its beginning and end, when it leaves here."""
        return False, False

    @property
    def guide(self) -> GuideText | None:
        """What the module needs of `VisualTokens.guides`; None where it does not look at text."""
        return None

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return the grid that an item of ``grid`` and ``kind`` leaves the block with.

        Raises:
            ValueError: The block cannot take such a grid; the message says which sizes it takes.
        """
        return grid

    def output_items(self, items: Sequence[ItemShape]) -> list[ItemShape]:
        """Return the items that a batch's items leave the block with, each medium's still following each other.

        Blocks that look at items one by one need not write this; those that join the items of a medium or add some do.

        Raises:
            ValueError: As `output_grid`.
        """
        return [item._replace(grid=self.output_grid(item.grid, item.kind)) for item in items]

    def output_dim(self, input_dim: int, text_dim: int) -> int:
        """Return the feature width after the block, given the width before it and the language model's."""
        return input_dim

    def build(self, input_dim: int, text_dim: int) -> nn.Module:
        """Return the module, ``forward(tokens: VisualTokens) -> VisualTokens``.

        The module initialises its own parameters (language-model style re-initialisation never reaches it).
        """
        raise NotImplementedError

    def load_pretrained(self, module: nn.Module) -> None:
        """Fill a fresh module with the published weights that an option names, where there is one.

        Called once, when a model is made of its parts; never on the meta device, nor of a saved model.

        Raises:
            ValueError: The weights are not there or do not fit.
        """


def parse_block(raw: Any) -> BlockSpec:
    """Turn ``{"type": name, ...}`` into the spec registered under that name.

    Raises:
        UnknownNameError: No block of that type.
        pydantic.ValidationError: An option is unknown or wrong.
    """
    if isinstance(raw, BlockSpec):
        return raw
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise ValueError(f"a connector block is a mapping with a 'type', got {raw!r}")
    return CONNECTOR_BLOCKS.get(raw["type"]).model_validate(raw)


def parse_connector(raw: Sequence[Any]) -> list[BlockSpec]:
    """Parse a recipe's connector list."""
    return [parse_block(block) for block in raw]


def connector_grid(specs: Sequence[BlockSpec], grid: Grid, kind: MediaKind) -> Grid:
    """Return the grid after all blocks; its `num_tokens` is what the processor writes into the prompt."""
    for spec in specs:
        grid = spec.output_grid(grid, kind)
    return grid


def connector_items(specs: Sequence[BlockSpec], items: Sequence[ItemShape]) -> list[ItemShape]:
    """Return the items after all blocks, as the modules return them."""
    for spec in specs:
        items = spec.output_items(items)
    return list(items)


def connector_guide(specs: Sequence[BlockSpec]) -> GuideText | None:
    """Return how a connector wants its texts, None where no block looks at text.

    Raises:
        ValueError: Two blocks want them differently.
    """
    wanted = {spec.guide: spec.type for spec in specs if spec.guide is not None}
    if len(wanted) > 1:
        raise ValueError(
            f"connector: blocks {' and '.join(map(repr, wanted.values()))} want texts of different tokenizers or "
            f"lengths ({[guide._asdict() for guide in wanted]}); a connector has one: give them the same options"
        )
    return next(iter(wanted), None)


def connector_marks(specs: Sequence[BlockSpec]) -> tuple[bool, bool]:
    """Return whether a medium that leaves the connector begins and ends with a mark; see `BlockSpec.marks`.

    Blocks that map tokens one by one, as projectors do, leave the marks of a block before them in their places.
    """
    for spec in reversed(specs):
        own = type(spec)
        if any(spec.marks):
            return spec.marks
        if own.output_grid is not BlockSpec.output_grid or own.output_items is not BlockSpec.output_items:
            break
    return False, False


def connector_dims(specs: Sequence[BlockSpec], input_dim: int, text_dim: int) -> list[int]:
    """Return the feature width before the first block and after each: ``len(specs) + 1`` numbers."""
    dims = [input_dim]
    for spec in specs:
        dims.append(spec.output_dim(dims[-1], text_dim))
    return dims


def map_frames(tokens: VisualTokens, dim: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of single frames to all frames of all items, as few calls as their sizes allow.

    Args:
        tokens: Features ``(N, D)``.
        dim: Width D' that the function returns; the answer's width when there are no items.
        function: ``(F, h, w, D) -> (F, ..., D')``; each frame's result must depend on that frame alone.

    Returns:
        ``(N', D')``, frames in order.
    """
    import torch

    results, start = [], 0
    for (h, w), run in groupby(tokens.grids, key=lambda grid: (grid.h, grid.w)):
        end = start + sum(grid.num_tokens for grid in run)
        frames = tokens.features[start:end].view(
            -1, h, w, tokens.dim
        )  # time is slowest: items of a size just follow on
        results.append(function(frames).reshape(-1, dim))
        start = end
    return torch.cat(results) if results else tokens.features.new_zeros(0, dim)


def map_items(
    tokens: VisualTokens,
    dim: int,
    function: Callable[[Tensor, Grid, list[int]], Tensor | list[Tensor]],
    module: nn.Module,
) -> Tensor:
    """Apply a function of whole items to all, those of one grid together.

    Args:
        tokens: Features ``(N, D)``.
        dim: Width D' that the function returns; the answer's width when there are no items.
        function: ``(I, n, D)``, their grid, their numbers ``-> (I, n', D')``, or a list of I ``(n', D')`` where n'
            differs; each item's result must depend on that item alone.
        module: Whose weights the function uses.

    Returns:
        ``(N', D')``, items in order.
    """
    import torch

    from sparsevlm.connectors.sharded import most_calls

    of_grid: dict[Grid, list[int]] = defaultdict(list)
    for item, grid in enumerate(tokens.grids):
        of_grid[grid].append(item)
    if not of_grid:
        return tokens.features.new_zeros(0, dim)
    idle = most_calls(len(of_grid), module, tokens.features.device) - len(of_grid)
    parts = tokens.split()
    results: dict[int, Tensor] = {}
    for grid, items in of_grid.items():
        results.update(zip(items, function(torch.stack([parts[item] for item in items]), grid, items)))
    result = torch.cat([results[item] for item in range(len(parts))])
    for _ in range(idle):
        result = result + 0.0 * function(parts[0][None], tokens.grids[0], [0])[0].sum()
    return result
