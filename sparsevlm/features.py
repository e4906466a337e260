"""A film's features, computed once: frame by frame from its file, through the tower, to a file that rows then name.

Memory holds a block of frames, whatever the film's length: a block is decoded, brought to the tower's size, encoded and
written before the next is read.

Legend: T frames, n tokens of a frame, D tower width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsevlm.data.digest import media_digest
from sparsevlm.data.kept import SUFFIX, probe_film, write_film
from sparsevlm.data.media import VideoFrames
from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.data.video import VideoPolicy
from sparsevlm.model.visual import VisualMixin
from sparsevlm.rundir import choose_device, resolve_model
from sparsevlm.vision.feature_store import picture_rules
from sparsevlm.vision.preprocess import ImageSpec, item_kind, preprocess_medium, tower_items
from sparsevlm.vision.tokens import MediaKind

BLOCK = 32
"""Frames that are held at once."""
_ALL = 1 << 40


class TowerAlone(VisualMixin, nn.Module):
    """A model's tower without what follows it, and how pictures are brought to it.

    Args:
        config: The model's configuration.
        tower: Its tower.
        spec: How pictures become frames.
    """

    def __init__(self, config: Any, tower: nn.Module, spec: ImageSpec) -> None:
        super().__init__()
        self.config, self.vision_tower, self.spec = config, tower, spec
        self.connector = nn.ModuleList()


@dataclass(frozen=True)
class KeptFilm:
    """What was written, or was there already: its place, ``(T, n, D)``, and bytes."""

    path: Path
    shape: tuple[int, ...]
    num_bytes: int
    was_there: bool = False


def open_tower(target: str, device: str | None = None, dtype: str = "auto") -> TowerAlone:
    """Load the tower of a model, or that which a recipe starts from.

    Args:
        target: Recipe (YAML), run, stage or model directory, or Hub id.
        device: Where it runs; default: a GPU where there is one.
        dtype: Type of its weights; ``"auto"`` as saved, of a recipe as it trains.

    Raises:
        ValueError: No such model; or its tower carries an adapter, which may tell frames apart by their place.
    """
    from sparsevlm.adapters.names import is_adapter_parameter

    where = choose_device(device)
    if Path(target).suffix in (".yaml", ".yml", ".json") and Path(target).is_file():
        alone = _of_recipe(target, dtype)
    else:
        from sparsevlm.model.build import load_model

        model, processor = load_model(resolve_model(target), dtype=dtype)
        alone = TowerAlone(model.config, model.model.vision_tower, processor.image_spec)
    if any(is_adapter_parameter(name) for name, _ in alone.vision_tower.named_parameters()):
        raise ValueError(f"the tower of {target} carries an adapter; merge it first: sparsevlm merge")
    return alone.to(where).eval()


def _of_recipe(path: str, dtype: str) -> TowerAlone:
    from sparsevlm.model.build import build_config
    from sparsevlm.model.parts import image_spec, load_tower
    from sparsevlm.recipe.load import load_recipe

    recipe = load_recipe(path)
    size = recipe.image_size_in(next(iter(recipe.stages)))
    model = recipe.model.model_copy(update={"vision": recipe.model.vision.model_copy(update={"image_size": size})})
    kept = model.dtype if dtype == "auto" else dtype
    config = build_config(model)
    chosen = torch.float32 if kept == "float16" and dtype == "auto" else getattr(torch, kept)
    trust = {"trust_remote_code": model.trust_remote_code, "dtype": chosen}
    return TowerAlone(config, load_tower(model, config, trust), image_spec(model, config))


def keep_films(
    tower: TowerAlone, films: Sequence[Path], folder: Path, fps: float = 1.0, block: int = BLOCK
) -> Iterator[tuple[Path, KeptFilm]]:
    """Write the features of films, each to a file of its name; one that is there is left as it is.

    Args:
        tower: From `open_tower`.
        films: The films.
        folder: Where the files go.
        fps: Frames a second that are kept; a film with fewer keeps all of its own.
        block: Frames that are held at once.

    Yields:
        Each film and its file.

    Raises:
        ValueError: Two films have one name, a film cannot be read, or a file is there that was made otherwise.
    """
    files = {film: folder / f"{film.stem}{SUFFIX}" for film in films}
    if len(set(files.values())) < len(files):
        raise ValueError("two films have the same name without its ending, and their features would be one file")
    for film, file in files.items():
        yield film, keep_film(tower, film, file, fps, block)


def keep_film(tower: TowerAlone, film: Path, out: Path, fps: float = 1.0, block: int = BLOCK) -> KeptFilm:
    """Write the features of a film to a file; see `keep_films`."""
    media = Media(MediaKind.VIDEO, film)
    try:
        frames = VideoFrames(media, VideoPolicy(fps=fps, max_frames=_ALL))
        info = frames.info
        assert info is not None
        width, height = _size(frames)
        facts = {
            "fps": str(min(Fraction(fps).limit_denominator(1_000_000), info.fps)),
            "tower": tower.tower_identity(),
            "pictures": picture_rules(tower.spec, video=True),
            "size": f"{width}x{height}",
            "film": media_digest(media),
        }
        if out.exists():
            return _there(out, facts, len(frames))
        shape = write_film(out, _features(tower, frames, (width, height), block), len(frames), facts)
    except BadSampleError as error:
        raise ValueError(f"{film}: {error}") from error
    return KeptFilm(out, shape, out.stat().st_size)


def _there(out: Path, facts: dict[str, str], frames: int) -> KeptFilm:
    """Return a file that is there, if it is what would be written.

    Raises:
        ValueError: It is not.
    """
    info = probe_film(out)
    found = {"fps": str(info.fps), "tower": info.tower, "pictures": info.pictures, "film": info.film}
    if info.total != frames or any(facts[name] != value for name, value in found.items()):
        raise ValueError(
            f"{out} is there and was made of another film, tower, size or rate; delete it, or write elsewhere"
        )
    return KeptFilm(out, info.entry.shape, out.stat().st_size, was_there=True)


def _size(frames: VideoFrames) -> tuple[int, int]:
    first = frames[0]
    return first.shape[1], first.shape[0]


@torch.no_grad()
def _features(tower: TowerAlone, frames: VideoFrames, size: tuple[int, int], block: int) -> Iterator[Tensor]:
    """Yield ``(t, n, D)`` for each block of frames."""
    parameter = next(tower.vision_tower.parameters(), torch.zeros(0))
    kind = item_kind(tower.spec, MediaKind.VIDEO, len(frames))  # a long video's blocks are of a long video
    for some in frames.blocks(block):
        pixels = preprocess_medium(some, kind, tower.spec).to(parameter.device)
        items = tower_items(tower.spec, kind, len(some), size)
        features = tower.tower_features(pixels, items, [0] * len(items))
        yield features.unflatten(0, (len(some), -1))
