"""Reads pictures and videos: every fault of a file becomes a `BadSampleError` that says what is wrong with it.

Nothing here depends on chance: the same media and policy give the same pixels. Size limits are checked on the header,
before anything is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsevlm.data.kept import FilmInfo, is_film_features, probe_film
from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.data.video import (
    MAX_PIXELS,
    VideoInfo,
    VideoPolicy,
    clip_indices,
    decode_video,
    probe_video,
    sample_frame_indices,
    stream_video,
)
from sparsevlm.vision.tokens import MediaKind

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "MAX_PIXELS",
    "VideoFrames",
    "VideoPolicy",
    "count_frames",
    "frame_size",
    "frame_times",
    "image_size",
    "load_image",
    "load_video",
    "sample_frame_indices",
]

_EXIF_ORIENTATION = 0x0112
_EXIF_TRANSPOSED = (5, 6, 7, 8)

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "TGA")
"""Formats that Pillow may try. EPS is not among them: Pillow hands it to Ghostscript."""


@cache
def _known_formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _IMAGE_FORMATS if name in Image.OPEN)  # a build of Pillow may lack AVIF


def load_image(media: Media) -> Image.Image:
    """Return a picture as RGB, turned as its EXIF orientation says.

    Transparency (alpha channel, transparent palette entry) is laid over white; 16-bit grey keeps its upper byte; of an
    animation the first frame is taken.

    Args:
        media: Its `source` is a path, encoded bytes, a PIL image, or an ``(H, W, 3)`` or ``(H, W)`` uint8 array.

    Raises:
        BadSampleError: Missing, empty, truncated, not a picture, without pixels, or larger than `MAX_PIXELS`.
    """
    return _read_image(media.source)


def image_size(media: Media) -> tuple[int, int]:
    """Return ``(width, height)`` of what `load_image` returns, from the header alone.

    Raises:
        BadSampleError: As `load_image`, except for faults that only decoding shows.
    """
    source = media.source
    if isinstance(source, np.ndarray):
        return _from_array(source).size
    with _decoding(), _open_image(source) as image:
        width, height = image.size
        if image.format == "TIFF":  # the one format whose header Pillow reads as it will be shown
            return width, height
        return (height, width) if image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TRANSPOSED else (width, height)


def load_video(media: Media, video: VideoPolicy) -> tuple[list[np.ndarray], list[float]]:
    """Return the frames that the policy draws, and their times.

    Frames in memory are drawn like a video's where `media.fps` says how fast they follow one another; without a rate
    they are taken as they are and only thinned to `max_frames`. The views of a `MULTI_VIEW` item are all taken.

    Args:
        media: Its `source` is a path, encoded bytes, or a sequence of frames; `start` and `end` choose a clip.
        video: How frames are drawn.

    Returns:
        Frames ``(H, W, 3)`` uint8 in order of time, and the second that each belongs to, counted from the start of the
        video (from 0 in steps of 1 where frames carry no rate).

    Raises:
        BadSampleError: Not a video, undecodable, shorter than its header says, an empty clip, or frames too large.
    """
    if not isinstance(media.source, (str, Path, bytes, bytearray)):
        frames = _frames_of(media)
        indices = _memory_indices(media, len(frames), video)
        rate = media.fps or 1.0
        return [np.asarray(_read_image(frames[i])) for i in indices], [i / rate for i in indices]
    info = _probe(media.source)
    _refuse_features(info)
    return decode_video(media.source, info, clip_indices(info.total, info.fps, media.start, media.end, video))


class VideoFrames(Sequence[Any]):
    """The frames that a policy draws from a video, decoded one at a time whenever they are gone through.

    Args:
        media: As for `load_video`.
        video: How frames are drawn.

    Raises:
        BadSampleError: As `count_frames`; going through the frames, as `load_video`.
    """

    def __init__(self, media: Media, video: VideoPolicy) -> None:
        self.media = media
        self.info = None
        if isinstance(media.source, (str, Path, bytes, bytearray)):
            self.info = _probe(media.source)
            self.indices = clip_indices(self.info.total, self.info.fps, media.start, media.end, video)
        else:
            self.indices = _memory_indices(media, len(_frames_of(media)), video)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield ``(H, W, 3)`` uint8 arrays in order of time; one is held."""
        return self._frames(self.indices)

    def __getitem__(self, index: Any) -> Any:
        """Decode one frame, or those of a slice."""
        if isinstance(index, slice):
            return list(self._frames(self.indices[index]))
        return next(self._frames([self.indices[index]]))

    def blocks(self, size: int) -> Iterator[list[np.ndarray]]:
        """Yield the frames in lists of at most ``size``, in one pass over the file; one list is held."""
        frames = iter(self)
        while block := list(islice(frames, size)):
            yield block

    def _frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        _refuse_features(self.info)
        if self.info is None:
            return (np.asarray(_read_image(self.media.source[i])) for i in indices)
        return (frame for frame, _ in stream_video(self.media.source, self.info, indices))


