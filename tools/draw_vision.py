"""Pictures and a table of docs/vision.md.

python tools/draw_vision.py slices      how published systems cut a picture
python tools/draw_vision.py clusters    what DPC-KNN merges, coloured
python tools/draw_vision.py events      a film's events on a time line
python tools/draw_vision.py table       tokens of pictures by size, as Markdown
python tools/draw_vision.py systems     what the shipped recipes make of pictures and videos, as Markdown

Clusters and events take a small trained tower: python tools/prepare_smol_parts.py data/smol
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from sparsevlm.connectors.dpc_knn import DpcKnnSpec
from sparsevlm.report.style import EXPERTS, new_figure, panels, styled

if TYPE_CHECKING:
    from torch import Tensor

    from sparsevlm.vision.preprocess import ImageSpec

RESAMPLER = {"type": "perceiver_resampler", "depth": 1, "dim": "language", "ff_mult": 0}
SIZES = "336x336 640x480 480x640 672x672 1000x1000 1024x768 1920x1080 1080x1920 1344x336 500x333 2304x2304"


class System(NamedTuple):
    """How a published system cuts pictures.

    Attributes:
        name: Its name.
        side: Side in pixels that its tower sees.
        grid: Tokens along a side.
        tiling: Options of the tiling.
        connector: Blocks that change the number of tokens.
    """

    name: str
    side: int
    grid: int
    tiling: dict[str, Any]
    connector: list[dict[str, Any]]


SYSTEMS = [
    System("LLaVA-NeXT", 336, 24, {"type": "anyres"}, [{"type": "layout"}]),
    System("LLaVA-OneVision", 384, 27, {"type": "onevision"}, [{"type": "layout", "max_squares": 9}]),
    System("LLaVA-UHD", 336, 24, {"type": "uhd", "max_slices": 6}, [RESAMPLER | {"latents": 64}]),
    System("Monkey", 448, 32, {"type": "monkey"}, [RESAMPLER | {"latents": 256}]),
]


def image_spec(system: System) -> ImageSpec:
    """Return the system's rules for pictures, without its colours."""
    from sparsevlm.vision.preprocess import ImageSpec

    grid = (system.grid, system.grid)
    tiling: Any = system.tiling
    return ImageSpec(system.side, "pad", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), grid, tiling=tiling)


def describe(system: System, size: tuple[int, int]) -> tuple[str, int, int]:
    """Return the slices of a picture (``3 x 2``, columns first), its visual tokens and the text tokens between them."""
    from sparsevlm.connectors.base import connector_items, parse_connector
    from sparsevlm.vision.preprocess import tower_items
    from sparsevlm.vision.tokens import MediaKind

    spec = image_spec(system)
    items = tower_items(spec, MediaKind.IMAGE, 1, size)
    slices = sum(item.kind is MediaKind.SLICE for item in items)
    after = connector_items(parse_connector(system.connector), items)
    place = items[0].place
    cut = f"{place.cols} x {place.rows}" if place and slices else "not cut"
    separated = slices if spec.tiling is not None and spec.tiling.separators else 0
    return cut, sum(item.grid.num_tokens for item in after), separated


