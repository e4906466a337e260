"""`caption`: a picture or video and a text that describes it."""

from __future__ import annotations

from typing import Any, ClassVar

from sparsevlm.data.columns import Columns, as_list, clean_text, pick
from sparsevlm.data.formats import DataFormat, RowContext
from sparsevlm.data.sample import BadSampleError, Message, Sample
from sparsevlm.registry import DATA_FORMATS
from sparsevlm.vision.tokens import MediaKind


@DATA_FORMATS.register("caption")
class CaptionFormat(DataFormat):
    """``{"image": "a.jpg", "text": "A cat."}``: the picture is the user's turn, the text the answer.

    Of several captions, and of several prompts, a row always gets the same one, chosen by its id.

    Options:
        image: Column of the picture(s).
        video: Column of the video(s).
        text: Column of the caption, or of a list of captions; default: ``text``, else ``caption``.
        prompt: What the user asks after the picture: a text, or a list of which each row gets one; default: nothing.
        subtitles: Column of the videos' files of subtitles, below the media root as well.
        start: Column of the second at which the row's video starts; default: none.
        end: Column of the second at which it ends; default: none.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "image": "image",
        "video": "video",
        "text": ("text", "caption"),
        "prompt": None,
        "subtitles": "subtitles",
        "start": None,
        "end": None,
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.prompts = as_list(self.options["prompt"])
        if not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"caption: prompt is a text or a list of texts, got {self.options['prompt']!r}")

    def sample(self, row: Any, context: RowContext) -> Sample:
        """Return picture and caption of one row as a conversation."""
        columns = Columns(row, self.options)
        media = [
            *columns.media(MediaKind.IMAGE, "image", context),
            *columns.media(MediaKind.VIDEO, "video", context),
        ]
        if not media:
            raise BadSampleError(f"neither {columns.name('image')!r} nor {columns.name('video')!r}")
        captions = as_list(columns.value("text"))
        if not captions:
            raise BadSampleError(f"no column {columns.name('text')!r}")
        prompt = [f"\n{pick(self.prompts, context.id, 'prompt')}"] if self.prompts else []
        answer = clean_text(pick(captions, context.id, "caption"), columns.name("text"))
        return context.make([Message("user", (*media, *prompt)), Message("assistant", (answer,))])