def count_frames(media: Media, video: VideoPolicy) -> int:
    """Return how many frames `load_video` returns, without decoding any.

    The number follows from what the container says of itself; where it says nothing, its packets are counted.

    Raises:
        BadSampleError: As `load_video`, except for faults that only decoding shows.
    """
    if not isinstance(media.source, (str, Path, bytes, bytearray)):
        return len(_memory_indices(media, len(_frames_of(media)), video))
    info = _probe(media.source)
    return len(clip_indices(info.total, info.fps, media.start, media.end, video))


def frame_size(media: Media, video: VideoPolicy) -> tuple[int, int]:
    """Return ``(width, height)`` of the first frame that `load_video` returns; of a file, by decoding that frame.

    Raises:
        BadSampleError: As `load_video`.
    """
    if isinstance(media.source, (str, Path, bytes, bytearray)):
        info = _probe(media.source)
        if isinstance(info, FilmInfo):
            return info.size
        first = clip_indices(info.total, info.fps, media.start, media.end, video)[0]
        frame, _ = next(iter(stream_video(media.source, info, [first])))
        return frame.shape[1], frame.shape[0]
    frames = _frames_of(media)
    return image_size(Media(MediaKind.IMAGE, frames[_memory_indices(media, len(frames), video)[0]]))


def frame_times(media: Media, video: VideoPolicy) -> list[float]:
    """Return the second of each frame that `load_video` returns, by the average rate; nothing is decoded.

    For videos of an even rate these are the times that frames are shown at.

    Raises:
        BadSampleError: As `count_frames`.
    """
    if not isinstance(media.source, (str, Path, bytes, bytearray)):
        rate = media.fps or 1.0
        return [i / rate for i in _memory_indices(media, len(_frames_of(media)), video)]
    info = _probe(media.source)
    return [float(i / info.fps) for i in clip_indices(info.total, info.fps, media.start, media.end, video)]


def _probe(source: str | Path | bytes | bytearray) -> VideoInfo:
    """Return what a video says of itself, or the features that were kept of one."""
    return probe_film(source) if is_film_features(source) else probe_video(source)  # type: ignore[arg-type]


def _refuse_features(info: VideoInfo | None) -> None:
    if isinstance(info, FilmInfo):
        raise BadSampleError("a file of features holds no frames to look at; name the film itself")


def _frames_of(media: Media) -> Sequence[Any] | np.ndarray:
    frames = media.source
    if not isinstance(frames, (list, tuple, np.ndarray)):
        raise BadSampleError(f"a {media.kind} cannot be read from {type(frames).__name__}")
    if isinstance(frames, np.ndarray) and frames.ndim != 4:
        raise BadSampleError(f"frames in one array are (T, H, W, 3), got {frames.shape}")
    if len(frames) == 0:
        raise BadSampleError(f"{media.kind} without frames")
    return frames


def _memory_indices(media: Media, total: int, video: VideoPolicy) -> list[int]:
    if media.kind == MediaKind.MULTI_VIEW:
        return list(range(total))
    if media.fps is not None:
        return clip_indices(total, media.fps, media.start, media.end, video)
    if media.start or media.end is not None:
        raise BadSampleError("a clip of frames in memory needs their frame rate")
    return sample_frame_indices(total, 1.0, VideoPolicy(fps=None, max_frames=video.max_frames))


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn whatever a decoder throws at a broken file into `BadSampleError`."""
    try:
        yield
    except BadSampleError:
        raise
    except FileNotFoundError as error:
        raise BadSampleError(f"missing file {error.filename}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes; none of it is our fault
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise BadSampleError(f"cannot be decoded as a picture: {kind}{error}") from error


@contextmanager
def _open_image(source: Any) -> Iterator[Image.Image]:
    """Open a picture, its header checked, its pixels not yet decoded."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        _check_size(*source.size)
        yield source
        return
    if isinstance(source, (bytes, bytearray)):
        empty = len(source) == 0
    elif isinstance(source, (str, Path)):
        empty = Path(source).stat().st_size == 0
    else:
        raise BadSampleError(f"a picture cannot be read from {type(source).__name__}")
    if empty:
        raise BadSampleError("empty file")
    try:
        opened = Image.open(
            io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source, formats=_known_formats()
        )
    except UnidentifiedImageError:
        raise BadSampleError("not a picture in a known format") from None
    except Image.DecompressionBombError as error:
        raise BadSampleError(f"decompression bomb: {error}") from None
    with opened:
        _check_size(*opened.size)
        yield opened


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadSampleError(f"picture without pixels: {width}x{height}")
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"decompression bomb: {width}x{height} pixels, at most {MAX_PIXELS} are read")


def _read_image(source: Any) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source)
    from PIL import ImageOps

    with _decoding(), _open_image(source) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def _from_array(array: np.ndarray) -> Image.Image:
    from PIL import Image

    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise BadSampleError(f"a picture in memory is (H, W, 3) uint8, got {array.shape} {array.dtype}")
    _check_size(array.shape[1], array.shape[0])
    return Image.fromarray(array).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture as RGB; always a copy, so that the file can be closed."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey; a plain convert would clip everything above 255 to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadSampleError("32-bit float picture; its range is unknown, convert it to 8 bits")
    if not image.has_transparency_data:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over).convert("RGB")
