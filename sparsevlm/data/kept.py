"""Features that were computed before: what a tower gave for a medium, taken in the place of its pixels.

Those of a film are a file of safetensors that stands in a row where the film would. It holds one tensor, `features`,
``(T, n, D)``: n tokens of each of T frames that follow one another at a fixed rate. Frames are drawn from it as from
the film. What it was made with stands in its metadata, so that it is not taken for something else.

Legend: T frames, n tokens of a frame, D tower width.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsevlm.data.sample import BadSampleError
from sparsevlm.data.video import VideoInfo

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
FORMAT = "sparsevlm film features 1"
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Kept:
    """Features of one medium.

    Attributes:
        features: ``(tokens, D)``, all its items one after the other, as they left the tower.
        tower: Number of the tower that gave them; see `tower_number`.
    """

    features: Tensor
    tower: int


class Entry(NamedTuple):
    """Where a tensor lies in a file of safetensors."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class FilmInfo(VideoInfo):
    """What a file of features says of itself.

    Attributes:
        entry: Where the features are.
        tower: Identity of the tower.
        pictures: What frames were brought to, as `picture_rules` wrote it.
        size: ``(width, height)`` of the film's frames.
        film: Digest of the film's file.
    """

    entry: Entry
    tower: str
    pictures: str
    size: tuple[int, int]
    film: str


def tower_number(identity: str) -> int:
    """Return a tower's identity (hexadecimal digits) as a positive number that fits an int64 tensor."""
    return int(identity[:15], 16) + 1


def is_film_features(source: Any) -> bool:
    """Tell whether a medium's source is a file of features."""
    return isinstance(source, (str, Path)) and str(source).endswith(SUFFIX)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors and the metadata of a file of safetensors, reading its header only.

    Raises:
        ValueError: It is none, or shorter than its header says.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("not a file of safetensors")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            start = 8 + length
            entries = {
                name: Entry(
                    value["dtype"],
                    tuple(value["shape"]),
                    start + value["data_offsets"][0],
                    start + value["data_offsets"][1],
                )
                for name, value in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a file of safetensors: {error}") from None
    if max((entry.end for entry in entries.values()), default=start) != size:
        raise ValueError(f"{size} bytes, its header says otherwise: it was not written to its end")
    return entries, metadata


def read_tensor(file: int, entry: Entry, rows: slice | None = None) -> Tensor:
    """Return a tensor, or some of its rows, from an open file.

    Args:
        file: Descriptor.
        entry: From `read_header`.
        rows: Which of the first dimension; default: all.

    Raises:
        OSError: The file ends before.
    """
    import torch

    dtype = getattr(torch, _NAMES[entry.dtype])
    first, last = (0, entry.shape[0]) if rows is None else (rows.start, rows.stop)
    row = (entry.end - entry.begin) // entry.shape[0]
    wanted = (last - first) * row
    data = bytearray(wanted)
    got = os.preadv(file, [data], entry.begin + first * row)
    while got < wanted:  # one call gives two gigabytes at most
        more = os.preadv(file, [memoryview(data)[got:]], entry.begin + first * row + got)
        if more <= 0:
            raise OSError("the file ends within the tensor")
        got += more
    return torch.frombuffer(data, dtype=dtype).view(last - first, *entry.shape[1:])


def probe_film(path: str | Path) -> FilmInfo:
    """Return what a file of features says of itself; its features are not read.

    Raises:
        BadSampleError: Missing, torn, or not such a file.
    """
    try:
        entries, said = read_header(Path(path))
    except FileNotFoundError:
        raise BadSampleError(f"missing file {path}") from None
    except (ValueError, OSError) as error:
        raise BadSampleError(f"features cannot be read: {error}") from None
    entry = entries.get("features")
    if said.get("format") != FORMAT or entry is None or len(entry.shape) != 3 or entry.dtype not in _NAMES:
        raise BadSampleError("a file of safetensors, but not a film's features; make them with `sparsevlm features`")
    width, height = said["size"].split("x")
    return FilmInfo(
        total=entry.shape[0],
        fps=Fraction(said["fps"]),
        start=Fraction(0),
        entry=entry,
        tower=said["tower"],
        pictures=said["pictures"],
        size=(int(width), int(height)),
        film=said["film"],
    )


def read_film(path: str | Path, info: FilmInfo, indices: Sequence[int]) -> Kept:
    """Return the features of some frames, one after the other; nothing else of the file is read.

    Raises:
        BadSampleError: The file cannot be read any more.
    """
    import torch

    _, tokens, width = info.entry.shape
    features = torch.empty(len(indices), tokens, width, dtype=getattr(torch, _NAMES[info.entry.dtype]))
    try:
        with open_file(Path(path)) as file:
            for place, frame in zip(features, indices, strict=True):  # one by one: a film's may fill half the memory
                place.copy_(read_tensor(file, info.entry, slice(frame, frame + 1))[0])
    except OSError as error:
        raise BadSampleError(f"features cannot be read: {error}") from None
    return Kept(features.flatten(0, 1), tower_number(info.tower))


def write_film(path: Path, blocks: Iterable[Tensor], frames: int, facts: Mapping[str, str]) -> tuple[int, ...]:
    """Write a film's features block by block, so that memory holds one of them; the file appears when it is whole.

    Args:
        path: The file.
        blocks: ``(t, n, D)`` each, on any device.
        frames: How many there will be in all.
        facts: `fps`, `tower`, `pictures` and `size`, see `FilmInfo`.

    Returns:
        ``(T, n, D)``.

    Raises:
        ValueError: The blocks hold another number of frames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    shape, written = None, 0
    try:
        with part.open("wb") as file:
            for block in blocks:
                if shape is None:
                    shape = (frames, *block.shape[1:])
                    file.write(_header(shape, block, facts))
                file.write(raw_bytes(block.detach().to("cpu").contiguous()))
                written += len(block)
            if shape is None or written != frames:
                raise ValueError(f"{written} frames came of {frames}")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return shape


def _header(shape: tuple[int, ...], block: Tensor, facts: Mapping[str, str]) -> bytes:
    name = next(name for name, dtype in _NAMES.items() if str(block.dtype) == f"torch.{dtype}")
    size = block.element_size()
    for side in shape:
        size *= side
    features = {"dtype": name, "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"format": FORMAT, **facts}, "features": features}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """Open a file for `read_tensor`."""
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data
