"""Which pictures and videos belong to which prompt, for callers that give them as lists."""

from __future__ import annotations

import base64
import itertools
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def per_text(media: Any, texts: Sequence[str], token: str, name: str) -> list[list[Any]]:
    """Distribute media over texts by their placeholders."""
    wanted = [text.count(token) for text in texts]
    if media is None:
        given: list[list[Any]] = [[] for _ in texts]
    elif isinstance(media, (str, Path, Image.Image)) or hasattr(media, "shape"):
        given = [[media]]
    elif (
        len(media) == len(texts)
        and all(isinstance(m, (list, tuple)) for m in media)
        and ([len(m) for m in media] == wanted)
    ):
        given = [list(m) for m in media]
    else:
        flat = iter(itertools.chain.from_iterable(m if _is_list_of_media(m, name) else [m] for m in media))
        given = [list(itertools.islice(flat, n)) for n in wanted]
        given[-1].extend(flat)
    if [len(g) for g in given] != wanted:
        raise ValueError(
            f"prompts hold {wanted} {token} placeholders but {name} holds {[len(g) for g in given]}; "
            f"write one {token} in the text for each"
        )
    return given


def _is_list_of_media(value: Any, name: str) -> bool:
    """Tell a list of images from one image (a list of frames is one video)."""
    return name == "images" and isinstance(value, (list, tuple))


def picture_source(image: Any) -> Any:
    """Return what a caller gives for a picture as a `Media` holds it, so that it is read as in training.

    Args:
        image: PIL image, array, path, or a string: an address, a path or base64.

    Raises:
        ValueError: A string that is none of these.
        OSError: The address does not answer.
    """
    if not isinstance(image, str):
        return image
    if image.startswith(("http://", "https://")):
        asked = urllib.request.Request(image, headers={"User-Agent": "sparsevlm"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.read()
    try:
        if Path(image).is_file():
            return Path(image)
    except OSError:  # far too long for a path
        pass
    coded = image.split(",", 1)[-1] if image.startswith("data:image/") else image
    try:
        return base64.b64decode("".join(coded.split()), validate=True)
    except ValueError:  # binascii.Error is one
        raise ValueError(
            f"no picture {image[:200]!r}: neither an address (http://, https://), nor a file, nor base64"
        ) from None
