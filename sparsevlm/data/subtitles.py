"""Subtitles: files of the usual kinds to cues, and cues to the frames that they belong to.

SubRip (.srt), WebVTT (.vtt), Advanced SubStation (.ass, .ssa) and the JSON of speech recognition (Whisper's
``segments``, whisper.cpp's ``transcription``, transformers' ``chunks``). What a file is follows from its content.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sparsevlm.data.sample import BadSampleError

MAX_BYTES = 64 << 20
"""Size from which on a file is not believed to hold subtitles."""


class Cue(NamedTuple):
    """What is said from second `start` to second `end`; `text` is one line without markup."""

    start: float
    end: float
    text: str


_STAMP = r"(?:(\d+)\s*:\s*)?(\d{1,2})\s*:\s*(\d{1,2})(?:\s*[.,:]\s*(\d{1,3}))?"
_TIMES = re.compile(rf"^\s*{_STAMP}\s*-+>\s*{_STAMP}(?:\s.*)?$")
_ASS_STAMP = re.compile(rf"^\s*{_STAMP}\s*$")
_ASS_COLUMNS = ["layer", "start", "end", "style", "name", "marginl", "marginr", "marginv", "effect", "text"]
_DRAWING = re.compile(r"\{[^{}]*\\p[1-9][^{}]*\}.*?(?:\{[^{}]*\\p0[^{}]*\}|$)", re.DOTALL)
_OVERRIDE = re.compile(r"\{[^{}]*\\[^{}]*\}")
_TAG = re.compile(r"</?[a-zA-Z0-9][^<>]*>")
_INVISIBLE = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060\ufeff\x00-\x08\x0b\x0c\x0e-\x1f]")


def read_subtitles(path: Path) -> list[Cue]:
    """Return the cues of a file, in the order in which they start.

    Raises:
        BadSampleError: Missing, too large, not UTF-8 or UTF-16 text, or as `parse_subtitles`.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadSampleError(f"subtitles {path.name}: larger than {MAX_BYTES >> 20} MiB")
        raw = path.read_bytes()
    except OSError as error:
        raise BadSampleError(f"subtitles {path.name}: {error.strerror}") from None
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadSampleError(
            f"subtitles {path.name}:{line}: neither UTF-8 nor UTF-16; which letters its bytes mean cannot be known, "
            "convert it to UTF-8"
        ) from None
    return parse_subtitles(text, path.name)


