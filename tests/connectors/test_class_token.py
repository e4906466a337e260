"""Class tokens of several layers, against the tower's own hidden states."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.connectors.base import parse_block
from sparsevlm.vision.encoder import encode_frames
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens
from tests import tiny


def test_the_tokens_are_the_class_tokens_of_the_layers_in_order() -> None:
    """As in LaVIN: the class token after each of some blocks, one visual token each; here of two frames."""
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel(tiny.vision_config(num_hidden_layers=4)).eval()
    frames = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = encode_frames(tower, frames, layer=[2, 4], select="full")  # (2, 17, 64)
        states = tower(frames, output_hidden_states=True).hidden_states
    assert states is not None
    tokens = VisualTokens(features.flatten(0, 1), (Grid(2, 1, 17),), (MediaKind.VIDEO,), (0,))
    result = parse_block({"type": "class_token", "levels": 2}).build(64, 8)(tokens)
    assert result.grids == (Grid(2, 1, 2),)
    naive = [states[layer][frame, 0] for frame in range(2) for layer in (2, 4)]
    torch.testing.assert_close(result.features, torch.stack(naive), rtol=0, atol=0)


def test_patches_and_widths_that_do_not_divide_are_refused() -> None:
    spec = parse_block({"type": "class_token", "levels": 5})
    with pytest.raises(ValueError, match=r"grid of 4 x 6 patches; put the block first, and set model\.vision\.select"):
        spec.output_grid(Grid(1, 4, 6), MediaKind.IMAGE)
    with pytest.raises(ValueError, match="5 levels do not divide the width 12"):
        spec.build(12, 8)
