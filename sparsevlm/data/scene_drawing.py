"""The world of scenes and its pictures: a few flat shapes on a dark ground, still, changing or on the move.

Whether a thing belongs to training or to evaluation is decided by a hash of its exact look (shape, colour value,
radius), so no picture or frame that holds a held-out thing can occur in training, under any seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SIZE = 64
"""Side of a picture in pixels."""
NUM_FRAMES = 4
"""Frames of a clip, one a second."""

SPLITS = ("train", "validation", "test")
"""Eight in ten looks belong to `train`, one each to the others. Settings are chosen on `validation`."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 40, 40),
    "green": (40, 170, 50),
    "blue": (50, 70, 220),
    "yellow": (225, 215, 50),
    "purple": (150, 50, 190),
    "orange": (235, 135, 30),
    "cyan": (50, 205, 215),
    "white": (232, 232, 232),
}
SIZES: dict[str, tuple[float, float]] = {"small": (5.0, 6.25), "medium": (8.75, 10.0), "large": (13.5, 15.0)}
"""Least and greatest radius in pixels."""
ZONES: dict[str, tuple[int, int]] = {
    "left": (12, 32),
    "right": (52, 32),
    "top": (32, 12),
    "bottom": (32, 52),
    "centre": (32, 32),
}
"""Middle of each named place, (x, y) in pixels, y downwards."""
DIRECTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "left": (("right", "left"), ("right", "centre"), ("centre", "left")),
    "right": (("left", "right"), ("left", "centre"), ("centre", "right")),
    "up": (("bottom", "top"), ("bottom", "centre"), ("centre", "top")),
    "down": (("top", "bottom"), ("top", "centre"), ("centre", "bottom")),
}
"""Pairs of places (start, end) that make a motion in each direction."""

Setting = Literal["still", "group", "moving", "changing", "several"]


@dataclass(frozen=True)
class Look:
    """How a thing looks, exactly.

    Attributes:
        shape: Name of its shape.
        colour: Name of its colour.
        size: Name of its size.
        rgb: Its exact colour.
        radius: Its exact radius in pixels; all shapes fit into a circle of about this radius.
    """

    shape: str
    colour: str
    size: str
    rgb: tuple[int, int, int]
    radius: float

    @property
    def split(self) -> str:
        """The split that the look belongs to."""
        digest = hashlib.blake2b(f"{self.shape}/{self.rgb}/{self.radius}".encode(), digest_size=8).digest()
        return {0: "validation", 1: "test"}.get(int.from_bytes(digest, "big") % 10, "train")


@dataclass(frozen=True)
class Thing:
    """A look at a place: ``x`` and ``y`` in pixels and the name of the zone (empty in a group)."""

    look: Look
    x: float
    y: float
    zone: str = ""


@dataclass(frozen=True)
class Scene:
    """What there is to see.

    Attributes:
        setting: ``still`` one thing; ``group`` one to five alike; ``moving`` and ``changing`` clips of one thing that
            goes from zone to zone or turns from colour to colour; ``several`` two to four different things.
        frames: Things of each frame; a picture has one frame.
        ground: Colour of the background.
    """

    setting: Setting
    frames: tuple[tuple[Thing, ...], ...]
    ground: tuple[int, int, int]

    @property
    def is_clip(self) -> bool:
        """Whether the scene is shown as a video."""
        return len(self.frames) > 1

    @property
    def first(self) -> Thing:
        """First thing of the first frame."""
        return self.frames[0][0]

    @property
    def last(self) -> Thing:
        """First thing of the last frame."""
        return self.frames[-1][0]

    @property
    def split(self) -> str:
        """The split of its things; all of them agree."""
        splits = {thing.look.split for frame in self.frames for thing in frame}
        assert len(splits) == 1, f"a scene mixes the splits {sorted(splits)}"
        return splits.pop()


