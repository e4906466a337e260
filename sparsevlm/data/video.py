"""Which frames of a video are taken, and how they are decoded with PyAV."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sparsevlm.data.sample import BadSampleError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

Thinning = Literal["even", "floor", "stride"]

MAX_PIXELS = 89_478_485
"""Pixels that a picture or frame may have (Pillow's own limit: a quarter of a gigabyte at three bytes)."""

_DEMUXERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,gif,ogg,h264,hevc,m4v,ivf,mxf,dv,webm_dash_manifest"
"""Containers that FFmpeg may try. Playlists (HLS, concat) are not among them: they would open other files."""

_SEEK_GAP = 10.0
"""Seconds between two wanted frames from which on seeking pays (key frames are seldom further apart)."""


@dataclass(frozen=True)
class VideoPolicy:
    """How frames are drawn from a video.

    Attributes:
        fps: Frames a second; None draws `max_frames` evenly whatever the length.
        min_frames: Shorter clips are sampled more densely to reach this many, as far as they have frames.
        max_frames: Longer clips are thinned to this many.
        thinning: How `n` frames are chosen of `N`: `even`, ``i (N - 1) / (n - 1)`` rounded; `floor`, the same cut off;
            `stride`, every ``max(1, floor(N / n))``-th from the first, which leaves out up to half of the end.
    """

    fps: float | None = 1.0
    min_frames: int = 1
    max_frames: int = 64
    thinning: Thinning = "even"

    def __post_init__(self) -> None:
        if not 1 <= self.min_frames <= self.max_frames or (self.fps is not None and self.fps <= 0):
            raise ValueError(
                f"video: fps {self.fps}, min_frames {self.min_frames}, max_frames {self.max_frames}; expected fps > 0 "
                "and 1 <= min_frames <= max_frames"
            )
        if self.thinning not in get_args(Thinning):
            raise ValueError(f"video: thinning {self.thinning!r} is none of {', '.join(get_args(Thinning))}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> VideoPolicy:
        """Return the policy of a recipe's `model.video`, which says more than how frames are drawn."""
        return cls(**{name.name: options[name.name] for name in fields(cls) if name.name in options})


@dataclass(frozen=True)
class VideoInfo:
    """What a container says of its video: `total` frames at `fps` on average, the first shown at second `start`."""

    total: int
    fps: Fraction
    start: Fraction

    @property
    def duration(self) -> Fraction:
        """Seconds."""
        return self.total / self.fps


def sample_frame_indices(total: int, native_fps: float | Fraction, policy: VideoPolicy) -> list[int]:
    """Return the indices of the frames to take, ascending and distinct.

    At `fps` the frames shown at 0, 1/fps, 2/fps, … are taken; where that gives fewer than `min_frames` or more than
    `max_frames`, that many are spread evenly from the first frame to the last. A single frame is the middle one.

    Args:
        total: Frames there are.
        native_fps: Their rate.
        policy: How many to draw.
    """
    if total < 1:
        return []
    if policy.fps is None:
        return _spread(total, policy.max_frames, policy.thinning)
    step = Fraction(native_fps) / Fraction(policy.fps)  # exact: the same count whatever machine computes it
    count = math.ceil(total / step)
    if count > policy.max_frames:
        return _spread(total, policy.max_frames, policy.thinning)
    if count < policy.min_frames:
        return _spread(total, policy.min_frames, policy.thinning)
    return list(range(total)) if step <= 1 else [math.floor(i * step) for i in range(count)]


def _spread(total: int, count: int, thinning: Thinning = "even") -> list[int]:
    if count >= total:
        return list(range(total))
    if thinning == "stride":
        return list(range(0, total, total // count))[:count]
    if count == 1:
        return [(total - 1) // 2]
    if thinning == "floor":
        return [i * (total - 1) // (count - 1) for i in range(count)]
    return [
        (2 * i * (total - 1) + count - 1) // (2 * (count - 1)) for i in range(count)
    ]  # i*(total-1)/(count-1), rounded


def clip_indices(total: int, fps: float | Fraction, start: float, end: float | None, policy: VideoPolicy) -> list[int]:
    """Return the indices that `policy` draws from the frames shown from second ``start`` to second ``end``.

    Raises:
        BadSampleError: No frame lies in the clip.
    """
    rate = Fraction(fps).limit_denominator(1_000_000)
    first = max(0, math.ceil(Fraction(start) * rate - Fraction(1, 1000)))
    last = total if end is None else min(total, math.ceil(Fraction(end) * rate - Fraction(1, 1000)))
    if last <= first:
        until = "its end" if end is None else f"{end:g} s"
        raise BadSampleError(f"no frame between {start:g} s and {until} of a video of {float(total / rate):.2f} s")
    return [first + i for i in sample_frame_indices(last - first, rate, policy)]


@contextmanager
def _open_video(source: str | Path | bytes | bytearray) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a container and its best video stream; FFmpeg's errors leave as `BadSampleError`."""
    import av
    from av.container import InputContainer
    from av.error import FFmpegError
    from av.video.stream import VideoStream

    if isinstance(source, (bytes, bytearray)):
        size, file = len(source), io.BytesIO(source)
    else:
        path = Path(source).absolute()  # absolute: FFmpeg would take "concat:a|b" for a protocol
        try:
            size, file = path.stat().st_size, str(path)
        except FileNotFoundError:
            raise BadSampleError(f"missing file {source}") from None
    if size == 0:
        raise BadSampleError("empty file")
    try:
        with av.open(file, options={"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}) as container:
            assert isinstance(container, InputContainer)  # av.open is typed for writing too
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise BadSampleError("no video stream in the file")
            if stream.width < 1 or stream.height < 1:
                raise BadSampleError(f"video without pixels: {stream.width}x{stream.height}")
            if stream.width * stream.height > MAX_PIXELS:
                raise BadSampleError(f"frames of {stream.width}x{stream.height} pixels, at most {MAX_PIXELS} are read")
            yield container, stream
    except BadSampleError:
        raise
    except (FFmpegError, OSError, ValueError, OverflowError, EOFError) as error:
        raise BadSampleError(f"cannot be decoded as a video: {error}") from error


def probe_video(source: str | Path | bytes | bytearray) -> VideoInfo:
    """Return what a video's container says of it, without decoding a frame.

    Raises:
        BadSampleError: Missing, empty, no video, or frames larger than `MAX_PIXELS`.
    """
    with _open_video(source) as (container, stream):
        base, rate = stream.time_base or Fraction(1, 1000), stream.average_rate
        start = (stream.start_time or 0) * base
        tagged = _matroska_duration(stream)
        if stream.frames > 0 and stream.duration and stream.duration > 0:  # MP4, AVI: an index was written
            total, duration = stream.frames, stream.duration * base
        elif tagged is not None and rate:
            duration = tagged - start
            total = round(duration * rate)
        else:  # elsewhere a duration is FFmpeg's guess: count packets, which reads the file but decodes nothing
            total, duration, start = _scan_packets(container, stream)
        if total < 1 or duration <= 0:
            raise BadSampleError("video without frames")
        return VideoInfo(total, Fraction(total) / duration, start)


def _matroska_duration(stream: VideoStream) -> Fraction | None:
    """Return the end of a Matroska track in seconds from its tag ``00:00:05.250000000``, if it has one."""
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (Fraction(part) for part in parts)
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds


def _scan_packets(container: InputContainer, stream: VideoStream) -> tuple[int, Fraction, Fraction]:
    """Return number of packets, duration and start."""
    packets = [(packet.pts, packet.duration or 0) for packet in container.demux(stream) if packet.size]
    timed = sorted((pts, length) for pts, length in packets if pts is not None)
    if not timed:
        return 0, Fraction(0), Fraction(0)
    base, rate, total = stream.time_base or Fraction(1, 1000), stream.average_rate, len(packets)
    start = timed[0][0] * base
    if rate and len(timed) < total:  # MPEG program streams leave times out: the rate knows better
        return total, total / rate, start
    last, length = timed[-1]
    if length == 0:  # the last packet lasts as long as one does on average
        length = Fraction(last - timed[0][0], max(1, total - 1)) or 1 / (base * (rate or 25))
    return total, (last - timed[0][0] + length) * base, start


def decode_video(
    source: str | Path | bytes | bytearray, info: VideoInfo, indices: list[int]
) -> tuple[list[np.ndarray], list[float]]:
    """Return the frames of ``indices`` (``(H, W, 3)`` uint8, upright) and the seconds they are shown at.

    All frames are held; `stream_video` holds one.

    Raises:
        BadSampleError: As `stream_video`.
    """
    frames = list(stream_video(source, info, indices))
    return [frame for frame, _ in frames], [time for _, time in frames]


def stream_video(
    source: str | Path | bytes | bytearray, info: VideoInfo, indices: Sequence[int]
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield the frames of ``indices`` (``(H, W, 3)`` uint8, upright), each with the second it is shown at.

    Frame i of a video is the one on display at ``(i + 1/2) / fps``: the i-th where frames follow one another evenly,
    the right one in time where they do not. Memory does not grow with the film.

    Raises:
        BadSampleError: Undecodable, or shorter than its container says.
    """
    targets = [info.start + (i + Fraction(1, 2)) / info.fps for i in indices]
    done = 0
    try:
        for frame, time in _display(source, info, targets, seek=True):
            done += 1
            yield frame, float(time - info.start)
    except _BehindError:
        # without seeking there is no landing behind the target
        for frame, time in _display(source, info, targets[done:], seek=False):
            yield frame, float(time - info.start)


class _BehindError(Exception):
    """Seeking landed behind its target."""


def _display(
    source: str | Path | bytes | bytearray, info: VideoInfo, targets: list[Fraction], seek: bool
) -> Iterator[tuple[np.ndarray, Fraction]]:
    """Yield the frame on display at each target.

    Raises:
        _BehindError: Seeking landed behind one.
    """
    last: tuple[np.ndarray, Fraction] | None = None
    slack = max(Fraction(1, 2), 3 / info.fps)  # containers round; more than this is a cut-off file
    with _open_video(source) as (container, stream):
        stream.thread_type = "AUTO"
        decoded = _decode(container, stream, info)
        shown: tuple[Fraction, VideoFrame] | None = None  # latest frame that starts at or before the target
        ahead = next(decoded, None)  # the one after it
        for target in targets:
            if seek and ahead is not None and target - ahead[0] > _SEEK_GAP:
                container.seek(int(target / (stream.time_base or 1)), stream=stream, backward=True)
                decoded = _decode(container, stream, info)
                shown, ahead = None, next(decoded, None)
                if ahead is None or ahead[0] > target:
                    raise _BehindError
            while ahead is not None and ahead[0] <= target:
                shown, ahead = ahead, next(decoded, None)
            if shown is None and ahead is None:
                raise BadSampleError("video without a decodable frame")
            time, frame = shown or ahead  # type: ignore[misc]  # one of them is there
            if ahead is None and target > time + max(_length(frame), 1 / info.fps) + slack:
                raise BadSampleError(
                    f"video ends at {float(time - info.start):.2f} s, its container says {float(info.duration):.2f} s"
                )
            if frame.is_corrupt:
                raise BadSampleError(f"corrupt frame at {float(time - info.start):.2f} s")
            last = last if last is not None and last[1] == time else (_upright(frame), time)
            yield last


def _decode(container: InputContainer, stream: VideoStream, info: VideoInfo) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Yield frames in order of display, each with the second it is shown from."""
    time = info.start - 1 / info.fps
    for frame in container.decode(stream):
        # MPEG program streams time only some frames; the others follow at the rate
        base = frame.time_base or stream.time_base or Fraction(1, 1000)
        time = time + 1 / info.fps if frame.pts is None else frame.pts * base
        yield time, frame


def _length(frame: VideoFrame) -> Fraction:
    """Return how long a frame is shown, 0 where unknown."""
    return (frame.duration or 0) * (frame.time_base or Fraction(0))


def _upright(frame: VideoFrame) -> np.ndarray:
    """Return a frame as RGB, turned as its display matrix says (telephones film sideways)."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
