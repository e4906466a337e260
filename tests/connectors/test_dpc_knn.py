"""DPC-KNN against loops over single tokens that follow the paper's definitions, and the worked example of the notes."""

import math

import pytest
import torch

from sparsevlm.connectors import dpc_knn as module
from sparsevlm.connectors.base import parse_block
from sparsevlm.connectors.dpc_knn import density_peaks, dpc_knn, effective_neighbours, merge_clusters
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens

IMAGE, VIDEO = MediaKind.IMAGE, MediaKind.VIDEO
EXAMPLE = torch.tensor(
    [[(0, 0), (0, 1), (1, 0.2), (5, 5), (5.5, 5.2), (9, 0), (9.3, 0.4), (8.6, 0.1)]], dtype=torch.float32
)


def naive_clusters(points, num_clusters, k):
    """Cluster ids of a list of points (lists of numbers), by loops in double precision."""
    count, width = len(points), len(points[0])
    distance = [[math.dist(a, b) / math.sqrt(width) for b in points] for a in points]
    density = [-sum(d * d for d in sorted(row)[:k]) / k for row in distance]
    largest = max(max(row) for row in distance)
    score = []
    for i in range(count):
        denser = [
            distance[i][j]
            for j in range(count)
            if density[j] > density[i] or (density[j] == density[i] and j < i)  # ties: the smaller index is denser
        ]
        separation = min(denser) if denser else largest
        score.append(math.exp(density[i]) * separation)
    centres = sorted(range(count), key=lambda i: (-score[i], i))[:num_clusters]
    ids = []
    for i in range(count):
        to_centres = [distance[i][centre] for centre in centres]
        ids.append(centres.index(i) if i in centres else to_centres.index(min(to_centres)))
    return ids


def naive_merge(points, num_clusters, k):
    """Mean of each cluster: (N, C) -> (K, C)."""
    ids = naive_clusters(points.tolist(), num_clusters, k)
    return torch.stack([points[[i for i, own in enumerate(ids) if own == c]].mean(0) for c in range(num_clusters)])


