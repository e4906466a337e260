"""Texts for connector blocks that look at text: the user's turn that a medium stands in.

A guide is made for each medium. It is the text of that turn alone, so it holds nothing of an answer, of another turn or
of another sample; placeholders are taken out and white space is made single spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from sparsevlm.connectors.base import GuideText
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.layout import Medium

LANGUAGE = "language"
"""Tokenizer of guides that stands for the language model's."""


Marks = tuple[str, str, str]
"""What a chat template writes before a user's turn, between an answer and the next turn, and after a user's turn."""

NO_MARKS: Marks = ("", "", "")
"""Of a prompt without turns: all of it is one."""


class GuideEncoder:
    """Guides to token ids.

    Args:
        guide: What the connector's blocks want; None: no block looks at text, and media get no guides.
        tokenizer: The language model's.
        placeholders: Placeholder ids and how they are written.
        saved: Another tokenizer as a processor saves it, where the guides have one.

    Raises:
        ValueError: The tokenizer is not there, is not a fast one, or has more words than the block.
    """

    def __init__(
        self, guide: GuideText | None, tokenizer: Any, placeholders: dict[int, str], saved: str | None = None
    ) -> None:
        self.guide = guide
        self.tokenizer = tokenizer
        self.placeholders = list(placeholders.values())
        self.saved = saved
        self._other: Any = None
        if guide is None:
            self.saved = None
            return
        if guide.tokenizer != LANGUAGE:
            self.saved = saved or serialised(guide.tokenizer)
            from tokenizers import Tokenizer

            self._other = Tokenizer.from_str(self.saved)
            self._other.no_padding()
            self._other.enable_truncation(guide.max_tokens, direction="left")
        words = len(tokenizer) if self._other is None else self._other.get_vocab_size()
        if guide.vocab_size is not None and words > guide.vocab_size:
            raise ValueError(
                f"a text-guided connector block knows {guide.vocab_size} words but its tokenizer "
                f"{guide.tokenizer!r} has {words}; set its vocab_size to {words}, or another tokenizer"
            )

    def of_sample(self, sample: Sample, media: Sequence[Medium]) -> list[Medium]:
        """Give each medium of a conversation its guide."""
        if self.guide is None:
            return list(media)
        return self._guided(media, sample_guides(sample, self.placeholders))

    def of_prompt(self, prompt: str, media: Sequence[Medium], marks: Callable[[], Marks]) -> list[Medium]:
        """Give each medium of a rendered prompt its guide; `marks`: see `turn_marks`."""
        if self.guide is None or not media:
            return list(media)
        return self._guided(media, prompt_guides(prompt, marks(), self.placeholders))

    def _guided(self, media: Sequence[Medium], texts: Sequence[str]) -> list[Medium]:
        return [replace(medium, guide=self.ids(text)) for medium, text in zip(media, texts, strict=True)]

    def ids(self, text: str) -> tuple[int, ...]:
        """Return a guide's token ids; of a long text, its end."""
        assert self.guide is not None
        if self._other is not None:
            return tuple(self._other.encode(text).ids)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"][-self.guide.max_tokens :])


def guide_ids(media: Sequence[Medium]) -> tuple[tuple[int, ...], ...]:
    """Return the guide of each medium, nothing where they have none."""
    return tuple(medium.guide for medium in media if medium.guide is not None)


def serialised(path: str) -> str:
    """Return another tokenizer as one string, as processors save it.

    Raises:
        ValueError: There is none, or not a fast one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer {path!r} for a text-guided block: {str(error).splitlines()[0]}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{path!r}: {type(tokenizer).__name__} is not a fast tokenizer, which text-guided blocks need")
    return tokenizer.backend_tokenizer.to_str()


def clean(text: str, placeholders: Sequence[str]) -> str:
    """Return a turn's text as a guide."""
    for placeholder in placeholders:
        text = text.replace(placeholder, " ")
    return " ".join(text.split())


def sample_guides(sample: Sample, placeholders: Sequence[str]) -> list[str]:
    """Return the guide of each medium, in reading order.

    A medium that stands in what the assistant says gets the user's turn before it, not the answer.
    """
    guides, asked = [], ""
    for message in sample.messages:
        if message.role == "user":
            asked = clean(_words(message), placeholders)
        guides += [asked for part in message.content if isinstance(part, Media)]
    return guides


def prompt_guides(prompt: str, marks: Marks, placeholders: Sequence[str]) -> list[str]:
    """Return the guide of each medium of a rendered prompt: what stands around it between the marks of a user's turn.

    Where a template does not mark the end of a turn, the turn goes on to the prompt's end.

    Args:
        prompt: The text.
        marks: As `turn_marks` gives them.
        placeholders: How media are written in it.
    """
    places = [found.start() for found in re.finditer("|".join(map(re.escape, placeholders)), prompt)]
    opening, between, closing = marks
    guides = []
    for place in places:
        starts = [
            prompt.rfind(mark, 0, place) + len(mark) for mark in (opening, between) if mark and mark in prompt[:place]
        ]
        end = prompt.find(closing, place) if closing else -1
        turn = prompt[max(starts, default=0) : None if end < 0 else end]
        guides.append(clean(turn, placeholders))
    return guides


def turn_marks(render: Callable[[list[dict[str, Any]]], str]) -> Marks:
    """Return the marks of a chat template.

    Read off a conversation of known words; the first is what all user's turns begin with, also the first one, which
    may follow a system prompt.
    """
    words = ["sparsevlmone", "sparsevlmtwo", "sparsevlmthree", "sparsevlmfour"]
    turns = [
        {"role": role, "content": [{"type": "text", "text": word}]}
        for role, word in zip(("user", "assistant") * 2, words, strict=True)
    ]
    text = render(turns)
    if any(text.count(word) != 1 for word in words[:3]):  # a template that leaves turns out
        return NO_MARKS
    before, rest = text.split(words[0])
    closing, rest = rest.split(words[1])
    between = rest.split(words[2])[0]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(before), reversed(between))))
    return between[len(between) - same :].strip(), between.strip(), closing.strip()


def _words(message: Message) -> str:
    return " ".join(part for part in message.content if isinstance(part, str))
