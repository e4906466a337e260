"""What the tower gets of a medium: its pixels, or features that were computed before.

Legend: F frames, S side in pixels, n tokens of a medium, D tower width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from sparsevlm.data.digest import media_digest
from sparsevlm.data.kept import FilmInfo, Kept, is_film_features, probe_film, read_film
from sparsevlm.data.media import VideoFrames, VideoPolicy, count_frames, frame_size, image_size, load_image
from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.model.layout import Medium
from sparsevlm.vision.feature_store import FeatureStore, picture_rules
from sparsevlm.vision.preprocess import ImageSpec, item_kind, preprocess_medium
from sparsevlm.vision.tokens import MediaKind

Extent = tuple[int, tuple[int, int] | None]
"""Frames of a medium, and the size ``(width, height)`` of a picture where counts depend on it."""


@dataclass(frozen=True)
class Seen:
    """A medium that was read.

    Attributes:
        kind: Of the medium.
        extent: What its tokens follow from.
        frames: Pictures; None where features are there.
        kept: Its features, where they are known.
        key: Name under which they are to be kept; empty where they are not.
    """

    kind: MediaKind
    extent: Extent
    frames: Sequence[Any] | None = None
    kept: Kept | None = None
    key: str = ""


class MediaReader:
    """Reads media for one tower.

    Args:
        spec: How pictures become frames.
        policy: Which frames are drawn from videos.
    """

    def __init__(self, spec: ImageSpec, policy: VideoPolicy) -> None:
        self.spec, self.policy = spec, policy
        self._rules = {video: picture_rules(spec, video=video) for video in (False, True)}

    def read(self, media: Media, store: FeatureStore | None = None) -> Seen:
        """Return a medium; a video's frames are decoded only when they are gone through.

        Args:
            media: The medium.
            store: Where features may be that were computed before.

        Raises:
            BadSampleError: It cannot be read, or a film's features were made for other pictures.
        """
        video = VideoFrames(media, self.policy) if media.kind is MediaKind.VIDEO else None
        if video is not None and isinstance(video.info, FilmInfo):
            self._check(video.info, len(video))
            extent = len(video), video.info.size if self.spec.native is not None else None
            return Seen(media.kind, extent, kept=read_film(media.source, video.info, video.indices))
        key = ""
        if store is not None:
            key = media_digest(media, None if video is None else video.indices)
            key += media_digest(Media(media.kind, self._rules[video is not None].encode()))
            kept = store.get(key)
            if kept is not None:
                return Seen(media.kind, self.measure(media), kept=kept)
        frames = self._frames(media) if video is None else video
        return Seen(media.kind, self._extent(frames), frames=frames, key=key)

    def measure(self, media: Media) -> Extent:
        """Return what a medium's tokens follow from, without decoding it.

        Raises:
            BadSampleError: As `read`, except for faults that only decoding shows.
        """
        native = self.spec.native is not None
        if media.kind is MediaKind.VIDEO:
            frames = count_frames(media, self.policy)
            if is_film_features(media.source):
                self._check(probe_film(media.source), frames)
            return frames, frame_size(media, self.policy) if native else None
        if media.kind is MediaKind.MULTI_VIEW:
            return len(media.source), frame_size(media, self.policy) if native else None
        return 1, image_size(media) if self.spec.needs_size else None

    def pixels(self, seen: Seen) -> Tensor:
        """Return the pixels of a medium whose features are not known."""
        assert seen.frames is not None, "there are features for it"
        return preprocess_medium(seen.frames, seen.kind, self.spec)

    def _frames(self, media: Media) -> Sequence[Any]:
        if media.kind is MediaKind.MULTI_VIEW:
            return [load_image(Media(MediaKind.IMAGE, view)) for view in media.source]
        return [load_image(media)]

    def _extent(self, frames: Sequence[Any]) -> Extent:
        if not self.spec.needs_size:
            return len(frames), None
        first = frames[0]
        return len(frames), first.size if isinstance(first, Image.Image) else (first.shape[1], first.shape[0])

    def _check(self, info: FilmInfo, frames: int) -> None:
        if info.pictures != self._rules[True]:
            had, wanted = (json.loads(rules) for rules in (info.pictures, self._rules[True]))
            other = [name for name in sorted(had | wanted) if had.get(name) != wanted.get(name)]
            theirs, ours = (", ".join(f"{name} {rules.get(name)}" for name in other) for rules in (had, wanted))
            raise BadSampleError(
                f"features of frames that were brought to {theirs}, but the model sees {ours}; make them anew with "
                "`sparsevlm features`"
            )
        native = self.spec.native
        if native is not None and native.long_video is not None:  # their frames have sides of their own
            kept, drawn = (item_kind(self.spec, MediaKind.VIDEO, number) for number in (info.total, frames))
            if kept is not drawn:
                raise BadSampleError(
                    f"features of {info.total} frames in the sides of a {kept}, but the {frames} that are drawn are a "
                    f"{drawn} (model.video.long_frames: {self.spec.long_frames}); name the film itself"
                )


def kept_of(read: Sequence[Seen], media: Sequence[Medium]) -> tuple[Kept | None, ...]:
    """Return the features of media that are known; nothing where none are.

    Raises:
        BadSampleError: They are not as many as the medium has.
    """
    if all(seen.kept is None for seen in read):
        return ()
    for seen, medium in zip(read, media, strict=True):
        wanted = sum(shape.grid.num_tokens for shape in medium.shapes)
        if seen.kept is not None and seen.kept.features.shape[0] != wanted:
            raise BadSampleError(
                f"{seen.kept.features.shape[0]} features, the medium has {wanted}; make them anew with "
                "`sparsevlm features`"
            )
    return tuple(seen.kept for seen in read)