def naive_item(spec, features, grid, kind):
    """Chat-UniVi's image or video path for one item, frame by frame."""
    clusters, neighbours = list(spec.clusters), [5, 3, 3]
    sizes, left = [], grid.h * grid.w
    for number in clusters:
        left = min(left, number)
        sizes.append(left)
    ks = [effective_neighbours(k, size) for k, size in zip(neighbours, sizes)]
    levels = []  # by frame
    for frame in features.reshape(grid.t, grid.h * grid.w, -1):
        own = []
        for size, k in zip(sizes, ks):
            frame = naive_merge(frame, size, k)
            own.append(frame)
        levels.append(own)
    if kind is not VIDEO or grid.t <= 2:
        return torch.cat([torch.cat(own) for own in levels])
    number = -(-grid.t // spec.frames_per_event)
    k = max(effective_neighbours(spec.temporal_neighbours, number), spec.min_temporal_neighbours)
    means = features.reshape(grid.t, grid.h * grid.w, -1).mean(1)
    ids = naive_clusters(means.tolist(), number, k)
    merged = []
    for event in dict.fromkeys(ids):  # by first appearance
        frames = [t for t in range(grid.t) if ids[t] == event]
        for level, (size, k) in enumerate(zip(sizes, ks)):
            merged.append(naive_merge(torch.cat([levels[t][level] for t in frames]), size, k))
    return torch.cat(merged)


def build(**options):
    spec = parse_block({"type": "dpc_knn", **options})
    return spec, spec.build(8, 8)


def test_worked_example():
    density, separation = density_peaks(EXAMPLE.double(), 3, 8)
    expected = [0.71177, 0.644036, 0.639757, 0.002009, 0.002516, 0.932394, 0.870808, 0.882497]
    torch.testing.assert_close(density.exp()[0], torch.tensor(expected), rtol=0, atol=1e-6)
    expected = [6.081529, 0.707107, 0.72111, 0.380789, 4.22019, 6.589765, 0.353553, 0.291548]
    torch.testing.assert_close(separation[0], torch.tensor(expected), rtol=0, atol=1e-6)
    ids = dpc_knn(EXAMPLE, 3, 3)
    assert ids.tolist() == [[1, 1, 2, 2, 0, 0, 0, 0]]
    merged = merge_clusters(EXAMPLE, ids, 3)[0]
    torch.testing.assert_close(merged, torch.tensor([[8.1, 1.425], [0, 0.5], [3, 2.6]]))


@pytest.mark.parametrize("k, clusters, expected", [(5, 64, 5), (3, 3, 3), (5, 4, 2), (5, 3, 1), (5, 1, 1), (8, 7, 3)])
def test_effective_neighbours(k, clusters, expected):
    assert effective_neighbours(k, clusters) == expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_clusters, k", [(1, 1), (5, 3), (12, 1), (30, 5)])
def test_against_the_loop(seed, num_clusters, k):
    torch.manual_seed(seed)
    x = torch.randn(3, 30, 4)
    ids = dpc_knn(x, num_clusters, k)
    for row, points in zip(ids, x):
        assert row.tolist() == naive_clusters(points.tolist(), num_clusters, k)
        assert sorted(set(row.tolist())) == list(range(num_clusters))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_clusters, k", [(4, 2), (8, 1), (20, 3)])
def test_against_the_loop_with_duplicates(seed, num_clusters, k):
    torch.manual_seed(seed)
    places = torch.randn(1, 6, 4)
    x = places[:, torch.randint(6, (20,))]  # 20 tokens in 6 places: every density and many scores are tied
    assert dpc_knn(x, num_clusters, k)[0].tolist() == naive_clusters(x[0].tolist(), num_clusters, k)


def test_equal_tokens_give_the_first_ones_as_centres():
    x = torch.ones(2, 7, 3)
    assert dpc_knn(x, 3, 2).tolist() == [[0, 1, 2, 0, 0, 0, 0]] * 2


def test_density_does_not_underflow():
    density, _ = density_peaks(EXAMPLE.double() * 1000, 3, 8)  # down to e**-1e6
    assert torch.isfinite(density).all()
    assert len(set(density[0].tolist())) == 8
    assert torch.equal(dpc_knn(EXAMPLE * 1000, 3, 3)[0].unique(), torch.arange(3))


@pytest.mark.parametrize("rows", [3, 8, 20])
def test_sets_do_not_see_each_other(rows):
    torch.manual_seed(0)
    x = torch.randn(4, 20, 3).double() * torch.tensor([0.1, 1, 10, 100])[:, None, None]
    together = density_peaks(x, 4, rows)
    for number in range(4):
        alone = density_peaks(x[number : number + 1], 4, 20)
        for got, want in zip(together, alone):
            torch.testing.assert_close(got[number], want[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_bytes", [1, 500, 3_000, 30_000, 200_000, 2**28])
def test_result_does_not_depend_on_the_chunks(max_bytes):
    torch.manual_seed(0)
    x = torch.randn(7, 40, 16)
    x[:, 30:] = x[:, :10]
    assert torch.equal(dpc_knn(x, 12, 4, max_bytes=max_bytes), dpc_knn(x, 12, 4))


@pytest.mark.parametrize("budget", [30_000, 400_000])  # what a set takes whole is 160,000
def test_distances_stay_within_their_budget(monkeypatch, budget):
    shapes = []
    plain = module._squared_distances

    def measure(a, b):
        shapes.append((*a.shape[:2], b.shape[1]))
        return plain(a, b)

    monkeypatch.setattr(module, "_squared_distances", measure)
    dpc_knn(torch.randn(6, 100, 4), 10, 3, max_bytes=budget)
    assert len(shapes) > 2
    assert all(8 * math.prod(shape) <= budget for shape in shapes)  # products in float64
    assert any(shape[0] > 1 for shape in shapes) == (budget > 160_000)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_distances_against_differences(scale):
    torch.manual_seed(0)
    x = (torch.randn(3, 50, 64) * scale + 5 * scale).double()
    x[:, 40:] = x[:, :10]
    squared = module._squared_distances(x, x)
    exact = (x[:, :, None] - x[:, None]).square().mean(-1).float()
    torch.testing.assert_close(squared, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(squared, squared.mT, rtol=1e-6, atol=0)
    assert (squared.diagonal(dim1=1, dim2=2) == 0).all()
    assert (squared[:, 40:, :10].diagonal(dim1=1, dim2=2) == 0).all()  # equal tokens


@pytest.mark.parametrize("k", [1, 4, 8, 9])
def test_the_nearest_are_those_of_topk(k):
    torch.manual_seed(0)
    squared = torch.randint(6, (3, 20, 20)).float()  # many are equal
    squared[0, 3] = torch.inf
    found = torch.stack(list(module._smallest(squared, k)), dim=-1)
    assert torch.equal(found, squared.topk(k, largest=False).values)


def test_merge_against_the_loop():
    torch.manual_seed(0)
    x, ids = torch.randn(4, 9, 5), torch.randint(3, (4, 9))
    ids[:, :3] = torch.arange(3)
    merged = merge_clusters(x, ids, 3)
    for row in range(4):
        for cluster in range(3):
            torch.testing.assert_close(merged[row, cluster], x[row][ids[row] == cluster].mean(0))


def test_gradient_of_the_means():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    ids = dpc_knn(x, 3, 2)
    assert torch.autograd.gradcheck(lambda features: merge_clusters(features, ids, 3), x)


@pytest.mark.parametrize(
    "grid, kind",
    [
        (Grid(1, 5, 6), IMAGE),
        (Grid(3, 4, 4), IMAGE),
        (Grid(2, 4, 4), MediaKind.MULTI_VIEW),
        (Grid(4, 4, 4), MediaKind.SLICE),
        (Grid(1, 2, 2), IMAGE),
        (Grid(1, 5, 6), VIDEO),
        (Grid(2, 5, 6), VIDEO),
        (Grid(3, 5, 6), VIDEO),
        (Grid(8, 4, 4), VIDEO),
        (Grid(9, 4, 4), VIDEO),
        (Grid(30, 2, 3), VIDEO),
        (Grid(35, 1, 1), VIDEO),
    ],
    ids=str,
)
@pytest.mark.parametrize("least", [1, 2])
def test_paths_against_loops(grid, kind, least):
    spec, block = build(clusters=[8, 4, 2], frames_per_event=4, min_temporal_neighbours=least)
    torch.manual_seed(grid.num_tokens)
    scenes = torch.randn(4, 1, 8)[torch.randint(4, (grid.t,))]  # frames of one scene resemble each other
    features = (scenes + 0.3 * torch.randn(grid.t, grid.h * grid.w, 8)).flatten(0, 1)
    result = block(VisualTokens(features, (grid,), (kind,), (0,)))
    torch.testing.assert_close(result.features, naive_item(spec, features, grid, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames, tokens", [(1, 112), (2, 224), (3, 112), (16, 112), (17, 224), (48, 336), (64, 448)])
def test_counts_of_chat_univi(frames, tokens):
    spec, _ = build()
    for side in (16, 24):  # 224 and 336 px
        assert spec.output_grid(Grid(1, side, side), IMAGE) == Grid(1, 1, 112)
        assert spec.output_grid(Grid(frames, side, side), VIDEO).num_tokens == tokens


def test_fewer_tokens_than_clusters():
    spec, block = build()
    assert [spec.level_sizes(n) for n in (1, 20, 49, 64)] == [[1, 1, 1], [20, 20, 16], [49, 32, 16], [64, 32, 16]]
    features = torch.randn(20, 8)
    result = block(VisualTokens(features, (Grid(1, 4, 5),), (IMAGE,), (0,))).features
    torch.testing.assert_close(result[:20].sort(dim=0).values, features.sort(dim=0).values)  # nothing merged, or lost


def test_events_are_in_order_of_first_appearance():
    _, block = build(clusters=[1], frames_per_event=4)
    places = torch.tensor([[5.0] * 8, [-5.0] * 8, [0.0] * 8])
    scenes = [2, 2, 0, 2, 0, 0, 1, 1, 2, 1]  # 10 frames: 3 events, none contiguous
    features = places[scenes].repeat_interleave(4, dim=0)
    result = block(VisualTokens(features, (Grid(10, 2, 2),), (VIDEO,), (0,)))
    torch.testing.assert_close(result.features, places[[2, 0, 1]])


def test_one_temporal_neighbour_picks_the_frames_least_like_earlier_ones():
    _, block = build(clusters=[1], frames_per_event=4)
    values = torch.tensor([0.0, 0.1, 0.2, 9.0, 9.1, 9.2, 9.3])  # 2 events: k is 1
    result = block(VisualTokens(values[:, None].expand(-1, 8).contiguous(), (Grid(7, 1, 1),), (VIDEO,), (0,)))
    torch.testing.assert_close(result.features[:, 0], torch.tensor([0.1, 9.15]))


def test_gradient_is_that_of_the_means():
    """Each level's tokens are means of means: with one cluster a level, every token weighs the same."""
    _, block = build(clusters=[1, 1])
    features = torch.randn(12, 8, requires_grad=True)
    block(VisualTokens(features, (Grid(1, 3, 4),), (IMAGE,), (0,))).features.sum().backward()
    torch.testing.assert_close(features.grad, torch.full((12, 8), 2 / 12))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"clusters": []}, "clusters"),
        ({"clusters": [16, 32]}, "more clusters than the one before"),
        ({"clusters": [0]}, "clusters"),
        ({"neighbours": [5, 3]}, "one number for each of the 3"),
        ({"frames_per_event": 0}, "frames_per_event"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        parse_block({"type": "dpc_knn", **options})
