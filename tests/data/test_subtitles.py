"""Subtitles: what files really hold, and the frames that cues belong to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.data.sample import BadSampleError
from sparsevlm.data.subtitles import Cue, align_cues, budget_texts, parse_subtitles, read_subtitles

WANTED = [Cue(1.0, 2.5, "Hello, & welcome"), Cue(2.0, 4.0, "two lines"), Cue(3661.25, 3662.0, "7 < 8")]

SRT = """1
00:00:01,000 --> 00:00:02,500
{\\an8}<i>Hello,</i> &amp; welcome

2
00:00:02,000 --> 00:00:04,000 X1:40 X2:600 Y1:20 Y2:50
<font color="#ff0000">two</font>
lines

3
01:01:01,250 --> 01:01:02,000
7 < 8
"""

VTT = """WEBVTT Kind: captions

STYLE
::cue { color: red }

NOTE a remark
over two lines

intro
00:01.000 --> 00:02.500 align:start position:0%
<v Roger><c.loud>Hello,</c></v> &amp; welcome

00:00:02.000 --> 00:00:04.000
two<00:00:03.000> lines

01:01:01.250 --> 01:01:02.000
7 &lt; 8
"""

ASS = """[Script Info]
Title: a film

[V4+ Styles]
Format: Name, Fontname
Style: Default,Arial

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,1:01:01.25,1:01:02.00,Default,,0,0,0,,7 < 8
Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\i1}Hello,{\\i0} & welcome
Comment: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,not said
Dialogue: 0,0:00:02.00,0:00:04.00,Default,,0,0,0,,two\\Nlines
Dialogue: 0,0:00:05.00,0:00:06.00,Default,,0,0,0,,{\\p1}m 0 0 l 9 9{\\p0}
"""

SEGMENTS = [{"start": cue.start, "end": cue.end, "text": f" {cue.text}"} for cue in WANTED]
OFFSETS = [{"offsets": {"from": c.start * 1000, "to": c.end * 1000}, "text": c.text} for c in WANTED]
CHUNKS = [{"timestamp": [c.start, c.end], "text": c.text} for c in WANTED]
FILES = {
    "srt": SRT,
    "vtt": VTT,
    "ass": ASS,
    "whisper": json.dumps({"text": "all", "segments": SEGMENTS, "language": "en"}),
    "whisper_list": json.dumps(SEGMENTS),
    "whisper_cpp": json.dumps({"transcription": OFFSETS}),
    "transformers": json.dumps({"chunks": CHUNKS}),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_gives_the_same_cues(kind: str) -> None:
    assert parse_subtitles(FILES[kind]) == WANTED


@pytest.mark.parametrize("kind", ["srt", "vtt", "ass"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
@pytest.mark.parametrize("ends", ["\r\n", "\n", "\r"])
def test_marks_and_line_ends_do_not_matter(kind: str, encoding: str, ends: str, tmp_path: Path) -> None:
    file = tmp_path / "film"
    file.write_bytes(FILES[kind].replace("\n", ends).encode(encoding))
    assert read_subtitles(file) == WANTED


def test_forgives_what_srt_files_hold() -> None:
    text = "1\n0:0:1.5 --> 0:0:2,5\none\n2\n00:00:03:500 -> 00:00:03\nends before it starts\n\n" + (
        "3\n00:00:04,0-->00:00:05,0\n\nafter a blank line\n\n4\n00:00:06,000 --> 00:00:07,000\n\n"
    )
    assert parse_subtitles(text) == [
        Cue(1.5, 2.5, "one"),
        Cue(3.5, 3.5, "ends before it starts"),
        Cue(4.0, 5.0, "after a blank line"),
    ]


def test_nothing_said_is_no_fault() -> None:
    assert parse_subtitles("") == parse_subtitles("\n \n") == parse_subtitles("WEBVTT\n") == []
    assert parse_subtitles('{"segments": []}') == []


def test_last_chunk_without_an_end() -> None:
    assert parse_subtitles('{"chunks": [{"timestamp": [3.0, null], "text": "a"}]}') == [Cue(3.0, 3.0, "a")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1\n00:00:01,000 --> 00:00:xx,000\na", "f:2: times"),
        ("1\n00:00:01,000 --> 00:00:02,000\na\n\n00:00:0x --> 00:00:05,000\nb", "f:5: times"),
        ("a poem\nwithout times", "no cue"),
        ('{"segments": [{"start": 1, "end": "x", "text": "a"}]}', "segment 0"),
        ('{"segments": [{"start": NaN, "end": 1, "text": "a"}]}', "segment 0"),
        ('{"segments": [1]}', "segment 0"),
        ('{"words": []}', "list of segments"),
        ('{"segments": [', "f:1: broken JSON"),
        ("[Events]\nFormat: Start, Text, End\nDialogue: 1,2,3", "f:2: a format"),
        ("[Script Info]\n[Events]\nDialogue: 0,0:00:aa,0:00:02.50,Default,,0,0,0,,a", "f:3: times"),
    ],
)
def test_hopeless_files_are_refused_with_their_line(text: str, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        parse_subtitles(text, "f")


def test_unreadable_files_are_bad_samples(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(SRT.replace("Hello", "Héllo").encode("latin-1"))
    with pytest.raises(BadSampleError, match="latin:3: neither UTF-8"):
        read_subtitles(tmp_path / "latin")
    with pytest.raises(BadSampleError, match="No such file"):
        read_subtitles(tmp_path / "none.srt")


@given(st.text(max_size=300) | st.text(alphabet='0123456789:,.->\n {}[]"aWEBVTTDialogue', max_size=300))
def test_any_text_gives_cues_or_a_bad_sample(text: str) -> None:
    try:
        cues = parse_subtitles(text)
    except BadSampleError:
        return
    assert all(cue.text.strip() and 0 <= cue.start <= cue.end and "\n" not in cue.text for cue in cues)
    assert cues == sorted(cues, key=lambda cue: cue.start)


def published(cues: list[Cue], frames: int, fps: int, wanted: int, budget: int) -> tuple[list[int], list[str]]:
    """MiniGPT4-Video's loop over all frames (inference), with whole cues and times ``frame / fps``."""
    interval = max(1, frames // wanted)
    history, waiting, words = set(), "", 0
    taken, texts = [], []
    for frame in range(frames):
        for cue in cues:
            if cue.start <= frame / fps <= cue.end and cue.text not in history:
                waiting += cue.text + " "
                history.add(cue.text)
        if frame % interval == 0:
            taken.append(frame)
            texts.append("")
            if waiting and words < budget:
                texts[-1] = waiting.strip()
                words += len(waiting.split(" "))
                waiting = ""
        if len(taken) >= wanted:
            break
    return taken, texts


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60), st.integers(0, 6), st.integers(1, 4)), max_size=20),
    st.integers(1, 300),
    st.integers(1, 12),
    st.integers(1, 30),
)
def test_alignment_is_minigpt4_videos(
    spoken: list[tuple[int, int, int, int]], frames: int, wanted: int, budget: int
) -> None:
    """Against a loop over every frame. Cues start and end on frames: between two, no frame ever sees them."""
    from sparsevlm.data.video import VideoPolicy, sample_frame_indices

    fps = 10
    said = [Cue(a / fps, (a + n) / fps, " ".join([f"w{word}"] * length)) for a, n, word, length in spoken]
    cues = sorted(said, key=lambda cue: cue.start)
    indices = sample_frame_indices(frames, fps, VideoPolicy(None, 1, wanted, "stride"))
    taken, texts = published(cues, frames, fps, wanted, budget)
    assert indices == taken
    aligned = align_cues(cues, [i / fps for i in indices])
    assert budget_texts(aligned, budget) == texts


