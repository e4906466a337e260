"""What the pictures of docs/vision.md show is what the connector and the tilings do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsevlm.connectors.dpc_knn import DpcKnnBlock, DpcKnnSpec
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens
from tests import tiny
from tools import draw_vision as draw


def test_clusters_are_those_that_the_block_merges():
    torch.manual_seed(0)
    tokens = torch.randn(100, 6)
    spec = DpcKnnSpec(clusters=(20, 10, 5), neighbours=(5, 3, 3))
    levels = draw.cluster_levels(tokens, spec)
    merged = DpcKnnBlock(spec)(VisualTokens(tokens, (Grid(1, 10, 10),), (MediaKind.IMAGE,), (0,))).features
    first = torch.stack([tokens[torch.from_numpy(levels[0] == i)].mean(0) for i in range(20)])
    torch.testing.assert_close(merged[:20], first, rtol=0, atol=1e-6)
    for fine, coarse, count in zip(levels, levels[1:], (10, 5)):
        assert len(np.unique(coarse)) == count
        assert all(len(np.unique(coarse[fine == i])) == 1 for i in np.unique(fine))  # coarse ones are made of fine ones


def test_table_has_the_published_numbers():
    rows = {line.split(" | ")[0].strip("| "): line for line in draw.table(draw.parse_sizes(draw.SIZES)).splitlines()}
    assert "1 x 2: 1,176" in rows["336 x 336"] and "2 x 2: 1,280" in rows["336 x 336"]
    assert "2 x 2: 2,928" in rows["672 x 672"] and "2 x 2: 320 + 4" in rows["640 x 480"]


@pytest.mark.parametrize("system", draw.SYSTEMS, ids=lambda system: system.name)
def test_every_frame_is_drawn_in_its_place(system):
    canvas, labels = draw._frames(tiny.picture("red", (640, 427)), system)
    cut, *_ = draw.describe(system, (640, 427))
    columns, rows = map(int, cut.split(" x "))
    assert len(labels) == columns * rows + 1 == len(set(labels))
    assert canvas.shape[0] >= rows * system.side and canvas.shape[1] >= (columns + 1) * system.side


def test_pictures_are_written(tmp_path):
    from transformers import AutoModel

    assert draw.main(["slices", "--out", str(tmp_path / "slices.jpg")]) == 0
    AutoModel.from_config(tiny.vision_config("clip", hidden_size=8, image_size=448, patch_size=64)).save_pretrained(
        tmp_path / "tower"
    )
    assert draw.main(["events", "--tower", str(tmp_path / "tower"), "--out", str(tmp_path / "events.jpg")]) == 0
    frames, starts = draw.film(draw.sample_pictures())
    assert len(frames) == 64 and starts == [0, 22, 36, 46]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("slices.jpg", "events.jpg"))
