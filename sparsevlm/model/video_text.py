"""Text between the frames of a video: times, and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsevlm.connectors.base import BlockSpec, connector_items
from sparsevlm.data.media import frame_times
from sparsevlm.data.sample import Media
from sparsevlm.data.subtitles import align_cues, budget_texts, read_subtitles
from sparsevlm.data.video import VideoPolicy
from sparsevlm.model.layout import Piece
from sparsevlm.vision.preprocess import ImageSpec, tower_items
from sparsevlm.vision.tokens import ItemShape, MediaKind

Texts = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""Token ids before and after each frame."""


class VideoText:
    """Makes the text between frames.

    Args:
        tokenizer: Fast tokenizer.
        options: A recipe's `model.video` as plain values.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.frame_text: str = options.get("frame_text") or ""
        self.subtitles: dict[str, Any] | None = options.get("subtitles")

    def __bool__(self) -> bool:
        """Whether anything stands between frames."""
        return bool(self.frame_text) or self.subtitles is not None

    def texts(self, media: Media, policy: VideoPolicy) -> Texts:
        """Return the text tokens around each frame that the policy draws; nothing is decoded.

        Raises:
            BadSampleError: The video or its subtitles cannot be read.
        """
        times = frame_times(media, policy)
        before = [self._ids(self.frame_text.format(time=time, index=i)) for i, time in enumerate(times, 1)]
        after: list[tuple[int, ...]] = [()] * len(times)
        if self.subtitles is not None and media.subtitles is not None:
            cues = align_cues(read_subtitles(media.subtitles), times, media.start, self.subtitles["frame"])
            said = budget_texts(cues, self.subtitles["max_words"], self.subtitles["once"])
            text = self.subtitles["text"]
            # What people say is text: a placeholder or an end of turn among it must not become one.
            after = [self._ids(text.replace("{text}", words), plain=True) if words else () for words in said]
        return list(zip(before, after, strict=True))

    def _ids(self, text: str, plain: bool = False) -> tuple[int, ...]:
        if not text:
            return ()
        encoding = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)
        return tuple(encoding["input_ids"])


def interleave(items: Sequence[ItemShape], texts: Texts) -> tuple[Piece, ...]:
    """Return the pieces of a video with text around its frames.

    Args:
        items: Of the video, after the connector.
        texts: Around each frame.

    Raises:
        ValueError: The connector does not keep the frames apart.
    """
    if len(items) != 1 or items[0].grid.t != len(texts):
        raise ValueError(
            f"model.video.frame_text and subtitles write between frames, but {len(texts)} frames leave the connector "
            f"as {', '.join(str(item.grid) for item in items)} tokens (time x height x width): use blocks that keep "
            "frames apart, or take these options out"
        )
    grid = items[0].grid
    pieces: list[Piece] = []
    for before, after in texts:
        pieces += [before] if before else []
        pieces.append(grid.h * grid.w)
        pieces += [after] if after else []
    return tuple(pieces)


def affordable_frames(spec: ImageSpec, blocks: Sequence[BlockSpec], policy: VideoPolicy, max_tokens: int) -> int:
    """Return the most frames, up to the policy's, with which no video is above a budget of visual tokens.

    Raises:
        ValueError: Not even `min_frames` are within it, or the tokens of a frame depend on its size.
    """
    if getattr(spec, "native", None) is not None:
        raise ValueError(
            "model.video.max_tokens needs frames of one size, and with resize: native a frame's tokens follow its own; "
            "limit max_frames instead"
        )
    tokens, size = 0, (spec.image_size, spec.image_size)
    for frames in range(1, policy.max_frames + 1):  # upwards: many frames may be fewer tokens than some
        items = connector_items(blocks, tower_items(spec, MediaKind.VIDEO, frames, size))
        tokens = sum(item.grid.num_tokens for item in items)
        if tokens > max_tokens:
            if frames <= policy.min_frames:
                raise ValueError(
                    f"model.video.max_tokens is {max_tokens}, but {frames} frames are {tokens} visual tokens and "
                    f"min_frames is {policy.min_frames}; raise it, or add a block that makes fewer tokens of a frame"
                )
            return frames - 1
    return policy.max_frames