def test_last_rule_takes_the_last_frame_before_the_end() -> None:
    cues = [Cue(0.0, 0.5, "a"), Cue(0.2, 2.0, "b"), Cue(2.5, 9.0, "c"), Cue(5.0, 6.0, "d")]
    aligned = align_cues(cues, [0.0, 1.0, 2.0, 3.0], rule="last")
    assert [[cue.text for cue in frame] for frame in aligned] == [["a"], ["b"], [], ["c"]]


def test_clips_leave_out_what_is_over() -> None:
    cues = [Cue(0.0, 3.0, "over"), Cue(3.0, 5.0, "still said"), Cue(8.0, 9.0, "later")]
    aligned = align_cues(cues, [4.0, 6.0], start=4.0)
    assert [[cue.text for cue in frame] for frame in aligned] == [["still said"], []]


def test_repeated_texts() -> None:
    aligned = [[Cue(0, 1, "yes")], [Cue(1, 2, "yes"), Cue(1, 2, "no")], []]
    assert budget_texts(aligned) == ["yes", "no", ""]
    assert budget_texts(aligned, once=False) == ["yes", "yes no", ""]
    assert budget_texts(aligned, max_words=2) == ["yes", "", ""]
    assert budget_texts(aligned, max_words=3) == ["yes", "no", ""]
