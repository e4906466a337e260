"""Makes small pictures and videos for tests, whole and broken."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SIDE = 32


def picture(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A picture with texture, so that a cut-off JPEG of it really loses rows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def frame_pixels(i: int) -> np.ndarray:
    """Frame i, its number written as eight black and white patches: lossy coding cannot blur it."""
    bits = np.array([(i >> k) & 1 for k in range(8)], dtype=np.uint8).reshape(2, 4) * 255
    return np.repeat(np.kron(bits, np.ones((SIDE // 2, SIDE // 4), dtype=np.uint8))[..., None], 3, axis=2)


def write_video(
    path: Path,
    frames: int,
    fps: int | Fraction = 10,
    codec: str = "mpeg4",
    gop: int = 12,
    b_frames: int = 0,
    times: list[int] | None = None,
    rotation: int | None = None,
    pixels=frame_pixels,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video of numbered frames; `times` (in 1/1000 s) makes the rate vary."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        if codec == "mpeg4":
            stream.codec_context.qmax = 3
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels(i), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def index_of(frame: np.ndarray) -> int:
    """The number written in a frame."""
    patches = frame.mean(axis=2).reshape(2, SIDE // 2, 4, SIDE // 4).mean(axis=(1, 3)).reshape(-1)
    return int(sum(1 << k for k in range(8) if patches[k] > 127))
