"""How fast pictures are seen: each part against a plain reference that is written here, side by side in one run.

    python tools/bench_vision.py                       # all parts, a few minutes on two cores
    python tools/bench_vision.py --parts native --repeats 9 --json vision.json
    python tools/bench_vision.py --quick               # tiny shapes: that both sides give the same, not how fast

A part is one function that returns its numbers; both sides run in turn, and a ratio is that of their medians.

`native`: a SigLIP tower over pictures of mixed sizes (`SIZES`). Packed, as `sparsevlm.vision.native` does, against what
batches of mixed sizes do elsewhere: every picture padded to the longest of its batch, attention masked. Same weights,
same features (checked).

`clusters`: the connector block `dpc_knn` over 64 frames of 16 x 16 tokens, 1024 wide, against one picture after the
other in float32 as Chat-UniVi's code does it, three levels each. Merged tokens are checked against the same loop in
float64: in float32 its distances of a token to itself are not 0, which moves a few centres.

`preprocess`: pictures a second on one core, each way of resizing and cutting, against transformers' image processors
where there is one, else plain Pillow and NumPy. Same pixels (checked).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIZES = [(640, 480), (500, 375), (336, 336), (1024, 768), (427, 640), (224, 224), (800, 200), (512, 512)]
"""``(width, height)``: photographs of COCO and Flickr, squares as data sets store them, one of TextVQA, a line of text,
an icon."""

GREY = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def side_by_side(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each way; they take turns, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---- packed against padded ------------------------------------------------------------------------------------------


def native(repeats: int, quick: bool = False) -> dict[str, Any]:
    """Packed patches against padded batches."""
    import torch
    from transformers import AutoModel, SiglipVisionConfig

    from sparsevlm.recipe.native import AreaRule
    from sparsevlm.vision.native import encode_native, make_native
    from sparsevlm.vision.sides import sides
    from sparsevlm.vision.tokens import Grid

    width, layers, patch, shrink = (64, 2, 16, 4) if quick else (384, 6, 16, 1)
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=24 * patch,
        patch_size=patch,
        vision_use_head=False,
    )
    plain = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    packed = AutoModel.from_config(config).eval()
    packed.load_state_dict(plain.state_dict())
    make_native(packed)
    rule = AreaRule(type="area", multiple=2 * patch, max_pixels=1536**2, min_side=2 * patch)
    shapes = [sides(rule, (w // shrink, h // shrink)).canvas for w, h in SIZES]
    grids = [Grid(1, h // patch, w // patch) for w, h in shapes]
    patches = torch.randn(sum(grid.num_tokens for grid in grids), 3 * patch**2)

    def pack() -> Any:
        return encode_native(packed, patches, grids)

    def pad() -> Any:
        return padded(plain, patches, grids)

    with torch.no_grad():
        difference = float((pack() - pad()).abs().max())
        if difference > 1e-3:
            raise ValueError(f"native: the two ways differ by {difference}")
        seconds = side_by_side({"packed": pack, "padded": pad}, repeats)
    longest = max(grid.num_tokens for grid in grids)
    return {
        "pictures": len(grids),
        "patches": len(patches),
        "padding": 1 - len(patches) / (longest * len(grids)),
        "seconds": seconds,
        "ratio": seconds["padded"] / seconds["packed"],
        "difference": difference,
    }


def padded(tower: Any, patches: Any, grids: Sequence[Any]) -> Any:
    """The plain way: each picture embedded by the tower, padded to the longest, masked; ``(P, D)`` without padding."""
    import torch

    from sparsevlm.vision.patches import unpatchify

    pieces = patches.split([grid.num_tokens for grid in grids])
    pictures = [unpatchify(piece, grid.h, grid.w)[None] for piece, grid in zip(pieces, grids, strict=True)]
    embedded = [tower.embeddings(picture, interpolate_pos_encoding=True)[0] for picture in pictures]
    rows = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)  # (B, longest, D)
    real = torch.arange(rows.shape[1])[None] < torch.tensor([len(row) for row in embedded])[:, None]
    hidden = tower.encoder(inputs_embeds=rows, attention_mask=real[:, None, None]).last_hidden_state
    return hidden[real]


# ---- clustering -----------------------------------------------------------------------------------------------------

LEVELS = ((64, 5), (32, 3), (16, 3))
"""Clusters and neighbours of each level."""


def clusters(repeats: int, quick: bool = False) -> dict[str, Any]:
    """The block over all frames against a loop over pictures."""
    import torch

    from sparsevlm.connectors.base import parse_block
    from sparsevlm.vision.tokens import Grid, MediaKind, VisualTokens

    frames, side, width = (3, 16, 32) if quick else (64, 16, 1024)
    torch.manual_seed(0)
    kinds = torch.randn(frames, 24, width)  # tokens that are alike in groups, as those of a picture are
    group = torch.randint(24, (frames, side**2, 1)).expand(-1, -1, width)
    features = kinds.gather(1, group) + 0.5 * torch.randn(frames, side**2, width)
    block = parse_block({"type": "dpc_knn"}).build(width, width)
    grids = (Grid(1, side, side),) * frames
    tokens = VisualTokens(features.flatten(0, 1), grids, (MediaKind.IMAGE,) * frames, (0,) * frames)

    def ours() -> Any:
        return block(tokens).features.unflatten(0, (frames, -1))

    def loop(pictures: Any = features) -> Any:
        return torch.cat([merged(picture[None]) for picture in pictures])

    with torch.no_grad():
        difference = float((ours()[:3] - loop(features[:3].double())).abs().max())
        if difference > 1e-3:
            raise ValueError(f"clusters: the two ways differ by {difference}")
        seconds = side_by_side({"block": ours, "loop": loop}, repeats)
    return {"frames": frames, "seconds": seconds, "ratio": seconds["loop"] / seconds["block"], "difference": difference}


def merged(x: Any) -> Any:
    """Return the tokens of all levels of ``(B, N, C)`` tokens, as the paper's code does (without its noise)."""
    import torch

    rows = []
    for number, k in LEVELS:
        ids = clustered(x, number, k)
        flat = (ids + number * torch.arange(len(x))[:, None]).flatten()
        sizes = x.new_zeros(len(x) * number, 1).index_add_(0, flat, x.new_ones(len(flat), 1)) + 1e-6
        share = x.new_ones(len(flat), 1) / sizes[flat]
        means = x.new_zeros(len(x) * number, x.shape[-1]).index_add_(0, flat, x.flatten(0, 1) * share)
        x = means.unflatten(0, (len(x), number))
        rows.append(x)
    return torch.cat(rows, dim=1)