def table(sizes: list[tuple[int, int]]) -> str:
    """Return a Markdown table of sizes and tokens."""
    names = [system.name for system in SYSTEMS]
    rows = ["| picture | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for size in sizes:
        cells = []
        for system in SYSTEMS:
            cut, tokens, text = describe(system, size)
            cells.append(f"{cut}: {tokens:,}" + (f" + {text}" if text else ""))
        rows.append(f"| {size[0]} x {size[1]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def systems(directory: Path) -> str:
    """Return a Markdown table of the shipped recipes of published systems: what the last stage sees.

    Args:
        directory: Of the recipes; each system has a folder, whose first recipe stands for it.
    """
    from sparsevlm.recipe.load import load_recipe
    from sparsevlm.train.plan import plan

    media = {"640 x 480": "640x480", "1920 x 1080": "1920x1080", "video, 64 frames": "64f@1280x720"}
    rows = [f"| recipe | {' | '.join(media)} | connector | fusion |", "|---" * (len(media) + 3) + "|"]
    for path in sorted(
        {folder: min(folder.glob("*.yaml")) for folder in directory.iterdir() if folder.is_dir()}.values()
    ):
        recipe = load_recipe(path)
        if recipe.model.vision.path.startswith("data/"):  # parts of this project's own, made by a tool
            continue
        counted = plan(recipe, list(media.values()))["stages"][-1]["visual_tokens"]
        blocks = " → ".join(f"`{block['type']}`" for block in recipe.model.connector)
        fusion = "soft" if recipe.model.fusion is None else f"`{recipe.model.fusion.type}`"
        tokens = " | ".join(f"{counted[medium]:,}" for medium in media.values())
        rows.append(f"| `{path.relative_to(directory)}` | {tokens} | {blocks} | {fusion} |")
    return "\n".join(rows)


def draw_slices(picture: Image.Image, out: Path) -> None:
    """Draw what the tower of each system sees of a picture: its frames, numbered in the order of their tokens."""
    figure, axes = panels(len(SYSTEMS), 2, 3.1)
    for ax, system in zip(axes, SYSTEMS):
        canvas, labels = _frames(picture, system)
        ax.imshow(canvas)
        for i, (left, top) in enumerate(labels, 1):
            style = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": "#333333"}
            ax.text(left, top, str(i), ha="center", va="center", fontsize=9, fontweight="bold", bbox=style)
        cut, tokens, text = describe(system, picture.size)
        note = f" + {text} separators" if text else ""
        ax.set_title(f"{system.name}: {cut} of {system.side} px, {tokens:,} tokens{note}")
        ax.axis("off")
    figure.savefig(out, pil_kwargs={"quality": 92})


def _frames(picture: Image.Image, system: System) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Return the frames side by side (overview on the left, slices where they lie) and where their numbers go."""
    from sparsevlm.vision.preprocess import preprocess_picture
    from sparsevlm.vision.views import picture_views

    spec, side = image_spec(system), system.side
    assert spec.tiling is not None
    views = picture_views(spec.tiling, side, picture.size)
    frames = (preprocess_picture(picture, spec).permute(0, 2, 3, 1).clamp(0, 1).numpy() * 255).astype(np.uint8)
    rows, cols = max(1, views[0].place.rows), views[0].place.cols
    gap = side // 24
    height, step = rows * (side + gap) - gap, side + gap
    canvas = np.full((height, side + 4 * gap + cols * step - gap, 3), 255, np.uint8)
    labels = []
    for view, frame in zip(views, frames):
        left, top = side + 4 * gap + view.place.col * step, view.place.row * step
        if view.place.is_overview:
            left, top = 0, (height - side) // 2
        canvas[top : top + side, left : left + side] = frame
        labels.append((left + side * 0.12, top + side * 0.12))
    return canvas, labels


def features(
    frames: list[Image.Image], tower: str, side: int, layer: int
) -> tuple[np.ndarray, Tensor, tuple[int, int]]:
    """Return frames as the tower sees them ``(F, S, S, 3)``, its features ``(F, N, D)`` and their grid."""
    import torch
    from transformers import AutoModel

    from sparsevlm.model.parts import part_config
    from sparsevlm.vision.encoder import encode_frames, output_grid
    from sparsevlm.vision.preprocess import image_spec_from_config, preprocess_frames

    config = part_config(tower)
    spec = image_spec_from_config(config, None, image_size=side, resize="crop", layer=layer)
    pixels = preprocess_frames(frames, spec)
    with torch.no_grad():
        encoded = encode_frames(AutoModel.from_pretrained(tower).eval(), pixels, layer=layer, chunk=8)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
    seen = (pixels * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return seen, encoded, output_grid(config, side, layer)


def cluster_levels(tokens: Tensor, spec: DpcKnnSpec) -> list[np.ndarray]:
    """Return the cluster of each token ``(N,)``, one array a level, as the connector block merges them."""
    from sparsevlm.connectors.dpc_knn import dpc_knn, effective_neighbours, merge_clusters

    current, levels, of_token = tokens[None], [], None
    for size, k in zip(spec.level_sizes(len(tokens)), spec.neighbours or ()):
        ids = dpc_knn(current, size, effective_neighbours(k, size))
        current = merge_clusters(current, ids, size)
        of_token = ids[0] if of_token is None else ids[0][of_token]
        levels.append(of_token.numpy())
    return levels


def draw_clusters(pictures: list[Image.Image], tower: str, out: Path) -> None:
    """Draw Chat-UniVi's three levels of a picture: patches of one cluster have its mean colour, borders are white."""
    spec = DpcKnnSpec(neighbours=(5, 3, 3))
    seen, encoded, (h, w) = features(pictures, tower, side=896, layer=4)
    figure, axes = panels(4 * len(pictures), 4, 2.6)
    for row, (picture, tokens) in enumerate(zip(seen, encoded)):
        axes[4 * row].imshow(picture)
        axes[4 * row].set_title(f"{h * w} patches")
        for axis, clusters in zip(axes[4 * row + 1 : 4 * row + 4], cluster_levels(tokens, spec)):
            axis.imshow(_painted(picture, clusters.reshape(h, w)))
            axis.set_title(f"{clusters.max() + 1} tokens")
    for axis in axes:
        axis.axis("off")
    figure.savefig(out, pil_kwargs={"quality": 92})


def _painted(picture: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return a picture ``(S, S, 3)`` whose patches have their cluster's mean colour, with borders between clusters."""
    side = picture.shape[0] // clusters.shape[0]
    large = clusters.repeat(side, axis=0).repeat(side, axis=1)
    painted = np.zeros_like(picture)
    for cluster in np.unique(clusters):
        painted[large == cluster] = picture[large == cluster].mean(axis=0)
    border = np.zeros(large.shape, bool)
    border[1:] |= large[1:] != large[:-1]
    border[:, 1:] |= large[:, 1:] != large[:, :-1]
    border[:-1] |= border[1:]
    painted[border] = 1
    return painted


def film(pictures: list[Image.Image], frames: int = 64) -> tuple[list[Image.Image], list[int]]:
    """Return a film of shots that move over photographs and the frame that each shot begins at."""
    first, second = pictures
    shots = [(first, 22, (0.0, 0.1), (0.45, 0.1)), (second, 14, (0.1, 0.3), (0.35, 0.1)),
             (first, 10, (0.5, 0.45), (0.3, 0.45)), (second, 18, (0.45, 0.0), (0.2, 0.4))]  # fmt: skip
    assert sum(length for _, length, *_ in shots) == frames
    made, starts = [], []
    for picture, length, start, end in shots:
        starts.append(len(made))
        side = picture.height // 2
        for i in range(length):
            left, top = (a + (b - a) * i / (length - 1) for a, b in zip(start, end))
            corner = round(left * picture.width), round(top * picture.height)
            made.append(picture.crop((*corner, corner[0] + side, corner[1] + side)))
    return made, starts


def draw_events(pictures: list[Image.Image], tower: str, out: Path) -> None:
    """Draw a film of one frame a second on a time line: every fourth frame, and the event that each second is in."""
    from sparsevlm.connectors.dpc_knn import DpcKnnBlock
    from sparsevlm.vision.tokens import Grid, MediaKind

    spec = DpcKnnSpec()
    frames, cuts = film(pictures)
    seen, encoded, (h, w) = features(frames, tower, side=448, layer=-1)
    number = spec.num_events(Grid(len(frames), h, w), MediaKind.VIDEO)
    assert number is not None
    events = DpcKnnBlock(spec).events(encoded, number)
    of_frame = {frame: event for event, members in enumerate(events) for frame in members}
    figure = new_figure(2.1)
    strip, line = figure.subplots(2, 1, height_ratios=[1.15, 1], sharex=True)
    step = 4
    for frame in range(0, len(frames), step):
        strip.imshow(seen[frame], extent=(frame + 0.1, frame + step - 0.1, 0, 1), aspect="auto")
    strip.set(xlim=(0, len(frames)), ylim=(0, 1), yticks=[], title=f"{len(frames)} frames, every fourth drawn")
    for frame, event in of_frame.items():
        line.axvspan(frame, frame + 1, color=EXPERTS[event], linewidth=0)
    for run, event in _runs(of_frame):
        name = f"event {event + 1}" if len(run) > 4 else str(event + 1)
        place = {"ha": "center", "va": "center"}
        ink = "#222222" if sum(int(EXPERTS[event][i : i + 2], 16) for i in (1, 3, 5)) > 380 else "white"
        line.text(run.start + len(run) / 2, 0.5, name, **place, color=ink, fontweight="bold", fontsize=9)
    for cut in cuts[1:]:
        line.axvline(cut, color="black", linewidth=1.6, linestyle=":")
    line.set(yticks=[], ylim=(0, 1), xlabel="second (dotted: where the film cuts)")
    line.set_title(f"{number} events of {sum(spec.level_sizes(h * w))} tokens each")
    for axis in (strip, line):
        axis.grid(False)
        axis.spines[:].set_visible(False)
    figure.savefig(out, pil_kwargs={"quality": 92})


def _runs(of_frame: dict[int, int]) -> list[tuple[range, int]]:
    """Return stretches of frames of one event."""
    runs: list[tuple[range, int]] = []
    for frame in sorted(of_frame):
        if runs and runs[-1][1] == of_frame[frame]:
            runs[-1] = (range(runs[-1][0].start, frame + 1), of_frame[frame])
        else:
            runs.append((range(frame, frame + 1), of_frame[frame]))
    return runs


def sample_pictures() -> list[Image.Image]:
    """Return the photographs that scikit-learn carries (china.jpg and flower.jpg, CC BY 2.0)."""
    from sklearn.datasets import load_sample_image

    return [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Read sizes as ``640x480 1024x768``."""
    pairs = [size.split("x") for size in text.replace(",", " ").split()]
    return [(int(width), int(height)) for width, height in pairs]


def main(arguments: list[str] | None = None) -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("slices", "clusters", "events"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=Path(f"docs/images/{name}.jpg"), help="%(default)s")
        if name != "slices":
            command.add_argument("--tower", default="data/smol/vision", help="%(default)s")
    commands.add_parser("systems").add_argument("--recipes", type=Path, default=Path("recipes"), help="%(default)s")
    sizes = commands.add_parser("table")
    sizes.add_argument("--sizes", type=parse_sizes, default=parse_sizes(SIZES), help="as '640x480 1024x768'")
    options = parser.parse_args(arguments)
    if options.command == "table":
        print(table(options.sizes))
        return 0
    if options.command == "systems":
        print(systems(options.recipes))
        return 0
    pictures = sample_pictures()
    if options.command == "slices":
        styled(draw_slices)(pictures[0], options.out)
    else:
        draw = draw_clusters if options.command == "clusters" else draw_events
        styled(draw)(pictures, options.tower, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
