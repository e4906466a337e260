"""Text between frames, budgets of tokens, scenes of several views: the processor counts what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.data.video import VideoPolicy
from sparsevlm.model.build import build_model
from sparsevlm.vision.tokens import MediaKind
from tests import tiny
from tests.data.media_files import picture, write_video

SRT = """1
00:00:00,100 --> 00:00:00,400
a red cat

2
00:00:00,500 --> 00:00:00,900
<image> <video> </s> dog

3
00:00:01,000 --> 00:00:01,900
never seen : after the last frame
"""
CONCAT = [{"type": "concat", "number": 4}, {"type": "linear"}]


def build(parts: dict[str, str], video: dict[str, Any], connector: Any = CONCAT) -> Any:
    return build_model(tiny.recipe_model(parts, connector=connector, video=video))


def question(media: Media, text: str = "what is it ?") -> Sample:
    return Sample((Message("user", (media, text)), Message("assistant", ("a cat",))))


@pytest.fixture
def film(tmp_path: Path) -> Media:
    """Two seconds at 10 frames a second, and what is said in them."""
    (tmp_path / "film.srt").write_text(SRT)
    return Media(MediaKind.VIDEO, write_video(tmp_path / "film.mp4", 20), subtitles=tmp_path / "film.srt")


MINIGPT4_VIDEO = {
    "fps": None,
    "max_frames": 4,
    "thinning": "stride",
    "frame_text": "picture ",
    "subtitles": {"text": "video {text} ", "max_words": 400},
}


def test_subtitles_stand_behind_their_frames(tiny_parts: dict[str, str], film: Media) -> None:
    model, processor = build(tiny_parts, MINIGPT4_VIDEO)
    encoded = processor.encode(question(film))
    assert (encoded.length, encoded.num_visual_tokens) == processor.measure(question(film))
    assert encoded.visual_lengths == (16,)  # 4 frames of 4 x 4 patches, 4 of which become one token
    tokenizer = processor.tokenizer
    # frames 0, 5, 10, 15 are at 0, 0.5, 1 and 1.5 s
    text = tokenizer.decode(encoded.input_ids).replace(" ", "")
    frames = text.split("picture")[1:]
    visual = "<video>" * 4
    assert frames[0] == visual
    assert frames[1].startswith(visual + "videoaredcat")
    # what people say never becomes a placeholder or an end of turn
    assert int((encoded.input_ids == processor.video_token_id).sum()) == 16
    assert processor.image_token_id not in encoded.input_ids.tolist()
    assert (encoded.labels[: encoded.length - 4] == -100).all()
    batch = processor.encode_prompts([question(film)])
    logits = model.eval()(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape


def test_times_of_frames(tiny_parts: dict[str, str], film: Media) -> None:
    _, processor = build(tiny_parts, {"fps": 2.0, "frame_text": "{index} : {time:.1f} "})
    texts = processor.video_text.texts(film, processor.video_policy)
    assert [processor.tokenizer.decode(before) for before, _ in texts] == [
        processor.tokenizer.decode(processor.tokenizer(f"{i + 1} : {i / 2:.1f} ")["input_ids"]) for i in range(4)
    ]
    clip = Media(MediaKind.VIDEO, film.source, start=1.0)
    assert processor.measure(question(clip))[0] == processor.encode(question(clip)).length


def test_text_needs_frames_that_stay_apart(tiny_parts: dict[str, str]) -> None:
    blocks = [{"type": "dpc_knn", "clusters": [4, 2], "neighbours": [2, 2]}, {"type": "linear"}]
    with pytest.raises(ValueError, match="3 frames leave the connector as"):
        build(tiny_parts, {"frame_text": "x"}, blocks)


def test_interleaved_visual_tokens_reach_their_places(tiny_parts: dict[str, str], film: Media) -> None:
    """The text between frames changes no feature, and each frame's tokens follow its text."""
    torch.manual_seed(0)
    model, processor = build(tiny_parts, MINIGPT4_VIDEO)
    plain = build(tiny_parts, {"fps": None, "max_frames": 4, "thinning": "stride"})[1]
    one, other = (p.encode_prompts([question(film)]) for p in (processor, plain))
    torch.testing.assert_close(one["pixel_values"], other["pixel_values"], rtol=0, atol=0)
    embeds = model.get_input_embeddings()(one["input_ids"])
    from sparsevlm.model.visual import read_items

    items = read_items(one["image_grid_thw"], one["media_kinds"], one["media_owners"], None)
    tokens = model.eval().model.encode_media(one["pixel_values"], *items)
    written = model.model.write_media(one["input_ids"], embeds, tokens)[0]
    at = (one["input_ids"][0] == processor.video_token_id).nonzero()[:, 0]
    torch.testing.assert_close(written[at], tokens.features, rtol=0, atol=0)
    gaps = (at[1:] - at[:-1] > 1).nonzero()[:, 0] + 1
    assert gaps.tolist() == [4, 8, 12]


