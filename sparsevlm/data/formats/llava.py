"""`llava`: the JSON of LLaVA and most that followed it."""

from __future__ import annotations

from typing import Any, ClassVar

from sparsevlm.data.columns import Columns
from sparsevlm.data.formats import DataFormat, RowContext
from sparsevlm.data.placeholders import IMAGE, VIDEO, VIEWS, Placeholders
from sparsevlm.data.sample import BadSampleError, Sample
from sparsevlm.data.turns import read_turns
from sparsevlm.registry import DATA_FORMATS
from sparsevlm.vision.tokens import MediaKind


@DATA_FORMATS.register("llava")
class LlavaFormat(DataFormat):
    """``{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}``.

    ``image`` and ``video`` hold a path or a list of them; a row may have neither. Every one has its placeholder in the
    text, in order.

    Options:
        image: Column of the picture(s).
        video: Column of the video(s).
        conversations: Column of the turns.
        image_token: Placeholder of a picture.
        video_token: Placeholder of a video; ``<image>`` where a collection uses that for both.
        views: Column of the views of a scene, a list of pictures, or of a list of such lists.
        poses: Column of the views' camera matrices (3 x 4 or 4 x 4 each), kept in `Media.meta`.
        views_token: Placeholder of a scene.
        subtitles: Column of the videos' files of subtitles, below the media root as well.
        start: Column of the second at which the row's video starts; default: none.
        end: Column of the second at which it ends; default: none.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "image": "image",
        "video": "video",
        "conversations": "conversations",
        "image_token": IMAGE,
        "video_token": VIDEO,
        "views": "views",
        "poses": "poses",
        "views_token": VIEWS,
        "subtitles": "subtitles",
        "start": None,
        "end": None,
    }

    def sample(self, row: Any, context: RowContext) -> Sample:
        """Return the conversation of one row."""
        columns = Columns(row, self.options)
        media = Placeholders(
            columns.media(MediaKind.IMAGE, "image", context),
            columns.media(MediaKind.VIDEO, "video", context),
            self.options["image_token"],
            self.options["video_token"],
            columns.views("views", "poses", context),
            self.options["views_token"],
        )
        turns = columns.value("conversations")
        if turns is None:
            raise BadSampleError(f"no column {self.options['conversations']!r}")
        messages = read_turns(turns, media, context)
        media.finish()
        return context.make(messages)