def parse_subtitles(text: str, name: str = "subtitles") -> list[Cue]:
    """Return the cues of a text, in the order in which they start; overlapping ones stay as they are.

    Forgiven: a byte order mark, missing blank lines, numbers and hours, comma or dot before fractions of seconds, cue
    settings, cues that end before they start (they then last no time), empty cues (left out). A text without anything
    in it has no cues.

    Raises:
        BadSampleError: A time that cannot be read (with its line), broken JSON, or no cue in a text that is not empty.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        return []
    head = text.lstrip()
    if head[0] in "{[" and not re.match(r"\[[a-zA-Z]|\{\\", head):  # neither a section of ass nor a mark-up
        found = list(_json(text, name))
    elif re.search(r"^\s*Dialogue\s*:", text, re.MULTILINE | re.IGNORECASE) or head.lower().startswith("[script info]"):
        found = list(_ass(text, name))
    else:
        found = list(_timed_lines(text, name))
        if not found and not head.startswith("WEBVTT"):
            raise BadSampleError(f"{name}: no cue: neither srt, vtt, ass nor the JSON of speech recognition")
    cues = [Cue(start, max(start, end), clean) for start, end, said in found if (clean := _clean(said))]
    return sorted(cues, key=lambda cue: cue.start)


def align_cues(
    cues: Sequence[Cue],
    times: Sequence[float],
    start: float = 0.0,
    rule: Literal["next", "last"] = "next",
) -> list[list[Cue]]:
    """Return the cues of each frame.

    Args:
        cues: In the order in which they start.
        times: Second of each frame, ascending.
        start: Where the clip starts; what is over by then is left out.
        rule: `next`: a cue belongs to the first frame at or after its start, so that what was said since one frame
            follows the next (MiniGPT4-Video); what starts after the last frame is left out. `last`: to the last frame
            before its end, the first frame where there is none (LLaMA-VID).
    """
    found: list[list[Cue]] = [[] for _ in times]
    for cue in cues:
        if cue.end < start:
            continue
        if rule == "next":
            at = next((i for i, time in enumerate(times) if time >= cue.start), None)
        else:
            after = next((i for i, time in enumerate(times) if time >= cue.end), len(times))
            at = max(0, after - 1) if cue.start <= times[-1] else None
        if at is not None:
            found[at].append(cue)
    return found


def budget_texts(aligned: Sequence[Sequence[Cue]], max_words: int | None = None, once: bool = True) -> list[str]:
    """Return what is said at each frame, as long as a budget of words lasts (MiniGPT4-Video).

    Each insertion counts one word more than it has, and the one that crosses the budget is still whole: both as in
    the original. Nothing follows it.

    Args:
        aligned: Cues of each frame.
        max_words: The budget; None: no limit.
        once: A text that was said before is left out, wherever it was.
    """
    texts, seen, words = [], set[str](), 0
    for cues in aligned:
        said = []
        for cue in cues:
            if not (once and cue.text in seen):
                said.append(cue.text)
            seen.add(cue.text)
        if not said or (max_words is not None and words >= max_words):
            texts.append("")
            continue
        texts.append(" ".join(said))
        words += len(texts[-1].split(" ")) + 1
    return texts


def _timed_lines(text: str, name: str) -> Iterator[tuple[float, float, str]]:
    """Yield cues of srt and vtt: a line of times, and the lines up to the next one."""
    lines = text.split("\n")
    blank_ends = lines[0].lstrip().startswith("WEBVTT")
    heads = []
    for number, line in enumerate(lines):
        if "->" not in line:
            continue
        found = _TIMES.match(line)
        if found is None:
            # an arrow inside what is said is text; one after a time is a time gone wrong
            if re.match(r"^\s*[\d:.,\s]*:[\d:.,\s]+-+>", line) or re.search(r"-+>\s*[\d.,\s]*:[\d:.,\s]+$", line):
                raise BadSampleError(f"{name}:{number + 1}: times that cannot be read: {line.strip()[:60]!r}")
            continue
        heads.append((number, _seconds(found.groups()[:4]), _seconds(found.groups()[4:])))
    for (number, start, end), (following, *_) in pairwise([*heads, (len(lines), 0.0, 0.0)]):
        body = lines[number + 1 : following]
        if following < len(lines) and body and re.fullmatch(r"\s*\d+\s*", body[-1]):
            body = body[:-1]  # number of the next cue
        if blank_ends:  # what follows a blank line is a name or a note
            body = body[: next((i for i, line in enumerate(body) if not line.strip()), len(body))]
        yield start, end, "\n".join(body)


def _ass(text: str, name: str) -> Iterator[tuple[float, float, str]]:
    columns = _ASS_COLUMNS
    events = False
    for number, line in enumerate(text.split("\n"), 1):
        key, colon, rest = line.strip().partition(":")
        if line.strip().startswith("["):
            events = line.strip().lower() == "[events]"
        elif colon and key.strip().lower() == "format" and events:
            columns = [column.strip().lower() for column in rest.split(",")]
            if not {"start", "end", "text"} <= set(columns) or columns[-1] != "text":
                raise BadSampleError(f"{name}:{number}: a format of events without start, end and text (last)")
        elif colon and key.strip().lower() == "dialogue":
            cells = dict(zip(columns, rest.split(",", len(columns) - 1)))
            start, end = (_ASS_STAMP.match(cells.get(key, "")) for key in ("start", "end"))
            if start is None or end is None or "text" not in cells:
                raise BadSampleError(f"{name}:{number}: times that cannot be read: {line.strip()[:60]!r}")
            said = _DRAWING.sub("", cells["text"])
            said = re.sub(r"\\[Nnh]", " ", _OVERRIDE.sub("", said))
            yield _seconds(start.groups()), _seconds(end.groups()), said


def _json(text: str, name: str) -> Iterator[tuple[float, float, str]]:
    try:
        root = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{name}:{getattr(error, 'lineno', 1)}: broken JSON: {error}") from None
    segments = root
    if isinstance(root, dict):
        segments = next((root[key] for key in ("segments", "transcription", "chunks") if key in root), None)
    if not isinstance(segments, list):
        raise BadSampleError(f"{name}: JSON without a list of segments (segments, transcription or chunks)")
    for number, segment in enumerate(segments):
        times = _segment_times(segment) if isinstance(segment, dict) else None
        said = segment.get("text") if isinstance(segment, dict) else None
        if times is None or not isinstance(said, str):
            raise BadSampleError(f"{name}: segment {number} without start, end and text: {str(segment)[:60]}")
        yield *times, said


def _segment_times(segment: dict[str, Any]) -> tuple[float, float] | None:
    start, end, scale = segment.get("start"), segment.get("end"), 1.0
    if isinstance(stamps := segment.get("timestamp"), list) and len(stamps) == 2:
        start, end = stamps
        end = start if end is None else end  # the recording ended within the segment
    elif isinstance(offsets := segment.get("offsets"), dict):
        start, end, scale = offsets.get("from"), offsets.get("to"), 1000.0
    for value in (start, end):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            return None
    assert start is not None and end is not None
    return start / scale, end / scale


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = parts
    whole = int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)
    return whole + float(f"0.{fraction or 0}")


def _clean(said: str) -> str:
    said = html.unescape(_TAG.sub("", _OVERRIDE.sub("", said)))
    return " ".join(_INVISIBLE.sub("", said).split())
