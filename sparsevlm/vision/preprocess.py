"""From pictures and video frames to the pixels that a vision tower was trained on.

Deterministic, without random crops or flips: a picture gives the same pixels in training, evaluation and chat.

Legend: F frames, S side in pixels of the square that the tower sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor

from sparsevlm.recipe.native import Native, rules_of
from sparsevlm.recipe.tiling import Tiling
from sparsevlm.vision.encoder import Layer, Select, default_image_size, output_grid, timm_pretrained_cfg
from sparsevlm.vision.native import native_side, patch_side
from sparsevlm.vision.patches import native_patches
from sparsevlm.vision.sides import native_items
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind
from sparsevlm.vision.views import Size, View, picture_views

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Resize = Literal["stretch", "crop", "pad", "native"]
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes a frame, and what grid of tokens a frame becomes.

    Attributes:
        image_size: S.
        resize: `stretch` ignores the aspect ratio; `crop` brings the short side to S and cuts the centre; `pad` brings
            the long side to S and fills the rest, the picture in the middle, with the mean colour (0 once normalised);
            `native` keeps the picture's shape, in the sides that `native` says.
        mean: Channel means of pixels in [0, 1].
        std: Channel standard deviations.
        patch_grid: ``(h, w)`` tokens that the tower gives for a frame.
        interpolation: Filter of the resize; always antialiased.
        tiling: How pictures are cut into several frames; None: one frame a picture. Videos and views are never cut.
        native: Sides of pictures at native resolution; S and `patch_grid` only say how large a patch is then.
        long_frames: Videos of at least so many frames are long; None: none is.
    """

    image_size: int
    resize: Resize
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_grid: tuple[int, int]
    interpolation: str = "bicubic"
    tiling: Tiling | None = None
    native: Native | None = None
    long_frames: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.native, Mapping):
            object.__setattr__(self, "native", Native.model_validate(self.native))
        if isinstance(self.tiling, Mapping):  # from JSON
            object.__setattr__(self, "tiling", TypeAdapter(Tiling).validate_python(self.tiling))
        for name in ("mean", "std", "patch_grid"):  # lists after a trip through JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.resize not in ("stretch", "crop", "pad", "native"):
            raise ValueError(f"resize {self.resize!r} is none of stretch, crop, pad, native")
        if (self.resize == "native") != (self.native is not None):
            raise ValueError(f"resize {self.resize!r} with native {self.native!r}: the one needs the other")
        for name, rule in rules_of(self.native):
            if rule["multiple"] % self.patch:
                raise ValueError(
                    f"native.{name}: sides that are multiples of {rule['multiple']} pixels do not hold whole patches "
                    f"of {self.patch}"
                )
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation {self.interpolation!r} is none of {', '.join(_FILTERS)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"image mean {self.mean} and std {self.std} must be three numbers each (one a channel), std above 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        plain |= {"tiling": None if self.tiling is None else self.tiling.model_dump(mode="json")}
        return plain | {"native": None if self.native is None else self.native.model_dump(mode="json")}

    @property
    def needs_size(self) -> bool:
        """Whether the number of a picture's tokens depends on its size."""
        return self.tiling is not None or self.native is not None

    @property
    def patch(self) -> int:
        """Side of a patch in pixels, for towers at native resolution."""
        return self.image_size // self.patch_grid[1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageSpec:
        """Return the spec that `to_dict` wrote."""
        return cls(**values)


def image_spec_from_config(
    vision_config: PreTrainedConfig,
    preprocessor: Mapping[str, Any] | None,
    image_size: int | None = None,
    resize: Resize = "pad",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layer: Layer = -1,
    select: Select = "patch",
    tiling: Tiling | None = None,
    native: Native | None = None,
    long_frames: int | None = None,
) -> ImageSpec:
    """Gather what a tower expects of its pictures.

    Each value comes from the argument, else from the preprocessor file, else (timm) from the config's `pretrained_cfg`,
    else: the config's image size, mean and std 0.5, bicubic. The preprocessor's own resizing mode is not followed; size
    is the config's before the preprocessor's, since a tower is bound to the former.

    Args:
        vision_config: The tower's config (not a composite one).
        preprocessor: Content of ``preprocessor_config.json``, if there is one.
        image_size: Side in pixels.
        resize: See `ImageSpec`.
        mean: Channel means.
        std: Channel standard deviations.
        layer: Hidden layer(s) that features are taken from; decides the grid of a CNN.
        select: ``full`` keeps prefix tokens and with them gives up the grid, see `encoder.output_grid`.
        tiling: See `ImageSpec`.
        native: See `ImageSpec`.
        long_frames: See `ImageSpec`.

    Raises:
        ValueError: No image size is known, or the tower cannot take it.
    """
    stated = dict(preprocessor or {})
    timm_cfg = timm_pretrained_cfg(vision_config) if vision_config.model_type == "timm_wrapper" else {}
    plain = stated.get("do_normalize") is False
    if native is not None:
        image_size = native_side(vision_config)
    if image_size is None:
        try:
            image_size = default_image_size(vision_config)
        except ValueError:
            image_size = _side(stated)
            if image_size is None:
                raise
    filter_code = stated.get("resample")
    if filter_code is not None:
        interpolation = Image.Resampling(filter_code).name.lower()
    else:
        interpolation = timm_cfg.get("interpolation", "bicubic")
    if native is None:
        grid = output_grid(vision_config, image_size, layer, select)
    else:
        grid = image_size // patch_side(vision_config), image_size // patch_side(vision_config)
    return ImageSpec(
        image_size=image_size,
        resize=resize,
        mean=_channels(mean, 0.0 if plain else stated.get("image_mean"), timm_cfg.get("mean"), 0.5),
        std=_channels(std, 1.0 if plain else stated.get("image_std"), timm_cfg.get("std"), 0.5),
        patch_grid=grid,
        interpolation=interpolation if interpolation in _FILTERS else "bicubic",
        tiling=tiling,
        native=native,
        long_frames=long_frames,
    )


def preprocess_frames(frames: Sequence[Image.Image | np.ndarray], spec: ImageSpec) -> Tensor:
    """Return frames as the tower takes them.

    Args:
        frames: Pictures, or ``(H, W, 3)`` uint8 arrays in RGB; sizes may differ.
        spec: What to bring them to.

    Returns:
        ``(F, 3, S, S)`` float32, normalised: ``(pixel / 255 - mean) / std``.

    Raises:
        ValueError: An array is not ``(H, W, 3)`` uint8, or a picture has no pixels.
    """
    side = spec.image_size
    mean = torch.tensor(spec.mean).view(3, 1, 1)
    std = torch.tensor(spec.std).view(3, 1, 1)
    pixels = torch.zeros(len(frames), 3, side, side)  # 0 is the mean colour
    for canvas, frame in zip(pixels, frames):
        resized, top, left = _resize(_to_picture(frame), spec)
        height, width = resized.shape[:2]
        patch = torch.from_numpy(resized).permute(2, 0, 1)  # (3, height, width)
        canvas[:, top : top + height, left : left + width] = patch.to(torch.float32).div_(255).sub_(mean).div_(std)
    return pixels


def preprocess_medium(frames: Sequence[Image.Image | np.ndarray], kind: MediaKind, spec: ImageSpec) -> Tensor:
    """Return what the tower gets of a medium, as `tower_items` counts it.

    Args:
        frames: The picture, or the frames or views.
        kind: Of the medium.
        spec: What to bring them to.

    Returns:
        ``(F, 3, S, S)``, or at native resolution ``(P, 3 * patch * patch)``; float32, normalised.

    Raises:
        ValueError: As `preprocess_frames`.
    """
    if spec.native is not None:
        pictures, resample = map(_to_picture, frames), _FILTERS[spec.interpolation]
        kind = item_kind(spec, kind, len(frames))
        return native_patches(pictures, len(frames), kind, spec.native, spec.patch, spec.mean, spec.std, resample)
    return preprocess_picture(frames[0], spec) if kind is MediaKind.IMAGE else preprocess_frames(frames, spec)


def preprocess_picture(picture: Image.Image | np.ndarray, spec: ImageSpec) -> Tensor:
    """Return all frames of a picture, ``(F, 3, S, S)``, as `tower_items` counts them."""
    if spec.tiling is None:
        return preprocess_frames([picture], spec)
    picture = _to_picture(picture)
    frames, resized = [], {picture.size: picture}
    for view in picture_views(spec.tiling, spec.image_size, picture.size):
        if view.size not in resized:
            resized[view.size] = picture.resize(view.size, _FILTERS[spec.interpolation])
        frames.append(_normalise(_cut(resized[view.size], view), view, spec))
    return torch.stack(frames)


def item_kind(spec: ImageSpec, kind: MediaKind, num_frames: int) -> MediaKind:
    """Return the kind of a medium's items: a medium is a video, its item may be a long one."""
    long = spec.long_frames is not None and num_frames >= spec.long_frames
    return MediaKind.LONG_VIDEO if long and kind is MediaKind.VIDEO else kind


def tower_items(spec: ImageSpec, kind: MediaKind, num_frames: int = 1, size: Size | None = None) -> list[ItemShape]:
    """Return the items of one medium as they leave the tower; at native resolution also as they come to it.

    Args:
        spec: How pictures become frames.
        kind: Of the medium.
        num_frames: Frames of a video, views of a scene.
        size: ``(width, height)`` of a picture; needed where `needs_size`. At native resolution also of a frame.

    Raises:
        ValueError: The size is needed and not there.
    """
    kind = item_kind(spec, kind, num_frames)
    if spec.native is None and (spec.tiling is None or kind is not MediaKind.IMAGE):
        return [ItemShape(Grid(num_frames, *spec.patch_grid), kind)]
    if size is None:
        raise ValueError("the tokens of a picture depend on its size here: give it as (width, height)")
    if spec.native is not None:
        return native_items(spec.native, spec.patch, kind, num_frames, size)
    assert spec.tiling is not None
    views = picture_views(spec.tiling, spec.image_size, size)
    return [ItemShape(Grid(1, *spec.patch_grid), view.kind, 0, view.place) for view in views]


def _cut(picture: Image.Image, view: View) -> tuple[np.ndarray, int, int]:
    """Return the pixels that a view shows, and where on its frame they go (top, left)."""
    (left, top), (width, height) = view.corner, view.frame
    box = max(left, 0), max(top, 0), min(left + width, picture.width), min(top + height, picture.height)
    if box[0] >= box[2] or box[1] >= box[3]:  # a thin picture in the middle of a grid leaves outer squares empty
        return np.zeros((0, 0, 3), np.uint8), 0, 0
    return np.array(picture.crop(box)), max(-top, 0), max(-left, 0)


def _normalise(cut: tuple[np.ndarray, int, int], view: View, spec: ImageSpec) -> Tensor:
    """Put pixels on a frame of the mean colour or on black, ``(3, height, width)``."""
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    canvas = torch.zeros(3, view.frame[1], view.frame[0])  # 0 is the mean colour
    if view.black:
        canvas -= mean / std
    pixels, top, left = cut
    patch = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255).sub_(mean).div_(std)
    canvas[:, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
    return canvas


def _to_picture(frame: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(frame, np.ndarray):
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"a frame must be a (H, W, 3) uint8 array, got {frame.shape} {frame.dtype}")
        if 0 in frame.shape:
            raise ValueError(f"a frame has no pixels: its shape is {frame.shape}")
        return Image.fromarray(frame)
    if 0 in frame.size:
        raise ValueError(f"a picture has no pixels: its size is {frame.size}")
    return frame if frame.mode == "RGB" else frame.convert("RGB")


def _resize(picture: Image.Image, spec: ImageSpec) -> tuple[np.ndarray, int, int]:
    """Return ``(height, width, 3)`` uint8 pixels, at most S x S, and where on the S x S canvas they go (top, left)."""
    side = spec.image_size
    width, height = picture.size
    if spec.resize == "stretch":
        width, height = side, side
    elif spec.resize == "pad":
        longest = max(width, height)
        width, height = max(1, round(width * side / longest)), max(1, round(height * side / longest))
    else:
        shortest = min(width, height)
        if max(width, height) > 8 * shortest:  # a strip: what is far from the cut is not worth gigabytes of resizing
            picture = _centre(picture, min(width, 8 * shortest), min(height, 8 * shortest))
            width, height = picture.size
        width, height = side * width // shortest, side * height // shortest
    if (width, height) != picture.size:
        picture = picture.resize((width, height), _FILTERS[spec.interpolation])
    if spec.resize == "crop":
        picture = _centre(picture, side, side)
    pixels = np.array(picture)  # a copy: torch wants it writable
    return pixels, (side - pixels.shape[0]) // 2, (side - pixels.shape[1]) // 2


def _centre(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _side(stated: Mapping[str, Any]) -> int | None:
    """Return the side of a preprocessor's crop or size, which may be a number or a mapping."""
    for value in (stated.get("crop_size"), stated.get("size")):
        if isinstance(value, Mapping):
            value = value.get("height", value.get("shortest_edge"))
        if isinstance(value, int):
            return value
    return None


def _channels(*choices: Sequence[float] | float | None) -> tuple[float, float, float]:
    """Return the first choice that is there, a number standing for all channels."""
    choice = next(choice for choice in choices if choice is not None)
    values = [choice] * 3 if isinstance(choice, (int, float)) else choice
    return tuple(float(value) for value in values)  # type: ignore[return-value]  # ImageSpec checks the length
