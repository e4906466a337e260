"""`vqa`: a question about a picture or video, and its answer."""

from __future__ import annotations

from collections import Counter
from string import ascii_uppercase
from typing import Any, ClassVar

from sparsevlm.data.columns import Columns, as_list, clean_text
from sparsevlm.data.formats import DataFormat, RowContext
from sparsevlm.data.sample import BadSampleError, Message, Sample
from sparsevlm.registry import DATA_FORMATS
from sparsevlm.vision.tokens import MediaKind

CHOICE_TEMPLATE = "{question}\n{choices}\nAnswer with the option's letter from the given choices directly."


@DATA_FORMATS.register("vqa")
class VqaFormat(DataFormat):
    """``{"image": "a.jpg", "question": "What is it?", "answer": "a cat"}``.

    Several answers (``["cat", "cat", "kitten"]`` or VQAv2's ``[{"answer": "cat"}, ...]``) count as votes: the most
    frequent is trained on, the earliest of equals. With ``choices``, the answer is one of them, its letter, or its
    index from 0, and its letter is trained on. A row may lack a picture only by saying so (``"image": null``).

    Options:
        image: Column of the picture(s); null for questions without any.
        video: Column of the video(s); null for none.
        question: Column of the question.
        answer: Column of the answer, or of a list of answers; default: ``answer``, else ``answers``.
        choices: Column of the options of a multiple-choice question.
        template: The user's text; ``{question}`` and ``{choices}`` are filled in. Default: the question; with choices,
            the question, a line for each and LLaVA's request for the letter.
        prompt: Text added after the question on a line of its own; default: none.
        subtitles: Column of the videos' files of subtitles, below the media root as well.
        start: Column of the second at which the row's video starts; default: none.
        end: Column of the second at which it ends; default: none.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "image": "image",
        "video": "video",
        "question": "question",
        "answer": ("answer", "answers"),
        "choices": "choices",
        "template": None,
        "prompt": None,
        "subtitles": "subtitles",
        "start": None,
        "end": None,
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("template", "prompt"):
            if not isinstance(self.options[name], (str, type(None))):
                raise ValueError(f"vqa: {name} is a text, got {self.options[name]!r}")
        if self.options["template"] is not None and "{question}" not in self.options["template"]:
            raise ValueError(f"vqa: template has no {{question}}: {self.options['template']!r}")

    def sample(self, row: Any, context: RowContext) -> Sample:
        """Return question and answer of one row as a conversation."""
        columns = Columns(row, self.options)
        media = [
            *columns.media(MediaKind.IMAGE, "image", context),
            *columns.media(MediaKind.VIDEO, "video", context),
        ]
        if not columns.has("image") and not columns.has("video") and (self.options["image"] or self.options["video"]):
            raise BadSampleError(f"neither {columns.name('image')!r} nor {columns.name('video')!r}")
        question = clean_text(columns.value("question"), columns.name("question"))
        choices = [clean_text(choice, columns.name("choices")) for choice in as_list(columns.value("choices"))]
        answers = [_answer(answer, choices, columns.name("answer")) for answer in as_list(columns.value("answer"))]
        if not answers:
            raise BadSampleError(f"no column {columns.name('answer')!r}")
        asked = self._ask(question, choices)
        content = (*media, f"\n{asked}") if media else (asked,)
        best = Counter(answers).most_common(1)[0][0]
        return context.make([Message("user", content), Message("assistant", (best,))], meta={"answers": answers})

    def _ask(self, question: str, choices: list[str]) -> str:
        lettered = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices))
        template = self.options["template"] or (CHOICE_TEMPLATE if choices else "{question}")
        asked = template.replace("{choices}", lettered).replace("{question}", question)  # last: it may hold braces
        return asked if self.options["prompt"] is None else f"{asked}\n{self.options['prompt']}"


def _answer(answer: Any, choices: list[str], column: str) -> str:
    """Return the text to train on: an answer, or the letter of the choice that it names."""
    if isinstance(answer, dict):
        answer = answer.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and not choices:
        return str(answer)
    if not choices:
        return clean_text(answer, column)
    letters = ascii_uppercase[: len(choices)]
    if len(choices) > len(ascii_uppercase):
        raise BadSampleError(f"{len(choices)} choices, at most {len(ascii_uppercase)} have a letter")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return letters[answer]
    if isinstance(answer, str) and choices.count(answer.strip()) == 1:
        return letters[choices.index(answer.strip())]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return answer.strip().upper()
    raise BadSampleError(f"{column} {answer!r} is none of the choices {choices!r}, nor a letter or index of one")
