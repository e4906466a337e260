"""The processor: conversations and media to token ids, labels and pixels.

It holds connector *specs* only, so it counts placeholder tokens without building a module; labels come from the role
spans that the chat template marks with ``{% generation %}``, mapped to tokens by their character offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from sparsevlm.connectors.base import connector_guide, connector_items, parse_connector
from sparsevlm.data.collate import describe_items, kept_inputs
from sparsevlm.data.media import VideoPolicy
from sparsevlm.data.sample import IGNORE_INDEX, BadSampleError, Encoded, Media, Sample
from sparsevlm.model.configuration_sparsevlm import SparseVLMConfig
from sparsevlm.model.generation import MEDIA_INPUTS
from sparsevlm.model.guides import NO_MARKS, GuideEncoder, guide_ids, turn_marks
from sparsevlm.model.layout import Medium, Tokens, expand, truncate
from sparsevlm.model.media_input import Extent, MediaReader, Seen, kept_of
from sparsevlm.model.prompt_media import per_text, picture_source
from sparsevlm.model.slice_text import SliceText
from sparsevlm.model.video_text import Texts, VideoText, affordable_frames, interleave
from sparsevlm.vision.feature_store import FeatureStore
from sparsevlm.vision.preprocess import ImageSpec, tower_items
from sparsevlm.vision.tokens import MediaKind

GENERATION_MARKER = "generation"


class SparseVLMProcessor(ProcessorMixin):
    """Tokenizer, picture rules and token arithmetic in one.

    Args:
        tokenizer: Fast tokenizer that holds both placeholder tokens.
        visual: `ImageSpec` as a dict.
        connector: Connector blocks as in the recipe.
        video: A recipe's `model.video` as a dict.
        image_token: Placeholder of one image in a prompt.
        video_token: Placeholder of one video in a prompt.
        chat_template: Jinja template with ``{% generation %}`` around what the assistant says.
        guide_words: Tokenizer of text-guided connector blocks, serialised, where they have another than the language
            model's; default: read from where the block says.
        one_token_media: A medium takes one token of the prompt, since its visual tokens stay beside the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        visual: dict[str, Any],
        connector: list[dict[str, Any]],
        video: dict[str, Any] | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        chat_template: str | None = None,
        guide_words: str | None = None,
        one_token_media: bool = False,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.visual = visual
        self.connector = connector
        self.video = video or {}
        self.image_token = image_token
        self.video_token = video_token
        self.one_token_media = one_token_media
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; labels need character offsets, which only fast "
                "tokenizers give. Convert it with transformers' AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        self.image_token_id = _single_id(tokenizer, image_token)
        self.video_token_id = _single_id(tokenizer, video_token)
        self.image_spec = ImageSpec.from_dict(visual)
        self.video_policy = VideoPolicy.of(self.video)
        self.block_specs = parse_connector(connector)
        wanted = connector_guide(self.block_specs)
        self.guides = GuideEncoder(wanted, tokenizer, self._placeholders(), guide_words)
        self.guide_words = self.guides.saved
        self.slice_text = SliceText(tokenizer, self.image_spec.tiling)
        if budget := self.video.get("max_tokens"):
            frames = affordable_frames(self.image_spec, self.block_specs, self.video_policy, budget)
            self.video_policy = replace(self.video_policy, max_frames=frames)
        self.reader = MediaReader(self.image_spec, self.video_policy)
        self.video_text = VideoText(tokenizer, self.video)
        if self.video_text:
            self.medium(MediaKind.VIDEO, 3, self._square(), texts=[((), ())] * 3)  # refused now, not at a video
        if one_token_media and (self.video_text or self.slice_text.ids):
            raise ValueError(
                "one_token_media keeps visual tokens beside the text, so no text can stand between frames or slices: "
                "take video.frame_text and video.subtitles out, and separators of the tiling"
            )

    # ---- counting -----------------------------------------------------------------------------------------------

    def medium(
        self,
        kind: MediaKind,
        num_frames: int = 1,
        size: tuple[int, int] | None = None,
        texts: Texts | None = None,
    ) -> Medium:
        """Return the items of one medium and its tokens, from arithmetic alone.

        Args:
            kind: Media kind.
            num_frames: Frames of a video, views of a scene.
            size: ``(width, height)`` in pixels, where counts depend on it.
            texts: Text tokens around each frame, where there are any.
        """
        shapes = tower_items(self.image_spec, kind, num_frames, size)
        placeholder = self.video_token_id if kind is MediaKind.VIDEO else self.image_token_id
        after = connector_items(self.block_specs, shapes)
        if self.one_token_media:
            return Medium(kind, tuple(shapes), placeholder, (1,), beside=sum(shape.grid.num_tokens for shape in after))
        if texts is not None:
            return Medium(kind, tuple(shapes), placeholder, interleave(after, texts))
        return Medium(kind, tuple(shapes), placeholder, self.slice_text.pieces(after))

    def count_visual(self, kind: MediaKind, num_frames: int = 1, size: tuple[int, int] | None = None) -> int:
        """Return the visual tokens that one medium puts into the prompt.

        Args:
            kind: Media kind.
            num_frames: Frames before the video policy's limit is applied.
            size: ``(width, height)`` in pixels; has no effect on towers with one fixed input size.
        """
        if kind is MediaKind.VIDEO:
            num_frames = min(num_frames, self.video_policy.max_frames)
        return self.medium(kind, num_frames, size).num_tokens

    # ---- samples --------------------------------------------------------------------------------------------------

    def encode(self, sample: Sample, max_length: int | None = None, store: FeatureStore | None = None) -> Encoded:
        """Read a sample's media and turn it into ids, labels and pixels.

        Args:
            sample: The conversation.
            max_length: Cut to so many tokens, never through a visual block.
            store: Where features of its media may be; those that are not there are to be kept.

        Raises:
            BadSampleError: Media cannot be read, placeholders and media disagree, or no target token is left.
        """
        read = [self.reader.read(item, store) for item in sample.media()]
        tokens = self._layout(sample, [seen.extent for seen in read], max_length)
        read = read[: len(tokens.media)]
        items = [shape._replace(medium=i) for i, medium in enumerate(tokens.media) for shape in medium.shapes]
        encoded = Encoded(
            input_ids=torch.tensor(tokens.ids, dtype=torch.long),
            labels=torch.tensor(tokens.labels, dtype=torch.long),
            pixel_values=self._pixels(read),
            items=tuple(items),
            visual_lengths=tuple(medium.num_visual for medium in tokens.media),
            sample_id=f"{sample.source}/{sample.id}" if sample.source else sample.id,
            guides=guide_ids(tokens.media),
            kept=kept_of(read, tokens.media),
            keys=tuple(seen.key for seen in read) if store is not None else (),
        )
        if encoded.num_targets == 0:
            raise BadSampleError(_no_target(len(tokens.ids), max_length))
        return encoded

    def measure(self, sample: Sample, max_length: int | None = None) -> tuple[int, int]:
        """Return ``(tokens, visual tokens)`` of a sample without reading pixels.

        Raises:
            BadSampleError: As `encode`, as far as headers tell.
        """
        tokens = self._layout(sample, [self.reader.measure(media) for media in sample.media()], max_length)
        if all(label == IGNORE_INDEX for label in tokens.labels[1:]):
            raise BadSampleError(_no_target(len(tokens.ids), max_length))
        return len(tokens.ids), sum(medium.num_visual for medium in tokens.media)

    def encode_prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Turn conversations that end with the user's turn into a left-padded batch for `generate`.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(B, T)`` and, where there are media, ``pixel_values``
            ``(F, 3, h, w)`` and what `Collator` says of the items, ``media_owners`` being the row of each.
        """
        rows, seen = [], []
        for sample in samples:
            read = [self.reader.read(item) for item in sample.media()]
            rows.append(self._layout(sample, [each.extent for each in read], None, add_generation_prompt=True))
            seen.append(read)
        return self._batch(rows, seen, padding_side="left")

    def _layout(
        self,
        sample: Sample,
        extents: Sequence[Extent],
        max_length: int | None,
        add_generation_prompt: bool = False,
    ) -> Tokens:
        """Tokenise a conversation and write each medium's placeholders."""
        messages = [
            {"role": message.role, "content": [_part(part) for part in message.content]} for message in sample.messages
        ]
        text, spans = self._render(messages, add_generation_prompt)
        media = [self._medium(m, extent) for m, extent in zip(sample.media(), extents, strict=True)]
        media = self.guides.of_sample(sample, media)
        return truncate(self._tokenise(text, spans, media), max_length)

    def _medium(self, media: Media, extent: Extent) -> Medium:
        """Return what stands for a medium that was read, or measured."""
        texts = None
        if media.kind is MediaKind.VIDEO and self.video_text:
            texts = self.video_text.texts(media, self.video_policy)
        return self.medium(media.kind, *extent, texts=texts)

    def _square(self) -> tuple[int, int]:
        return self.image_spec.image_size, self.image_spec.image_size

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """Render the chat template; return the text and the character spans that the assistant speaks."""
        if not isinstance(self.chat_template, str):
            raise ValueError("the processor has no chat template; set model.language.chat_template in the recipe")
        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **{
                **self.tokenizer.special_tokens_map,
                "image_token": self.image_token,
                "video_token": self.video_token,
            },
        )
        return rendered[0], [(int(a), int(b)) for a, b in spans[0]]

    def _tokenise(self, text: str, spans: Iterable[tuple[int, int]], media: Sequence[Medium]) -> Tokens:
        """Tokenise rendered text, mark targets by offsets and expand the placeholders."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return expand(encoding["input_ids"], encoding["offset_mapping"], list(spans), media, self._placeholders())

    def _placeholders(self) -> dict[int, str]:
        return {self.image_token_id: self.image_token, self.video_token_id: self.video_token}

    def _pixels(self, read: Sequence[Seen]) -> Tensor | None:
        """Return what the tower gets of media, without those whose features are known."""
        pixels = [self.reader.pixels(seen) for seen in read if seen.kept is None]
        return torch.cat(pixels) if pixels else None

    def _batch(self, rows: Sequence[Tokens], read: Sequence[Sequence[Seen]], padding_side: str) -> dict[str, Tensor]:
        width = max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        input_ids = torch.full((len(rows), width), pad, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(width - len(row.ids), None) if padding_side == "left" else slice(0, len(row.ids))
            input_ids[i, where] = torch.tensor(row.ids, dtype=torch.long)
            attention_mask[i, where] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        items = [
            [shape._replace(medium=i) for i, medium in enumerate(row.media) for shape in medium.shapes] for row in rows
        ]
        if any(items):
            pixels = self._pixels([seen for each in read for seen in each])
            batch |= {} if pixels is None else {"pixel_values": pixels}
            batch |= kept_inputs(items, [kept_of(each, row.media) for each, row in zip(read, rows, strict=True)])
            batch |= describe_items(items, [guide_ids(row.media) for row in rows])
        return batch

    # ---- the interface of transformers ---------------------------------------------------------------------------

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        return_tensors: str | None = "pt",
        return_offsets_mapping: bool = False,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode prompts that already hold their placeholders.

        Args:
            images: One image, a list in reading order over all texts, or a list of lists, one a text. PIL images,
                arrays, paths, URLs or base64; read as in training.
            text: Prompt or prompts.
            videos: As `images`; a video is a path or a sequence of frames.
            audio: Refused.
            return_tensors: Only ``"pt"`` (None is taken as that).
            return_offsets_mapping: Also return each token's place in its text (visual tokens: their placeholder's).
            padding_side: ``"left"`` or ``"right"``; default the tokenizer's.
            **kwargs: Options of other processors; ``padding``, ``truncation`` and sampling options have no effect,
                since batches are always padded to the longest and never cut.

        Raises:
            ValueError: Placeholders and media disagree.
        """
        if audio is not None:
            raise ValueError("SparseVLM has no audio input")
        if text is None:
            raise ValueError("text is missing; a prompt needs at least its placeholders")
        texts = [text] if isinstance(text, str) else list(text)
        batch_images = iter(per_text(images, texts, self.image_token, "images"))
        batch_videos = iter(per_text(videos, texts, self.video_token, "videos"))
        rows, read = [], []
        for prompt in texts:
            sources = {self.image_token_id: iter(next(batch_images)), self.video_token_id: iter(next(batch_videos))}
            encoding = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
            media: list[Medium] = []
            read.append([])
            for token in encoding["input_ids"]:
                if token in sources:
                    kind = MediaKind.VIDEO if token == self.video_token_id else MediaKind.IMAGE
                    source = next(sources[token])
                    source = source if kind is MediaKind.VIDEO else picture_source(source)
                    if kind is MediaKind.VIDEO and isinstance(source, str):
                        source = Path(source)
                    given = Media(kind, source)
                    read[-1].append(self.reader.read(given))
                    media.append(self._medium(given, read[-1][-1].extent))
            media = self.guides.of_prompt(prompt, media, self._turn_marks)
            rows.append(expand(encoding["input_ids"], encoding["offset_mapping"], [], media, self._placeholders()))
        data: dict[str, Any] = self._batch(rows, read, padding_side or self.tokenizer.padding_side)
        if return_offsets_mapping:
            width = data["input_ids"].shape[1]
            left = (padding_side or self.tokenizer.padding_side) == "left"
            pads = [[(0, 0)] * (width - len(row.offsets)) for row in rows]
            data["offset_mapping"] = [
                pad + row.offsets if left else row.offsets + pad for pad, row in zip(pads, rows, strict=True)
            ]
        return BatchFeature(data)

    def _turn_marks(self) -> tuple[str, str, str]:
        has_template = isinstance(self.chat_template, str)
        return turn_marks(lambda turns: self._render(turns, False)[0]) if has_template else NO_MARKS

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render (and tokenise) conversations; see transformers. Placeholder names are this processor's."""
        template = self._resolve_chat_template(chat_template)
        for name in ("image_token", "video_token"):
            if name in template:
                kwargs.setdefault(name, getattr(self, name))
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        return ["input_ids", "attention_mask", *MEDIA_INPUTS]


def _single_id(tokenizer: Any, token: str) -> int:
    """Return the id of a placeholder, which must be one token."""
    ids = tokenizer.convert_tokens_to_ids(token)
    if ids is None or ids == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token!r}; add it as a special token first")
    return ids


def _part(part: str | Media) -> dict[str, Any]:
    """Return a message part as chat templates take it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video" if part.kind is MediaKind.VIDEO else "image"}


def _no_target(length: int, max_length: int | None) -> str:
    cut = f" after cutting to max_length {max_length}" if max_length is not None and length >= max_length else ""
    return f"no target token{cut}: the conversation has no assistant text, or the chat template does not mark it"


__all__ = ["SparseVLMProcessor"]

AutoProcessor.register(SparseVLMConfig, SparseVLMProcessor, exist_ok=True)
