"""`interleaved`: documents in which text and pictures take turns (M3W, MMC4, OBELICS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sparsevlm.data.columns import Columns, check_text
from sparsevlm.data.formats import DataFormat, RowContext
from sparsevlm.data.placeholders import IMAGE, Placeholders
from sparsevlm.data.rows import shown
from sparsevlm.data.sample import BadSampleError, Media, Message, Sample
from sparsevlm.registry import DATA_FORMATS
from sparsevlm.vision.tokens import MediaKind

Part = str | Media


@DATA_FORMATS.register("interleaved")
class InterleavedFormat(DataFormat):
    """``{"texts": ["A cat.", null, "A dog."], "images": [null, "dog.jpg", null]}``: what is read, in its order.

    Pictures are user's turns and the text behind each, up to the next picture, the assistant's, so that a text is
    learned from the pictures before it. Text before the first picture stands with it and is no target, as in
    OpenFlamingo; pictures that no text follows are left out. With the template ``plain`` such a document is
    ``text <image> text </s> <image> text </s>``.

    Three spellings: lists of the same length with a null where the other has something (OBELICS); ``text_list`` and
    ``image_info``, whose pictures stand before the sentence that they match (MMC4); one text with placeholders, and a
    list of pictures.

    Options:
        texts: Column of the texts, or of one text with placeholders; default: ``texts``, else ``text_list``, else
            ``text``.
        images: Column of the pictures.
        image_info: Column of MMC4's records: ``image_name``, ``matched_text_index`` and perhaps ``matched_sim``.
        image_token: Placeholder of a picture in one text.
        max_images: Read a document up to the text behind so many pictures; default: all of it.
        min_similarity: Leave out MMC4's pictures that match their sentence less than this.
        glue: What is written between the texts behind one picture.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "texts": ("texts", "text_list", "text"),
        "images": "images",
        "image_info": "image_info",
        "image_token": IMAGE,
        "max_images": None,
        "min_similarity": None,
        "glue": " ",
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        limit, similarity = self.options["max_images"], self.options["min_similarity"]
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"interleaved: max_images is a number of pictures from 1 on, got {limit!r}")
        if similarity is not None and (isinstance(similarity, bool) or not isinstance(similarity, int | float)):
            raise ValueError(f"interleaved: min_similarity is a number, got {similarity!r}")

    def sample(self, row: Any, context: RowContext) -> Sample:
        """Return the document of one row as turns."""
        columns = Columns(row, self.options)
        texts = columns.value("texts")
        if isinstance(texts, str):
            parts = self._written(columns, texts, context)
        elif not isinstance(texts, list):
            raise BadSampleError(f"{columns.name('texts')!r} is {shown(texts)}, neither a text nor a list of texts")
        elif columns.value("image_info") is not None:
            parts = self._matched(columns, texts, context)
        else:
            parts = self._in_turn(columns, texts, context)
        return context.make(self._turns(parts))

    def _written(self, columns: Columns, text: str, context: RowContext) -> list[Part]:
        """Read one text with placeholders."""
        media = Placeholders(columns.media(MediaKind.IMAGE, "images", context), image_token=self.options["image_token"])
        parts = media.split(check_text(text, columns.name("texts")))
        media.finish()
        return parts

    def _in_turn(self, columns: Columns, texts: list[Any], context: RowContext) -> list[Part]:
        """Read two lists, one of which has something at each place."""
        images = columns.value("images")
        if not isinstance(images, list) or len(images) != len(texts):
            raise BadSampleError(
                f"{columns.name('images')!r} is not a list of {len(texts)} entries, as {columns.name('texts')!r} is"
            )
        parts: list[Part] = []
        for place, (text, image) in enumerate(zip(texts, images, strict=True)):
            if (text is None) == (image is None):
                raise BadSampleError(f"place {place} has {'nothing' if text is None else 'both a text and a picture'}")
            if image is not None:
                parts.append(context.media(MediaKind.IMAGE, image))
            else:
                parts.append(check_text(text, columns.name("texts")))
        return parts

    def _matched(self, columns: Columns, texts: list[Any], context: RowContext) -> list[Part]:
        """Read MMC4's lists: each picture stands before the sentence that it matches."""
        name, records = columns.name("image_info"), columns.value("image_info")
        if not isinstance(records, list):
            raise BadSampleError(f"{name!r} is {shown(records)}, not a list")
        before: dict[int, list[Media]] = {}
        for record in records:
            at = record.get("matched_text_index") if isinstance(record, dict) else None
            if type(at) is not int or not 0 <= at < len(texts):
                raise BadSampleError(f"{name!r} holds {shown(record)}, without the index of one of {len(texts)} texts")
            similarity = record.get("matched_sim")
            least = self.options["min_similarity"]
            if least is not None and not isinstance(similarity, int | float):
                raise BadSampleError(f"{name!r} has no 'matched_sim', which min_similarity needs")
            if least is None or similarity >= least:
                before.setdefault(at, []).append(context.media(MediaKind.IMAGE, record.get("image_name")))
        parts: list[Part] = []
        for place, text in enumerate(texts):
            parts += [*before.get(place, []), check_text(text, columns.name("texts"))]
        return parts

    def _turns(self, parts: Sequence[Part]) -> list[Message]:
        """Return a document's turns.

        Raises:
            BadSampleError: It has no picture, or none with text behind it.
        """
        limit = self.options["max_images"]
        asked: list[Part] = []
        said: list[str] = []
        messages: list[Message] = []
        pictures = 0

        def close() -> None:
            if said:
                messages.extend((Message("user", tuple(asked)), Message("assistant", (self._joined(said),))))
                asked.clear()
                said.clear()

        for part in parts:
            if isinstance(part, Media):
                close()
                if pictures == limit:
                    break
                pictures += 1
                asked.append(part)
            elif not part.strip():
                continue
            elif pictures:
                said.append(part)
            else:  # before the first picture
                asked = [self._joined([*(each for each in asked if isinstance(each, str)), part])]
        close()
        if not pictures:
            raise BadSampleError("a document without a picture; give texts alone as 'messages'")
        if not messages:
            raise BadSampleError("no text behind a picture")
        return messages

    def _joined(self, texts: Sequence[str]) -> str:
        return self.options["glue"].join(text.strip() for text in texts)
