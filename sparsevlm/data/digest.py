"""What a medium holds, as a name: a hash of the very bytes that it is decoded from.

A hash of a path, a size or a time would be cheaper and could be stale. Reading a picture's bytes and hashing them
takes a small part of decoding it, and decoding reads them anyway; a long video is read once a process.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsevlm.data.sample import BadSampleError, Media

_LARGE = 8 << 20
"""Bytes of a file from which on its hash is remembered while size, place and time of its last change stay."""
_SETTLED = 2.0
"""Seconds since the last change before which it is not: clocks of file systems are coarse."""

_KNOWN: dict[tuple[str, int, int, int], bytes] = {}


def media_digest(media: Media, indices: Sequence[int] | None = None) -> str:
    """Return the name of what a medium shows.

    Args:
        media: The medium.
        indices: Frames that are drawn of a video; None for anything else.

    Raises:
        BadSampleError: A file is missing or cannot be read.
    """
    digest = hashlib.blake2b(repr((media.kind.value, indices)).encode(), digest_size=20)
    source = media.source
    if indices is not None and not isinstance(source, (str, Path, bytes, bytearray)):
        source = [source[i] for i in indices]
    for part in source if isinstance(source, (list, tuple)) else [source]:
        digest.update(_content(part))
    return digest.hexdigest()


def _content(source: Any) -> bytes:
    if isinstance(source, (str, Path)):
        return _of_file(Path(source))
    digest = hashlib.blake2b(digest_size=20)
    if isinstance(source, (bytes, bytearray)):
        digest.update(source)
    elif isinstance(source, np.ndarray):
        digest.update(repr((source.shape, str(source.dtype))).encode())
        digest.update(np.ascontiguousarray(source).data)
    else:  # a picture in memory
        transparency = source.info.get("transparency")
        palette = source.getpalette(None)  # with its transparency, where it has any
        digest.update(repr((source.mode, source.size, transparency, palette)).encode())
        digest.update(source.getexif().tobytes())
        digest.update(source.tobytes())
    return digest.digest()


def _of_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            place = (str(path.absolute()), state.st_ino, state.st_size, state.st_mtime_ns)
            if place not in _KNOWN:
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).digest()
                if state.st_size < _LARGE or time.time() - state.st_mtime < _SETTLED:
                    return content
                _KNOWN[place] = content
            return _KNOWN[place]
    except FileNotFoundError:
        raise BadSampleError(f"missing file {path}") from None
    except OSError as error:
        raise BadSampleError(f"{path} cannot be read: {error}") from None
