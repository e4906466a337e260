"""Scenes of several views, and subtitles, as rows name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsevlm.data.formats.llava import LlavaFormat
from sparsevlm.data.formats.messages import MessagesFormat
from sparsevlm.data.formats.vqa import VqaFormat
from sparsevlm.data.rows import RowContext
from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.vision.tokens import MediaKind
from tests.data.media_files import picture

POSE = [[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]]
TALK = [{"from": "human", "value": "<views>\nWhere is it?"}, {"from": "gpt", "value": "There."}]


@pytest.fixture
def context(tmp_path: Path) -> RowContext:
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    for name in ("film.mp4", "film.srt"):
        (tmp_path / name).write_bytes(b"x")
    return RowContext("source", 0, "0", "row 0", tmp_path)


def media(sample: Any) -> list[Media]:
    return list(sample.media())


def test_views_of_a_scene_are_one_medium(context: RowContext, tmp_path: Path) -> None:
    row = {"views": ["a.png", "b.png"], "poses": [POSE, POSE[:3]], "conversations": TALK}
    (scene,) = media(LlavaFormat().sample(row, context))
    assert scene.kind is MediaKind.MULTI_VIEW
    assert scene.source == (tmp_path / "a.png", tmp_path / "b.png")
    assert scene.meta["poses"] == tuple(tuple(map(tuple, pose)) for pose in (POSE, POSE[:3]))


def test_several_scenes_and_inline_parts(context: RowContext) -> None:
    turns = [{"from": "human", "value": "<views> or <views>?"}, {"from": "gpt", "value": "First."}]
    found = media(LlavaFormat().sample({"views": [["a.png"], ["a.png", "b.png"]], "conversations": turns}, context))
    assert [len(scene.source) for scene in found] == [1, 2] and found[0].meta == {}
    part = {"type": "views", "views": ["b.png", "a.png"], "poses": [POSE, POSE]}
    content = [part, {"type": "text", "text": "Where?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "There."}]
    (scene,) = media(MessagesFormat().sample({"messages": messages}, context))
    assert len(scene.source) == 2 and len(scene.meta["poses"]) == 2


def test_the_word_is_text_where_a_row_has_no_views(context: RowContext) -> None:
    sample = LlavaFormat().sample({"conversations": TALK}, context)
    assert not media(sample) and sample.messages[0].text.startswith("<views>")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"views": ["a.png", "../a.png"]}, "leaves the media root"),
        ({"views": ["a.png"], "poses": [POSE, POSE]}, "not a matrix for each of 1 views"),
        ({"views": ["a.png"], "poses": [[[1, 2], [3, 4]]]}, "not a 3 x 4 or 4 x 4 matrix"),
        ({"views": ["a.png"], "poses": [[[1, 0, 0, float("nan")], *POSE[1:]]]}, "not a 3 x 4 or 4 x 4 matrix"),
        ({"views": [[]]}, "not a list of pictures"),
        ({"views": [["a.png"], ["b.png"]]}, "1 <views> placeholders in the text for 2 media"),
    ],
)
def test_faulty_scenes_are_bad_samples(row: dict[str, Any], reason: str, context: RowContext) -> None:
    with pytest.raises(BadSampleError, match=reason):
        LlavaFormat().sample({**row, "conversations": TALK}, context)


def test_subtitles_belong_to_their_video_and_stay_in_the_media_root(context: RowContext, tmp_path: Path) -> None:
    row = {"video": "film.mp4", "subtitles": "film.srt", "question": "What?", "answer": "That."}
    (video,) = media(VqaFormat(image=None).sample(row, context))
    assert video.subtitles == tmp_path / "film.srt"
    (video,) = media(VqaFormat(image=None).sample(row | {"subtitles": None}, context))
    assert video.subtitles is None
    for value, reason in (
        ("../film.srt", "leaves the media root"),
        (["film.srt"] * 2, "2 'subtitles' for 1"),
        (3, "not a path"),
    ):
        with pytest.raises(BadSampleError, match=reason):
            VqaFormat(image=None).sample(row | {"subtitles": value}, context)