def clustered(x: Any, number: int, k: int) -> Any:
    """Return the cluster of each token, ``(B, N)``, by density peaks."""
    import torch

    distance = torch.cdist(x, x) / x.shape[-1] ** 0.5  # (B, N, N)
    density = (-(distance.topk(k, dim=-1, largest=False).values ** 2).mean(dim=-1)).exp()
    denser = (density[:, None, :] > density[:, :, None]).to(x.dtype)
    largest = distance.flatten(1).max(dim=-1).values[:, None, None]
    separation = (distance * denser + largest * (1 - denser)).min(dim=-1).values
    centres = (separation * density).topk(number, dim=-1).indices  # (B, K)
    batch = torch.arange(len(x))[:, None]
    ids = distance[batch, centres].argmin(dim=1)
    ids[batch, centres] = torch.arange(number)
    return ids


# ---- pictures a second ----------------------------------------------------------------------------------------------


def preprocess(repeats: int, quick: bool = False) -> dict[str, Any]:
    """Each way of bringing pictures to a tower, on one core."""
    import torch

    from sparsevlm.vision.preprocess import preprocess_medium
    from sparsevlm.vision.tokens import MediaKind

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pictures = photographs(4)[:3] if quick else photographs(1)
        results: dict[str, Any] = {}
        for name, (spec, reference) in ways_of_preprocessing().items():

            def ours(spec: Any = spec) -> Any:
                return [preprocess_medium([picture], MediaKind.IMAGE, spec) for picture in pictures]

            def theirs(reference: Any = reference) -> Any:
                return [reference(picture) for picture in pictures]

            pairs = zip(ours(), theirs(), strict=True)
            difference = max(float((a - torch.as_tensor(b)).abs().max()) for a, b in pairs)
            if difference > 0.02:  # a level of 255, normalised, is 0.008 to 0.016
                raise ValueError(f"preprocess, {name}: the two ways differ by {difference}")
            seconds = side_by_side({"ours": ours, "reference": theirs}, repeats)
            results[name] = {
                "pictures_per_second": {side: len(pictures) / taken for side, taken in seconds.items()},
                "ratio": seconds["reference"] / seconds["ours"],
                "difference": difference,
            }
    finally:
        torch.set_num_threads(threads)
    return {"ways": results, "ratio": statistics.median(row["ratio"] for row in results.values())}


