"""Pictures and videos that a plan counts tokens for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsevlm.connectors.base import connector_items, parse_connector
from sparsevlm.data.video import VideoPolicy
from sparsevlm.fusion import media_apart
from sparsevlm.model.video_text import affordable_frames
from sparsevlm.recipe.schema import Recipe
from sparsevlm.vision.preprocess import ImageSpec, tower_items
from sparsevlm.vision.tokens import ItemShape, MediaKind

_MEDIUM = re.compile(r"(?:(?P<number>[1-9]\d*)(?P<of>[fv])@)?(?P<width>[1-9]\d*)x(?P<height>[1-9]\d*)")
_KINDS = {None: MediaKind.IMAGE, "f": MediaKind.VIDEO, "v": MediaKind.MULTI_VIEW}


@dataclass(frozen=True)
class Medium:
    """A picture, video or list of views to count tokens for.

    Attributes:
        name: As it was written: ``640x480``, ``64f@1280x720``, ``8v@640x480``.
        kind: Image, video or views.
        frames: Frames that are drawn from it, views of a scene.
        size: ``(width, height)`` in pixels.
    """

    name: str
    kind: MediaKind
    frames: int
    size: tuple[int, int]


def parse_medium(text: str) -> Medium:
    """Read a medium.

    Raises:
        ValueError: Neither ``WIDTHxHEIGHT`` nor ``FRAMESf@WIDTHxHEIGHT`` nor ``VIEWSv@WIDTHxHEIGHT``.
    """
    text = text.strip()
    match = _MEDIUM.fullmatch(text)
    if match is None:
        raise ValueError(
            f"medium {text!r}: expected WIDTHxHEIGHT (640x480), FRAMESf@WIDTHxHEIGHT (64f@1280x720) or "
            "VIEWSv@WIDTHxHEIGHT (8v@640x480)"
        )
    size = int(match["width"]), int(match["height"])
    return Medium(text, _KINDS[match["of"]], int(match["number"] or 1), size)


def frames_of(recipe: Recipe, spec: ImageSpec, medium: Medium) -> int:
    """Return the frames of a medium that reach the tower.

    Raises:
        ValueError: The fewest frames of a video are above its budget of visual tokens.
    """
    return min(medium.frames, most_frames(recipe, spec)) if medium.kind is MediaKind.VIDEO else medium.frames


def most_frames(recipe: Recipe, spec: ImageSpec) -> int:
    """Return the most frames of a video that reach the tower, as the processor finds them; see `frames_of`."""
    video = recipe.model.video
    if video.max_tokens is None:
        return video.max_frames
    policy = VideoPolicy.of(video.model_dump())
    return affordable_frames(spec, parse_connector(recipe.model.connector), policy, video.max_tokens)


def items_of(recipe: Recipe, spec: ImageSpec, medium: Medium) -> list[ItemShape]:
    """Return the items of a medium as they leave the tower."""
    return tower_items(spec, medium.kind, frames_of(recipe, spec, medium), medium.size)


def visual_tokens(recipe: Recipe, spec: ImageSpec, medium: Medium) -> int:
    """Return the visual tokens of a medium, in the prompt or beside it."""
    after = connector_items(parse_connector(recipe.model.connector), items_of(recipe, spec, medium))
    return sum(item.grid.num_tokens for item in after)


def keeps_apart(recipe: Recipe) -> bool:
    """Tell whether visual tokens stay beside the prompt."""
    return recipe.model.fusion is not None and media_apart(recipe.model.fusion.model_dump())


def count_visual(recipe: Recipe, spec: ImageSpec, medium: Medium) -> int:
    """Return the tokens that a medium takes in the prompt, as the processor counts them."""
    return 1 if keeps_apart(recipe) else visual_tokens(recipe, spec, medium)
