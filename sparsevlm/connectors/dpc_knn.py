"""Token merging by density-peak clustering (Chat-UniVi): 112 tokens an image, 112 for every 16 frames of a video.

Clustering decides under no_grad which tokens belong together; what leaves the block are means of features, and
through them the gradient flows. Everything is deterministic: ties go to the smaller index, and neither the batch that
an item is in nor the size of the pieces that distances are computed in changes a result.

Source: Jin et al., Chat-UniVi, CVPR 2024, section 3.1, and its code (`ChatUniVi/model/cluster.py`, `model/arch.py`).
DPC-KNN: Du et al., Knowledge-Based Systems 99, 2016.

*Deviations*:
- No random noise breaks ties of density; the token with the smaller index counts as the denser one. With one temporal
  neighbour (videos of up to 48 frames) all densities are equal and Chat-UniVi picks events by that noise; here the
  first frame and those least like any frame before them are picked. `min_temporal_neighbours: 2` gives frames a real
  density.
- Density and score are compared as logarithms, which orders them alike and does not underflow on wide-spread features.
- Means are exact; the code divides by ``|c| + 1e-6``.

Legend: B independent sets (frames or events) of N tokens of width C, K clusters, k neighbours, F frames, R rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import ceil
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sparsevlm.connectors.base import BlockSpec
from sparsevlm.registry import CONNECTOR_BLOCKS
from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens

DISTANCE_BYTES = 2**28
"""Memory that distance matrices may take at once; more sets, or rows of a set, are done one piece after another."""

CACHED_BYTES = 2**20
"""The same on CPUs where several sets would be done at once: what stays in the cache of a core is read faster again."""

Count = Annotated[int, Field(ge=1)]


@CONNECTOR_BLOCKS.register("dpc_knn")
class DpcKnnSpec(BlockSpec):
    """Merges the tokens of an image, or of the events of a video, into a fixed number; follow it with a projector.

    Images (and views and slices), each frame by itself: the tokens are merged into the first number of clusters, those
    into the second, and so on; all levels are kept, coarsest last. Videos of 3 frames or more: frames are clustered
    into ``ceil(t / frames_per_event)`` events, ordered by first appearance; level by level, the merged tokens of an
    event's frames are merged once more. Videos of 1 or 2 frames are taken as images.

    Where a frame has fewer tokens than a level has clusters, the level keeps as many as there are:
    ``n_1 = min(clusters_1, h * w)``, ``n_i = min(clusters_i, n_(i-1))``.
    """

    type: Literal["dpc_knn"] = "dpc_knn"
    """Registered name of the block."""
    clusters: tuple[Count, ...] = Field(default=(64, 32, 16), min_length=1)
    """Tokens of each level, finest first."""
    neighbours: tuple[Count, ...] | None = None
    """Neighbours that density is taken from, of each level; default: 5, then 3."""
    frames_per_event: int = Field(default=16, ge=1)
    """Frames of a video for each event."""
    temporal_neighbours: int = Field(default=5, ge=1)
    """Neighbours that a frame's density is taken from (reduced for few events, see `effective_neighbours`)."""
    min_temporal_neighbours: int = Field(default=1, ge=1)
    """Lower limit to that reduction. Chat-UniVi has 1, a frame's only neighbour being itself up to 3 events."""

    parameter_free = True

    @model_validator(mode="after")
    def _levels_fit(self) -> DpcKnnSpec:
        if any(after > before for before, after in zip(self.clusters, self.clusters[1:])):
            raise ValueError(
                f"clusters {list(self.clusters)}: a level cannot have more clusters than the one before it"
            )
        if self.neighbours is not None and len(self.neighbours) != len(self.clusters):
            raise ValueError(
                f"neighbours {list(self.neighbours)} must be one number for each of the {len(self.clusters)} levels of "
                "clusters"
            )
        return self

    def level_sizes(self, num_tokens: int) -> list[int]:
        """Return the tokens of each level, given those of a frame."""
        sizes = []
        for clusters in self.clusters:
            num_tokens = min(clusters, num_tokens)
            sizes.append(num_tokens)
        return sizes

    def num_events(self, grid: Grid, kind: MediaKind) -> int | None:
        """Return the number of events of a video, None for what is taken as images."""
        return ceil(grid.t / self.frames_per_event) if kind.is_video and grid.t > 2 else None

    def output_grid(self, grid: Grid, kind: MediaKind) -> Grid:
        """Return ``(frames or events, 1, tokens of all levels)``."""
        return Grid(self.num_events(grid, kind) or grid.t, 1, sum(self.level_sizes(grid.h * grid.w)))

    def build(self, input_dim: int, text_dim: int) -> DpcKnnBlock:
        """Return the module."""
        return DpcKnnBlock(self)


