"""`messages`: conversations as OpenAI and transformers write them, and ShareGPT's."""

from __future__ import annotations

from typing import Any, ClassVar

from sparsevlm.data.columns import Columns
from sparsevlm.data.formats import DataFormat, RowContext
from sparsevlm.data.placeholders import IMAGE, VIDEO, VIEWS, Placeholders
from sparsevlm.data.sample import BadSampleError, Sample
from sparsevlm.data.turns import read_turns
from sparsevlm.registry import DATA_FORMATS
from sparsevlm.vision.tokens import MediaKind


@DATA_FORMATS.register("messages")
class MessagesFormat(DataFormat):
    """``{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", ...}]}]}``.

    ``content`` is a text or a list of parts: ``{"type": "text", "text"}``, ``{"type": "image", "image" | "path" |
    "url"}``, ``{"type": "image_url", "image_url": {"url"}}`` (``data:`` URLs and relative paths; nothing is
    downloaded), and the same with ``video``, which may have ``subtitles``; ``{"type": "views", "views": [...]}``, which
    may have ``poses``. A part that names no media, and a placeholder in a text, take the next one
    of the row's ``images`` or ``videos``. ShareGPT's ``conversations`` with ``from`` and ``value`` are read as well.

    Options:
        messages: Column of the turns; default: ``messages``, else ``conversations``.
        images: Column of the pictures that parts and placeholders refer to; default: ``images``, else ``image``.
        videos: Column of the videos; default: ``videos``, else ``video``.
        image_token: Placeholder of a picture.
        video_token: Placeholder of a video.
        views: Column of the views of a scene, a list of pictures, or of a list of such lists.
        poses: Column of the views' camera matrices (3 x 4 or 4 x 4 each), kept in `Media.meta`.
        views_token: Placeholder of a scene.
        subtitles: Column of the videos' files of subtitles, below the media root as well.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "messages": ("messages", "conversations"),
        "images": ("images", "image"),
        "videos": ("videos", "video"),
        "image_token": IMAGE,
        "video_token": VIDEO,
        "views": "views",
        "poses": "poses",
        "views_token": VIEWS,
        "subtitles": "subtitles",
    }

    def sample(self, row: Any, context: RowContext) -> Sample:
        """Return the conversation of one row."""
        columns = Columns(row, self.options)
        media = Placeholders(
            columns.media(MediaKind.IMAGE, "images", context),
            columns.media(MediaKind.VIDEO, "videos", context),
            self.options["image_token"],
            self.options["video_token"],
            columns.views("views", "poses", context),
            self.options["views_token"],
        )
        turns = columns.value("messages")
        if turns is None:
            raise BadSampleError(f"no column {columns.name('messages')!r}")
        messages = read_turns(turns, media, context)
        media.finish()
        return context.make(messages)