# Distances in pixels to the edge of each shape (negative inside) for offsets dx, dy (y downwards) and radius r.
def _circle(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.sqrt(dx * dx + dy * dy) - r


def _square(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(dx), np.abs(dy)) - 0.87 * r


def _triangle(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(dy - 0.7 * r, 0.894 * np.abs(dx) - 0.447 * (dy + 1.1 * r))


def _cross(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    near, far = np.minimum(np.abs(dx), np.abs(dy)), np.maximum(np.abs(dx), np.abs(dy))
    return np.maximum(near - 0.34 * r, far - 1.05 * r)


def _ring(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.abs(np.sqrt(dx * dx + dy * dy) - 0.75 * r) - 0.27 * r


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}

_PIXELS = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5


def draw_frame(things: tuple[Thing, ...], ground: tuple[int, int, int]) -> np.ndarray:
    """Draw one frame, edges smoothed over a pixel.

    Returns:
        ``(64, 64, 3)`` uint8.
    """
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    canvas[:] = ground
    for thing in things:
        reach = 1.15 * thing.look.radius + 1.5  # only the box around the thing is computed
        columns = slice(max(0, int(thing.x - reach)), int(thing.x + reach) + 1)
        rows = slice(max(0, int(thing.y - reach)), int(thing.y + reach) + 1)
        dx, dy = _PIXELS[None, columns] - thing.x, _PIXELS[rows, None] - thing.y
        distance = SHAPES[thing.look.shape](dx, dy, thing.look.radius)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]  # (rows, columns, 1)
        box = canvas[rows, columns]
        box[:] = box + cover * (np.asarray(thing.look.rgb, dtype=np.float32) - box)
    return canvas


def draw_scene(scene: Scene) -> Image | list[np.ndarray]:
    """Draw a picture as a PIL image, a clip as a list of ``(64, 64, 3)`` uint8 frames."""
    frames = [draw_frame(things, scene.ground) for things in scene.frames]
    if scene.is_clip:
        return frames
    from PIL import Image

    return Image.fromarray(frames[0])


class SceneMaker:
    """Draws the facts of scenes at random.

    Args:
        rng: Source of all randomness.
        split: Only looks of this split are used.
    """

    def __init__(self, rng: Random, split: str) -> None:
        self.rng = rng
        self.split = split

    def _pick(self, known: Iterable[str], given: str | None) -> str:
        return given or self.rng.choice(list(known))

    def look(
        self,
        shape: str | None = None,
        colour: str | None = None,
        size: str | None = None,
        radius: float | None = None,
    ) -> Look:
        """Return a look of this split; what is not given is uniformly random."""
        shape = self._pick(SHAPES, shape)
        colour = self._pick(COLOURS, colour)
        size = self._pick(SIZES, size)
        low, high = SIZES[size]
        while True:
            red, green, blue = (min(255, max(0, channel + self.rng.randint(-16, 16))) for channel in COLOURS[colour])
            look = Look(
                shape, colour, size, (red, green, blue), low + 0.25 * self.rng.randint(0, int(4 * (high - low)))
            )
            if look.split == self.split:
                return look

    def place(self, look: Look, zone: str | None = None, jitter: int = 4) -> Thing:
        """Put a look into a zone, wholly inside the picture."""
        zone = self._pick(ZONES, zone)
        x, y = (centre + self.rng.randint(-jitter, jitter) for centre in ZONES[zone])
        edge = math.ceil(1.1 * look.radius) + 1
        return Thing(look, min(max(x, edge), IMAGE_SIZE - edge), min(max(y, edge), IMAGE_SIZE - edge), zone)

    def _scene(self, setting: Setting, *frames: tuple[Thing, ...]) -> Scene:
        shade = self.rng.randint(0, 50)
        red, green, blue = (shade + self.rng.randint(0, 16) for _ in range(3))
        return Scene(setting, frames, (red, green, blue))

    def still(
        self, shape: str | None = None, colour: str | None = None, size: str | None = None, zone: str | None = None
    ) -> Scene:
        """One thing in a picture."""
        return self._scene("still", (self.place(self.look(shape, colour, size), zone),))

    def group(self, number: int) -> Scene:
        """``number`` small things alike, apart from each other."""
        look = self.look(size="small")
        cells = self.rng.sample(range(9), number)  # of a 3 x 3 grid, so that they never touch
        things = tuple(
            Thing(
                look,
                IMAGE_SIZE * (2 * (cell % 3) + 1) / 6 + self.rng.randint(-2, 2),
                IMAGE_SIZE * (2 * (cell // 3) + 1) / 6 + self.rng.randint(-2, 2),
            )
            for cell in cells
        )
        return self._scene("group", things)

    def moving(
        self, start: str, end: str, shape: str | None = None, colour: str | None = None, size: str | None = None
    ) -> Scene:
        """One thing that goes from zone to zone."""
        look = self.look(shape, colour, size)
        a, b = self.place(look, start, jitter=3), self.place(look, end, jitter=3)
        steps = [frame / (NUM_FRAMES - 1) for frame in range(NUM_FRAMES)]
        between = [Thing(look, a.x + t * (b.x - a.x), a.y + t * (b.y - a.y)) for t in steps[1:-1]]
        return self._scene("moving", (a,), *((thing,) for thing in between), (b,))

    def changing(self, before: str, after: str) -> Scene:
        """One thing that turns from colour to colour at some frame."""
        look = self.look(colour=before)
        a = self.place(look)
        b = Thing(self.look(look.shape, after, look.size, look.radius), a.x, a.y, a.zone)
        turn = self.rng.randint(1, NUM_FRAMES - 1)
        return self._scene("changing", *(((a,) if frame < turn else (b,)) for frame in range(NUM_FRAMES)))

    def several(self, number: int, shape: str | None = None, colour: str | None = None) -> Scene:
        """``number`` things of different shapes, colours and zones; the first has the attributes given."""
        first_shape, first_colour = self._pick(SHAPES, shape), self._pick(COLOURS, colour)
        shapes = self.rng.sample([name for name in SHAPES if name != first_shape], number - 1)
        colours = self.rng.sample([name for name in COLOURS if name != first_colour], number - 1)
        zones = self.rng.sample(list(ZONES), number)
        looks = map(self.look, [first_shape, *shapes], [first_colour, *colours], ["small"] * number)
        return self._scene("several", tuple(self.place(look, zone, jitter=3) for look, zone in zip(looks, zones)))
