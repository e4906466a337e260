"""The two-scale block against S2's own steps written out, and through tiling, processor and model."""

from pathlib import Path

import pytest
import torch

from sparsevlm.connectors.base import parse_block
from sparsevlm.recipe.load import load_recipe
from sparsevlm.recipe.tiling import MonkeyTiling
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens
from sparsevlm.vision.views import picture_views

IMAGE, SLICE, VIDEO = MediaKind.IMAGE, MediaKind.SLICE, MediaKind.VIDEO


def cut_picture(features, columns=2, rows=2, overview_last=True, side=4):
    """A picture's slices and overview, then a video of two frames."""
    views = picture_views(MonkeyTiling(type="monkey", columns=columns, rows=rows), 8, (64, 48))
    shapes = [(view.kind, view.place) for view in views]
    if not overview_last:
        shapes = [shapes[-1], *shapes[:-1]]
    kinds, places = zip(*shapes)
    grids = (*(Grid(1, side, side) for _ in shapes), Grid(2, 3, 3))
    media = (*(0 for _ in shapes), 1)
    number = sum(grid.num_tokens for grid in grids)
    return VisualTokens(features(number), grids, (*kinds, VIDEO), media, media, (*places, None))


@pytest.mark.parametrize(("columns", "rows"), [(2, 2), (3, 2), (1, 3)])
@pytest.mark.parametrize("overview_last", [True, False])
def test_it_is_pooling_of_the_larger_scale_beside_the_smaller(columns, rows, overview_last):
    torch.manual_seed(0)
    tokens = cut_picture(lambda n: torch.randn(n, 5), columns, rows, overview_last)
    result = parse_block({"type": "multi_scale"}).build(5, 8)(tokens)
    assert result.grids == (Grid(1, 4, 4), Grid(2, 3, 3)) and result.kinds == (IMAGE, VIDEO)
    assert result.media == (0, 1) and result.places == (None, None) and result.dim == 10
    large = torch.zeros(rows * 4, columns * 4, 5)
    for shape, features in zip(tokens.shapes, tokens.split()):
        if shape.kind is SLICE:
            for number, token in enumerate(features):
                large[shape.place.row * 4 + number // 4, shape.place.col * 4 + number % 4] = token
        elif shape.kind is IMAGE:
            small = features
    area = torch.nn.functional.interpolate(large.permute(2, 0, 1)[None], (4, 4), mode="area")[0]
    picture, video = result.split()
    assert torch.equal(picture[:, :5], small)
    torch.testing.assert_close(picture[:, 5:], area.flatten(1).T, rtol=0, atol=1e-6)
    assert torch.equal(video, torch.cat([tokens.split()[-1]] * 2, dim=-1))


def test_the_larger_scale_of_a_picture_that_is_its_own_mean_is_the_smaller():
    """With one slice there is nothing to average: both halves are the same numbers where both views have them."""
    tokens = cut_picture(lambda n: torch.arange(n).repeat_interleave(5).view(n, 5).float(), 1, 1)
    result = parse_block({"type": "multi_scale"}).build(5, 8)(tokens)
    slice_features, overview = tokens.split()[:2]
    assert torch.equal(result.split()[0], torch.cat([overview, slice_features], dim=-1))


def test_slices_without_an_overview_or_out_of_order_are_refused():
    spec = parse_block({"type": "multi_scale"})
    shapes = cut_picture(lambda n: torch.zeros(n, 5)).shapes
    with pytest.raises(ValueError, match="need one overview of one frame beside them, got 0"):
        spec.output_items(shapes[:4])
    with pytest.raises(ValueError, match="do not make 2 rows of 2"):
        spec.output_items([shapes[1], shapes[0], *shapes[2:5]])
    other = shapes[1]._replace(grid=Grid(1, 2, 2))
    with pytest.raises(ValueError, match="1x2x2, 1x4x4 do not make"):
        spec.output_items([shapes[0], other, *shapes[2:5]])


def test_a_tiling_that_pads_is_refused_in_the_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    text = Path("recipes/quickstart.yaml").read_text()
    assert "  connector:" in text and "  vision:\n" in text
    text = text.replace("  vision:\n", "  vision:\n    tiling: {type: TILING}\n")
    head, tail = text.split("  connector:", 1)
    file.write_text(head + "  connector:\n    - {type: multi_scale}" + tail)
    file.write_text(file.read_text().replace("TILING", "anyres"))
    with pytest.raises(ValueError, match="multi_scale needs slices that together show what the overview shows"):
        load_recipe(file)
