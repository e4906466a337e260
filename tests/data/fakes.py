"""A processor for tests: one token a word, eight a picture, and as many as frames for a video."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch

from sparsevlm.data.media import VideoPolicy, count_frames, load_image, load_video
from sparsevlm.data.sample import IGNORE_INDEX, BadSampleError, Encoded, Sample
from sparsevlm.recipe.schema import Source, Stage
from sparsevlm.vision.tokens import Grid, ItemShape, MediaKind

PICTURE_TOKENS = 8
POLICY = VideoPolicy(fps=None, max_frames=4)


def _word(word: str) -> int:
    return zlib.crc32(word.encode()) % 10_000


def measure(sample: Sample, max_length: int | None = None) -> tuple[int, int]:
    visual = sum(count_frames(m, POLICY) if m.kind == MediaKind.VIDEO else PICTURE_TOKENS for m in sample.media())
    words = sum(len(message.text.split()) for message in sample.messages)
    if max_length is not None and visual >= max_length:
        raise BadSampleError("no target token")
    return min(words + visual, max_length or 10**9), visual


def encode(sample: Sample, max_length: int | None = None) -> Encoded:
    ids, labels = [], []
    pixels, items, lengths = [], [], []
    for message in sample.messages:
        for part in message.content:
            if isinstance(part, str):
                words = [_word(word) for word in part.split()]
                ids += words
                labels += words if message.role == "assistant" else [IGNORE_INDEX] * len(words)
                continue
            if part.kind == MediaKind.VIDEO:
                frames = load_video(part, POLICY)[0]
                length = len(frames)
            else:
                frames, length = [load_image(part)], PICTURE_TOKENS
            pixels += [torch.zeros(3, 2, 2) for _ in frames]
            items.append(ItemShape(Grid(len(frames), 1, 1), part.kind, len(items)))
            lengths.append(length)
            ids += [1] * length
            labels += [IGNORE_INDEX] * length
    return Encoded(
        torch.tensor(ids[:max_length]),
        torch.tensor(labels[:max_length]),
        torch.stack(pixels) if pixels else None,
        tuple(items),
        tuple(lengths),
        sample_id=f"{sample.source}/{sample.id}",
    )


def text_row(i: int, words: int = 4) -> dict:
    """A conversation of so many words; its answer names it."""
    asked = " ".join(["w"] * (words - 2))
    turns = [{"from": "human", "value": f"ask {asked}"}, {"from": "gpt", "value": f"answer{i}"}]
    return {"id": i, "conversations": turns}


def write_texts(path: Path, count: int, words=lambda i: 3 + i % 7) -> Source:
    path.write_text("\n".join(json.dumps(text_row(i, words(i))) for i in range(count)))
    return Source(path=str(path), format="llava")


def stage(data=("a",), **fields) -> Stage:
    batch = {"rows": 4, "max_length": 32, "workers": 0, **fields.pop("batch", {})}
    if "steps" not in fields:
        fields.setdefault("epochs", 1)
    given = data if isinstance(data, dict) else list(data)
    return Stage.model_validate({"trains": ["connector"], "data": given, "batch": batch, **fields})
