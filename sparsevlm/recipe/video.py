"""`model.video`: how frames are drawn from videos, and what text stands between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sparsevlm.recipe.section import CrossFault, Strict, number


def _frame_text(value: str) -> str:
    try:
        value.format(time=0.0, index=1)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ValueError(
            f"{value!r} cannot be filled in; it may hold {{time}} (seconds, {{time:.1f}} for one decimal) and "
            "{index} (of the frame, from 1); other braces are doubled"
        ) from None
    return value


def _cue_text(value: str) -> str:
    if value.count("{text}") != 1:
        raise ValueError(f"{value!r} must hold {{text}} once: what is said")
    return value


class Subtitles(Strict):
    """Where what is said in a video goes: behind the frame that it belongs to.

    A row names the file (srt, vtt, ass, JSON of speech recognition) in the column `subtitles`.
    """

    text: Annotated[str, AfterValidator(_cue_text)] = "{text} "
    """What is written; `{text}` is what is said."""
    max_words: int | None = Field(default=None, ge=1)
    """Words a video; what is said once they are used up is left out. As in MiniGPT4-Video, each insertion counts one
    more than it has and the last one is whole."""
    once: bool = True
    """Leave out what was said before in the same words."""
    frame: Literal["next", "last"] = "next"
    """`next`: behind the first frame at or after its start (MiniGPT4-Video); `last`: behind the last frame before its
    end (LLaMA-VID)."""


class Video(Strict):
    """How frames are drawn from videos."""

    fps: float | None = Field(default=1.0, gt=0)
    """Frames a second; null draws `max_frames` evenly whatever the length."""
    min_frames: int = Field(default=1, ge=1)
    """Shorter clips are sampled more densely to reach this many, as far as they have frames."""
    max_frames: int = Field(default=64, ge=1)
    """Longer clips are thinned to this many."""
    thinning: Literal["even", "floor", "stride"] = "even"
    """How `n` frames are chosen of `N`: `even`, every `(N - 1) / (n - 1)`-th, rounded; `floor`, the same cut off to
    whole numbers (Video-LLaVA, Oryx); `stride`, every `floor(N / n)`-th from the first (MiniGPT4-Video; up to half of
    the video's end goes unseen)."""
    long_frames: int | None = Field(default=None, ge=2)
    """Videos of which at least so many frames are drawn are long, an own kind of media: `vision.native.long_video`
    gives their sides, and `dynamic_compressor` has a ratio for them. Default: no video is."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Visual tokens a video: `max_frames` is lowered to what fits."""
    frame_text: Annotated[str, AfterValidator(_frame_text)] = ""
    """Text before each frame; `{time}` is its second, as in `"Frame at {time:.1f}s: "`, `{index}` its number from 1.
    Needs a connector that keeps frames apart."""
    subtitles: Subtitles | None = None
    """Write what is said in a video between its frames; default: leave it out."""

    @classmethod
    def cross_faults(cls, raw: dict[str, Any]) -> Iterator[CrossFault]:
        """See `Strict`."""
        fewest, most = number(raw.get("min_frames", 1)), number(raw.get("max_frames", 64))
        if fewest is not None and most is not None and fewest > most:
            at = "min_frames" if "min_frames" in raw else "max_frames"
            yield (at,), f"min_frames {fewest} is more than max_frames {most}"
        long = number(raw.get("long_frames"))
        if long is not None and most is not None and long > most:
            yield ("long_frames",), f"no video is long: long_frames {long} is more than max_frames {most}"
