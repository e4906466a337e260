"""Matches the media that a row lists with the placeholders in its texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.vision.tokens import MediaKind

IMAGE, VIDEO, VIEWS = "<image>", "<video>", "<views>"


class Placeholders:
    """Hands out the pictures, videos and scenes of one row in reading order.

    Args:
        images: Pictures that the row lists.
        videos: Videos that the row lists.
        image_token: How a text says that the next picture belongs here.
        video_token: The same for videos. Some collections write ``<image>`` for both; pictures then come first.
        views: Scenes, each a list of views, that the row lists.
        views_token: The same for them; where it is another's too, they come last.
    """

    def __init__(
        self,
        images: Sequence[Media] = (),
        videos: Sequence[Media] = (),
        image_token: str = IMAGE,
        video_token: str = VIDEO,
        views: Sequence[Media] = (),
        views_token: str = VIEWS,
    ) -> None:
        self._listed: dict[str, list[Media]] = {}
        # A text may hold "<views>" as text wherever a row has no views.
        tokens = [(image_token, images), (video_token, videos), *([(views_token, views)] if views else [])]
        for token, media in tokens:
            self._listed.setdefault(token, []).extend(media)
        self._names = {MediaKind.IMAGE: image_token, MediaKind.VIDEO: video_token, MediaKind.MULTI_VIEW: views_token}
        self._seen = dict.fromkeys(self._listed, 0)
        self._pattern = re.compile("|".join(re.escape(token) for token in self._listed))

    def split(self, text: str) -> list[str | Media]:
        """Return a text as its parts, each placeholder replaced by its media.

        Raises:
            BadSampleError: More placeholders than media.
        """
        parts: list[str | Media] = []
        at = 0
        for found in self._pattern.finditer(text):
            parts += [text[at : found.start()]] if found.start() > at else []
            parts.append(self._next(found.group()))
            at = found.end()
        return parts + ([text[at:]] if at < len(text) else [])

    def take(self, kind: MediaKind) -> Media:
        """Return the next media of a kind, for a row that says so without a placeholder.

        Raises:
            BadSampleError: None is left.
        """
        return self._next(self._names[kind])

    def _next(self, token: str) -> Media:
        if token not in self._listed:
            raise BadSampleError("a part asks for views, but the row lists none")
        at = self._seen[token]
        self._seen[token] += 1
        # beyond the end: go on counting, so that the message in `finish` has the whole number
        return self._listed[token][at] if at < len(self._listed[token]) else _MISSING

    def finish(self) -> None:
        """Check that every media found its place.

        Raises:
            BadSampleError: The numbers differ.
        """
        for token, seen in self._seen.items():
            if seen != len(self._listed[token]):
                raise BadSampleError(
                    f"{seen} {token} placeholders in the text for {len(self._listed[token])} media listed"
                )


_MISSING = Media(MediaKind.IMAGE, None)
