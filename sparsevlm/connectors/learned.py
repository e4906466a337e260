"""Weights of a connector block that no layer of torch holds: queries, tokens, embeddings."""

from __future__ import annotations

from torch import Tensor, nn


class Learned(nn.Module):
    """A weight in a module of its own, which is called for it.

    ZeRO-3 gathers the weights of a module for its forward and its backward pass, and knows the latter by the tensors
    that go in and come out. A block takes and gives `VisualTokens`, which it cannot look into: weights of the block
    itself would be gone when their gradient comes.

    Args:
        weight: What it begins with.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """Return the weight."""
        return self.weight.clone()  # what is gathered may be let go of behind this call