def photographs(shrink: int) -> list[Any]:
    """Pictures of `SIZES` as smooth as photographs are."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    made = []
    for width, height in SIZES:
        small = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        made.append(small.resize((width // shrink, height // shrink), Image.Resampling.BICUBIC))
    return made


def ways_of_preprocessing() -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """Return for each way our `ImageSpec` and a reference: a picture -> the same pixels."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from sparsevlm.recipe.native import AreaRule, FitRule, Native, SmartRule
    from sparsevlm.recipe.tiling import AnyresTiling
    from sparsevlm.vision.preprocess import ImageSpec

    side, grid = 336, (24, 24)
    colours = {"image_mean": GREY[0], "image_std": GREY[1]}
    square = {"height": side, "width": side}
    stretch = SiglipImageProcessorPil(size=square, resample=3, **colours)
    crop = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **colours)
    anyres = AnyresTiling(type="anyres")
    grids = [[side * rows, side * columns] for columns, rows in anyres.grids]
    cut = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=grids, do_convert_rgb=True, **colours
    )
    smart = Qwen2VLImageProcessorPil(**colours)
    native: dict[str, Any] = {
        "area": AreaRule(type="area", multiple=32, max_pixels=1536**2, min_side=32),
        "smart": SmartRule(type="smart"),
        "fit": FitRule(type="fit"),
    }

    def spec(patch: int, rule: str) -> ImageSpec:
        return ImageSpec(16 * patch, "native", *GREY, (16, 16), native=Native(image=native[rule]))

    def squares(processor: Any) -> Callable[[Any], Any]:
        return lambda picture: processor(picture, return_tensors="np")["pixel_values"].reshape(-1, 3, side, side)

    def qwen(picture: Any) -> Any:
        given = smart(picture, return_tensors="np")
        _, h, w = given["image_grid_thw"][0]
        patches = given["pixel_values"].reshape(h // 2, w // 2, 2, 2, 3, 2, -1)[
            ..., 0, :
        ]  # squares of 2 x 2, shown twice
        return patches.transpose(0, 2, 1, 3, 4, 5).reshape(h * w, -1)

    return {
        "stretch": (ImageSpec(side, "stretch", *GREY, grid), squares(stretch)),
        "crop": (ImageSpec(side, "crop", *GREY, grid), squares(crop)),
        "pad": (ImageSpec(side, "pad", *GREY, grid), lambda picture: plain_pad(picture, side)),
        "anyres": (ImageSpec(side, "stretch", *GREY, grid, tiling=anyres), squares(cut)),
        "native: area": (spec(16, "area"), lambda picture: plain_native(picture, native["area"], 16)),
        "native: smart": (spec(14, "smart"), qwen),
        "native: fit": (spec(30, "fit"), lambda picture: plain_native(picture, native["fit"], 30)),
    }


def plain_pad(picture: Any, side: int) -> Any:
    """The long side brought to `side`, the picture in the middle of the mean colour."""
    import numpy as np
    from PIL import Image

    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    canvas = np.full((side, side, 3), GREY[0], dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return ((canvas - GREY[0]) / GREY[1]).transpose(2, 0, 1)[None].astype(np.float32)


def plain_native(picture: Any, rule: Any, patch: int) -> Any:
    """Resized by the rule, filled, and cut into patches."""
    import numpy as np
    from PIL import Image

    from sparsevlm.vision.sides import sides

    (width, height), (full_width, full_height) = sides(rule, picture.size)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    canvas = np.full((full_height, full_width, 3), getattr(rule, "fill", 0), dtype=np.float32)
    canvas[:height, :width] = pixels
    canvas = (canvas / 255 - np.float32(0.5)) / np.float32(0.5)
    rows, columns = full_height // patch, full_width // patch
    cut = canvas.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return cut.reshape(rows * columns, -1)


PARTS: dict[str, Callable[[int, bool], dict[str, Any]]] = {
    "native": native,
    "clusters": clusters,
    "preprocess": preprocess,
}


def show(name: str, result: dict[str, Any]) -> None:
    """Print what a part measured."""
    for way, row in result.get("ways", {}).items():
        speed = row["pictures_per_second"]
        print(
            f"{name}, {way}: {speed['ours']:.0f} pictures a second, {row['ratio']:.2f} times the reference's "
            f"{speed['reference']:.0f}"
        )
    if "seconds" in result:
        taken = ", ".join(f"{way} {seconds:.3f} s" for way, seconds in result["seconds"].items())
        print(f"{name}: {result['ratio']:.2f} times as fast ({taken})")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts and print their numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, which say nothing about speed")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(argv)
    results = {}
    for name in options.parts:
        results[name] = PARTS[name](options.repeats, options.quick)
        show(name, results[name])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