class DpcKnnBlock(nn.Module):
    """Clusters and merges; arithmetic in float32 whatever the features' type."""

    def __init__(self, spec: DpcKnnSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """Merge the tokens of every item."""
        grids = [self.spec.output_grid(grid, kind) for grid, kind in zip(tokens.grids, tokens.kinds)]
        merged: dict[int, Tensor] = {}  # item -> (n, D)
        by_size: dict[int, list[int]] = defaultdict(list)  # tokens of a frame -> items
        for item, grid in enumerate(tokens.grids):
            by_size[grid.h * grid.w].append(item)
        features = tokens.split()
        for size, items in by_size.items():
            frames = torch.cat([features[item] for item in items]).unflatten(0, (-1, size))  # (F, N, D)
            merged.update(self._merge_items(tokens, items, frames.to(_exact_dtype(frames))))
        if not merged:
            return tokens
        packed = torch.cat([merged[item] for item in range(len(tokens))])
        return tokens.with_features(packed.to(tokens.features.dtype), grids)

    def _merge_items(self, tokens: VisualTokens, items: Sequence[int], frames: Tensor) -> dict[int, Tensor]:
        """Return the merged tokens of items whose frames, ``(F, N, D)`` all together, have one size."""
        levels, current = [], frames
        for level, size in enumerate(self.spec.level_sizes(frames.shape[1])):
            current = self._reduce(current, size, level)
            levels.append(current)  # (F, n_level, D)
        images, events = [], []  # items; (item, its frames)
        start = 0
        for item in items:
            grid = tokens.grids[item]
            own = range(start, start + grid.t)
            number = self.spec.num_events(grid, tokens.kinds[item])
            if number is None:
                images.append((item, own))
            else:
                events += [
                    (item, [own[t] for t in event]) for event in self.events(frames[own.start : own.stop], number)
                ]
            start = own.stop
        per_frame = torch.cat(levels, dim=1)  # (F, n, D), n over all levels
        merged = {item: per_frame[own.start : own.stop].flatten(0, 1) for item, own in images}
        per_event = self._merge_events(levels, [event for _, event in events])
        of_item: dict[int, list[Tensor]] = defaultdict(list)
        for (item, _), event in zip(events, per_event):
            of_item[item].append(event)
        return merged | {item: torch.cat(rows) for item, rows in of_item.items()}

    def events(self, frames: Tensor, number: int) -> list[list[int]]:
        """Return the frames of each event of one video ``(t, N, D)``, events by first appearance, frames in order."""
        k = effective_neighbours(self.spec.temporal_neighbours, number)
        k = min(max(k, self.spec.min_temporal_neighbours), len(frames))
        ids = dpc_knn(frames.detach().mean(dim=1)[None], number, k)[0].tolist()
        events: dict[int, list[int]] = {}
        for t, event in enumerate(ids):
            events.setdefault(event, []).append(t)
        return list(events.values())

    def _merge_events(self, levels: Sequence[Tensor], events: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return ``(n, D)`` of each event, n over all levels; events of as many frames are done together."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, event in enumerate(events):
            by_length[len(event)].append(number)
        merged: dict[int, Tensor] = {}
        for numbers in by_length.values():
            index = torch.tensor([events[number] for number in numbers], device=levels[0].device)  # (E, frames)
            rows = [
                self._reduce(features[index].flatten(1, 2), features.shape[1], level)  # (E, n_level, D)
                for level, features in enumerate(levels)
            ]
            merged.update(zip(numbers, torch.cat(rows, dim=1)))
        return [merged[number] for number in range(len(events))]

    def _reduce(self, x: Tensor, size: int, level: int) -> Tensor:
        """Merge ``(B, N, D)`` into ``(B, size, D)``."""
        k = (self.spec.neighbours or (5, *[3] * level))[level]
        return merge_clusters(x, dpc_knn(x, size, effective_neighbours(k, size)), size)


def effective_neighbours(k: int, num_clusters: int) -> int:
    """Return Chat-UniVi's k: as asked, but few where there are fewer clusters than that."""
    return k if k <= num_clusters else min(3, max(num_clusters // 2, 1))


def dpc_knn(x: Tensor, num_clusters: int, k: int, max_bytes: int = DISTANCE_BYTES) -> Tensor:
    """Cluster each set of tokens; no gradient.

    The centres are the tokens with the largest ``density * distance to the nearest denser token``; a cluster's id is
    the rank of its centre. Every other token joins its nearest centre.

    Args:
        x: ``(B, N, C)``.
        num_clusters: K, at most N.
        k: Neighbours for the density, the token itself included; at most N.
        max_bytes: Memory for distance matrices; the result does not depend on it.

    Returns:
        ``(B, N)`` int64 ids below K; no cluster is empty.
    """
    N = x.shape[1]
    assert 1 <= num_clusters <= N and 1 <= k <= N, f"{num_clusters} clusters and {k} neighbours of {N} tokens"
    with torch.no_grad():
        row_bytes = 16 * N  # products in float64, distances in float32, a masked copy of them
        sets, rows = max(1, max_bytes // (row_bytes * N)), max(1, max_bytes // row_bytes)
        if x.device.type == "cpu":
            sets = min(sets, max(1, CACHED_BYTES // (row_bytes * N)))
        chunks = x.detach().split(sets)
        return torch.cat([_cluster(chunk.double(), num_clusters, k, rows) for chunk in chunks])


def merge_clusters(x: Tensor, ids: Tensor, num_clusters: int) -> Tensor:
    """Return the mean of each cluster, ``(B, N, C), (B, N) -> (B, K, C)``; differentiable."""
    offsets = num_clusters * torch.arange(len(x), device=x.device)
    ids = (ids + offsets[:, None]).flatten()  # (B * N), clusters of all sets numbered through
    sizes = torch.bincount(ids, minlength=num_clusters * len(x))
    if x.device.type == "cpu":
        sums = x.new_zeros(len(sizes), x.shape[-1]).index_add(0, ids, x.flatten(0, 1))
        return (sums / sizes[:, None]).unflatten(0, (-1, num_clusters))
    # Summed over sorted segments, not by index_add, whose order of summation is random on GPUs.
    gathered = x.flatten(0, 1).index_select(0, ids.argsort(stable=True))
    means = torch.segment_reduce(gathered, "mean", lengths=sizes, axis=0, unsafe=True)
    return means.unflatten(0, (-1, num_clusters))


def density_peaks(x: Tensor, k: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return, of float64 tokens, each one's log density and its distance to the nearest denser one, both ``(B, N)``.

    ``log density_i = -1/k * sum of squared distances to the k nearest``, itself included. The densest token of a set
    gets the largest distance in it.
    """
    return _peaks(x, k, rows, _squared_distances(x, x) if rows >= x.shape[1] else None)


def _peaks(x: Tensor, k: int, rows: int, whole: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what `density_peaks` does; without the `whole` distances they are computed twice, `rows` at a time."""
    N = x.shape[1]
    blocks = [slice(start, start + rows) for start in range(0, N, rows)]
    densities, diameters = [], []
    for block in blocks:
        squared = _squared_distances(x[:, block], x) if whole is None else whole  # (B, R, N)
        # Term by term: a reduction's order of summation may depend on the shape of the batch.
        densities.append(-sum(_smallest(squared, k)) / k)
        diameters.append(squared.amax(dim=(1, 2)))
    density = torch.cat(densities, dim=1)
    diameter = torch.stack(diameters).amax(dim=0)[:, None, None]
    order = density.sort(dim=1, descending=True, stable=True).indices  # of equal densities the first token's is larger
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(N, device=x.device).expand_as(order)).int()
    separations = []
    for block in blocks:
        squared = _squared_distances(x[:, block], x) if whole is None else whole
        denser = ranks[:, None, :] < ranks[:, block, None]  # (B, R, N)
        separations.append(torch.where(denser, squared, diameter).amin(dim=-1))
    return density, torch.cat(separations, dim=1).sqrt()


def _smallest(squared: Tensor, k: int) -> Sequence[Tensor]:
    """Return the k smallest numbers of each row in ascending order, ``(B, R)`` each."""
    if squared.device.type != "cpu" or k > 8:
        return squared.topk(k, largest=False).values.unbind(-1)
    left, smallest = squared.clone(), []  # on CPUs a few searches take half as long as topk
    for _ in range(k):
        value, place = left.min(dim=-1)
        left.scatter_(2, place[..., None], torch.inf)
        smallest.append(value)
    return smallest


def _cluster(x: Tensor, num_clusters: int, k: int, rows: int) -> Tensor:
    x = x - x.mean(dim=1, keepdim=True)  # distances stay, but are no longer small differences of large norms
    whole = _squared_distances(x, x) if rows >= x.shape[1] else None
    density, separation = _peaks(x, k, rows, whole)
    score = density + separation.log()  # -inf for a token that coincides with a denser one
    centres = score.sort(dim=1, descending=True, stable=True).indices[:, :num_clusters]  # (B, K)
    if whole is not None:
        ids = whole.gather(1, centres[..., None].expand(-1, -1, x.shape[1])).argmin(dim=1)
    else:
        places = x.gather(1, centres[..., None].expand(-1, -1, x.shape[-1]))  # (B, K, C)
        ids = torch.cat([_squared_distances(piece, places).argmin(dim=-1) for piece in x.split(rows, dim=1)], dim=1)
    ranks = torch.arange(num_clusters, device=x.device).expand_as(centres)
    return ids.scatter(1, centres, ranks)  # a centre leads its own cluster, also where two centres coincide


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return ``|a_i - b_j|^2 / C`` in float32, of float64 tokens ``(B, R, C), (B, N, C) -> (B, R, N)``.

    A matrix product in float64 is exact enough that rounding to float32 hides in what batch it was computed, and five
    times faster than taking differences; in float32 it would give equal tokens a distance.
    """
    products = torch.bmm(a, b.mT)
    if a is b:
        a_norm = b_norm = products.diagonal(dim1=1, dim2=2).clone()
    else:
        a_norm, b_norm = torch.linalg.vecdot(a, a), torch.linalg.vecdot(b, b)
    squared = products.mul_(-2).add_(a_norm[:, :, None]).add_(b_norm[:, None, :])
    squared.masked_fill_(squared < 1e-12 * a_norm[:, :, None], 0)  # equal tokens, up to the rounding of the above
    return squared.div_(a.shape[-1]).float()


def _exact_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