@pytest.mark.parametrize(("budget", "frames"), [(64, 16), (63, 15), (8, 2), (4, 1)])
def test_budget_of_tokens_limits_frames(tiny_parts: dict[str, str], budget: int, frames: int) -> None:
    _, processor = build(tiny_parts, {"fps": None, "max_frames": 16, "max_tokens": budget})
    assert processor.video_policy.max_frames == frames
    clip = Media(MediaKind.VIDEO, [np.zeros((8, 8, 3), np.uint8)] * 40, fps=10.0)
    assert processor.encode(question(clip)).num_visual_tokens == frames * 4 <= budget
    assert processor.count_visual(MediaKind.VIDEO, 1000) == frames * 4


def test_a_budget_below_the_fewest_frames_is_refused(tiny_parts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="max_tokens is 7, but 2 frames are 8"):
        build(tiny_parts, {"min_frames": 2, "max_tokens": 7})


def test_thinning_rules() -> None:
    from sparsevlm.data.video import sample_frame_indices

    for total in range(1, 60):
        for count in range(2, 20):
            floor = sample_frame_indices(total, 1, VideoPolicy(None, 1, count, "floor"))
            wanted = sorted({int(x) for x in np.linspace(0, total - 1, min(count, total))})
            assert len(floor) == min(count, total)
            # linspace in floats is below a whole number now and then; ours is exact
            assert all(a - b in (0, 1) for a, b in zip(floor, wanted, strict=False))
            step = max(1, total // count)
            stride = sample_frame_indices(total, 1, VideoPolicy(None, 1, count, "stride"))
            assert stride == list(range(0, total, step))[:count]
    with pytest.raises(ValueError, match="thinning 'odd' is none of even, floor, stride"):
        VideoPolicy(thinning="odd")  # type: ignore[arg-type]


def test_views_are_one_medium(tiny_parts: dict[str, str], tmp_path: Path) -> None:
    model, processor = build(tiny_parts, {})
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        picture(i, (20 + i, 30)).save(paths[-1])
    scene = question(Media(MediaKind.MULTI_VIEW, tuple(paths)))
    encoded = processor.encode(scene)
    assert [item.kind for item in encoded.items] == [MediaKind.MULTI_VIEW]
    assert encoded.grids[0].t == 3 and encoded.visual_lengths == (12,)
    assert processor.count_visual(MediaKind.MULTI_VIEW, 3) == 12
    assert (encoded.length, 12) == processor.measure(scene)
    out = model.eval().generate(
        **processor.encode_prompts([scene]), max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0
    )
    assert out.shape[1] > 2


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("frame_text", "{tiem}", "cannot be filled in"),
        ("frame_text", "{", "cannot be filled in"),
        ("subtitles", {"text": "no place"}, "must hold"),
        ("thinning", "odd", "'even', 'floor' or 'stride'"),
    ],
)
def test_faulty_options_are_named(tiny_parts: dict[str, str], field: str, value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tiny.recipe_model(tiny_parts, video={field: value})
