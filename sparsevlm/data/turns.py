"""Turns of a conversation, in the spellings that are about: ``role``/``content`` and ``from``/``value``."""

from __future__ import annotations

from typing import Any

from sparsevlm.data.columns import check_text, scene_media, with_subtitles
from sparsevlm.data.placeholders import Placeholders
from sparsevlm.data.rows import RowContext, shown
from sparsevlm.data.sample import BadSampleError, Media, Message, Role
from sparsevlm.vision.tokens import MediaKind

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def read_turns(turns: Any, media: Placeholders, context: RowContext) -> list[Message]:
    """Return a conversation.

    Args:
        turns: ``[{"role", "content"}]`` or ``[{"from", "value"}]``.
        media: The media that the row lists.
        context: Which row it is.

    Raises:
        BadSampleError: The turns are malformed, there is nothing that the assistant says, or it is given media.
    """
    if not isinstance(turns, list) or not turns:
        raise BadSampleError(f"the conversation is {shown(turns)}, not a list of turns")
    messages = [_read_turn(turn, number, media, context) for number, turn in enumerate(turns)]
    if all(message.role != "assistant" for message in messages):
        raise BadSampleError("no turn of the assistant")
    return messages


def _read_turn(turn: Any, number: int, media: Placeholders, context: RowContext) -> Message:
    if not isinstance(turn, dict):
        raise BadSampleError(f"turn {number} is {shown(turn)}, not an object")
    name = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadSampleError(f"turn {number} has the role {shown(name)} (known: {', '.join(ROLES)})")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    parts: list[str | Media] = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict):
            parts += _read_part(part, number, media, context)
        else:
            parts += media.split(_text(part, number))
    if role == "assistant" and any(isinstance(part, Media) for part in parts):
        raise BadSampleError(f"turn {number}: media in a turn of the assistant")
    if role != "system" and not any(isinstance(part, Media) or part.strip() for part in parts):
        raise BadSampleError(f"turn {number} is empty")
    return Message(role, tuple(parts))


def _read_part(part: dict[str, Any], number: int, media: Placeholders, context: RowContext) -> list[str | Media]:
    kind = part.get("type")
    kind = kind if isinstance(kind, str) else shown(kind)
    if kind == "text":
        return media.split(_text(part.get("text"), number))
    if kind in ("views", "multi_view"):
        views = part.get("views")
        return [media.take(MediaKind.MULTI_VIEW) if views is None else scene_media(views, part.get("poses"), context)]
    base = kind.removesuffix("_url")
    if base not in ("image", "video"):
        raise BadSampleError(f"turn {number} has a part of type {kind} (known: text, image, image_url, video, views)")
    value = next((part[key] for key in (kind, base, "path", "url") if part.get(key) is not None), None)
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    media_kind = MediaKind(base)
    if value is None:
        return [media.take(media_kind)]
    given = context.media(media_kind, value)
    return [with_subtitles(given, part.get("subtitles"), context) if base == "video" else given]


def _text(value: Any, number: int) -> str:
    """Return a text as it is; its ends are not trimmed, since parts are read one after the other."""
    return check_text(value, f"turn {number}")
