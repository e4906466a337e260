"""Rows become the conversations they mean; whatever else a row holds, only BadSampleError leaves a format."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsevlm.data.rows import RowContext
from sparsevlm.data.sample import BadSampleError, Media, Message, Sample
from sparsevlm.registry import DATA_FORMATS
from sparsevlm.vision.tokens import MediaKind

FILES = ("a.png", "b.png", "v.mp4", "w.mp4")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    for name in FILES:
        (root / name).write_bytes(b"x")
    return RowContext("mine", 3, id="3", where="a.json:row 3", media_root=root)


def turns(sample: Sample) -> list[tuple]:
    """Roles and contents, media written as their file names."""
    return [
        (m.role, *(part if isinstance(part, str) else f"[{part.kind}:{part.source.name}]" for part in m.content))
        for m in sample.messages
    ]


def read(name: str, row, context, **options) -> Sample:
    return DATA_FORMATS.get(name)(**options).sample(row, context)


def llava(*values: str, **columns) -> dict:
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)], **columns}


# --- llava ----------------------------------------------------------------------------------------------------------


def test_llava(context):
    row = llava("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", image="a.png")
    sample = read("llava", row, context)
    assert turns(sample) == [
        ("user", "[image:a.png]", "\nWhat is it?"),
        ("assistant", "A cat."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    ]
    assert (sample.id, sample.source, sample.where) == ("3", "mine", "a.json:row 3")
    assert turns(read("llava", llava("Hello", "Hi"), context)) == [("user", "Hello"), ("assistant", "Hi")]


def test_llava_with_several_media_in_reading_order(context):
    row = llava(
        "<image> or <image>?<video>", "x", "And <video>", "y", image=["b.png", "a.png"], video=["w.mp4", "v.mp4"]
    )
    assert turns(read("llava", row, context)) == [
        ("user", "[image:b.png]", " or ", "[image:a.png]", "?", "[video:w.mp4]"),
        ("assistant", "x"),
        ("user", "And ", "[video:v.mp4]"),
        ("assistant", "y"),
    ]


def test_llava_collections_that_write_image_for_videos(context):
    row = llava("<image><image>\nWhat happens?", "It falls.", image="a.png", video="v.mp4")
    got = read("llava", row, context, video_token="<image>")
    assert turns(got)[0] == ("user", "[image:a.png]", "[video:v.mp4]", "\nWhat happens?")


def test_llava_clips_and_renamed_columns(context):
    row = {"chat": llava("<video>", "x")["conversations"], "clip": "v.mp4", "from": 1.5, "to": 4}
    got = read("llava", row, context, conversations="chat", video="clip", start="from", end="to")
    (media,) = got.media()
    assert (media.start, media.end) == (1.5, 4.0)
    with pytest.raises(BadSampleError, match="'from' is 'x', not a second"):
        read("llava", {**row, "from": "x"}, context, conversations="chat", video="clip", start="from")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (llava("<image>", "x"), "1 <image> placeholders in the text for 0 media"),
        (llava("no", "x", image="a.png"), "0 <image> placeholders in the text for 1 media"),
        (llava("<image><image><image>", "x", image=["a.png", "b.png"]), "3 <image> placeholders .* for 2 media"),
        (llava("<image>", "x", video="v.mp4"), "1 <image> placeholders in the text for 0 media"),
        (llava("<image>", "see <image>", image=["a.png", "b.png"]), "turn 1: media in a turn of the assistant"),
        (llava("<image>", "x", image="gone.png"), "missing file 'gone.png'"),
        (llava("<image>", "x", image="../a.png"), "leaves the media root"),
        (llava("Hello"), "no turn of the assistant"),
        (llava("Hello", ""), "turn 1 is empty"),
        (llava("Hello", " \n"), "turn 1 is empty"),
        (llava("Hello", "half \ud800"), "half a surrogate pair"),
        (llava("Hello", None), "turn 1' is None, not a text"),
        ({"conversations": []}, "not a list of turns"),
        ({"conversations": "Hello"}, "not a list of turns"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "role 'narrator'"),
        ({"conversations": ["x"]}, "turn 0 is 'x', not an object"),
        ({"image": "a.png"}, "no column 'conversations'"),
        (["x"], "not an object"),
        (None, "not an object"),
    ],
)
def test_llava_rows_that_cannot_be_used(row, reason, context):
    with pytest.raises(BadSampleError, match=reason):
        read("llava", row, context)


# --- messages -------------------------------------------------------------------------------------------------------


def message(*parts, reply="ok", **columns) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": reply}], **columns}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png", "url": None},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)
def test_messages_name_pictures_in_many_ways(part, context):
    row = message(text("Look: "), part, text(" What?"))
    assert turns(read("messages", row, context)) == [
        ("user", "Look: ", "[image:a.png]", " What?"),
        ("assistant", "ok"),
    ]


def test_messages_take_from_the_rows_lists(context):
    row = message({"type": "video"}, text("<image>?"), {"type": "image"}, images=["a.png", "b.png"], videos="v.mp4")
    assert turns(read("messages", row, context))[0] == (
        "user", "[video:v.mp4]", "[image:a.png]", "?", "[image:b.png]",
    )  # fmt: skip
    arrow = {"type": "image", "text": None, "image": None}  # Arrow gives every part every key
    assert turns(read("messages", message(arrow, {**text("x"), "image": None}, images=["a.png"]), context))[0] == (
        "user", "[image:a.png]", "x",
    )  # fmt: skip


def test_messages_with_plain_texts_system_and_sharegpt(context):
    row = {"messages": [{"role": "system", "content": "Be brief."}, *message(text("Hi"))["messages"]]}
    assert turns(read("messages", row, context)) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "ok"),
    ]
    sharegpt = {
        "conversations": [
            {"from": "system", "value": ""},
            {"from": "human", "value": "<image>Hi"},
            {"from": "gpt", "value": "ok"},
        ],
        "images": ["b.png"],
    }
    assert turns(read("messages", sharegpt, context))[1] == ("user", "[image:b.png]", "Hi")
    videos = message({"type": "video_url", "video_url": {"url": "v.mp4"}}, {"type": "video", "video": "w.mp4"})
    assert turns(read("messages", videos, context))[0] == ("user", "[video:v.mp4]", "[video:w.mp4]")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (message({"type": "image"}), "1 <image> placeholders in the text for 0 media"),
        (message(text("x"), images=["a.png", "b.png"]), "0 <image> placeholders in the text for 2 media"),
        (message({"type": "audio", "audio": "a.wav"}), "part of type audio"),
        (message({"text": "x"}), "part of type None"),
        (message({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}), "nothing is downloaded"),
        (message({"type": "image", "image": 3}), "image is 3"),
        (message(text("")), "turn 0 is empty"),
        (message(7), "not a text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"messages": [{"content": "x"}]}, "role None"),
        ({}, "no column 'messages'"),
    ],
)
def test_messages_that_cannot_be_used(row, reason, context):
    with pytest.raises(BadSampleError, match=reason):
        read("messages", row, context)


# --- caption --------------------------------------------------------------------------------------------------------


def test_captions(context):
    assert turns(read("caption", {"image": "a.png", "text": " A cat. "}, context)) == [
        ("user", "[image:a.png]"),
        ("assistant", "A cat."),
    ]
    got = read("caption", {"video": "v.mp4", "caption": "It falls."}, context, prompt="What happens?")
    assert turns(got)[0] == ("user", "[video:v.mp4]", "\nWhat happens?")
    renamed = read("caption", {"img": ["a.png", "b.png"], "de": "Eine Katze."}, context, image="img", text="de")
    assert turns(renamed)[0] == ("user", "[image:a.png]", "[image:b.png]")


def test_one_of_several_captions_and_prompts_is_chosen_by_id():
    def drawn(i):
        context = RowContext("s", i, id=str(i))
        sample = read("caption", {"image": b"x", "text": ["a", "b", "c"]}, context, prompt=["p", "q"])
        return sample.messages[0].text.strip(), sample.messages[1].text

    picks = [drawn(i) for i in range(300)]
    assert picks == [drawn(i) for i in range(300)]
    counts = {pair: picks.count(pair) for pair in set(picks)}
    assert len(counts) == 6 and min(counts.values()) > 25


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "neither 'image' nor 'video'"),
        ({"image": "a.png"}, "no column 'text'"),
        ({"image": "a.png", "text": []}, "no column 'text'"),
        ({"image": "a.png", "text": "  "}, "'text' is empty"),
        ({"image": "a.png", "caption": 4}, "'caption' is 4, not a text"),
    ],
)
def test_captions_that_cannot_be_used(row, reason, context):
    with pytest.raises(BadSampleError, match=reason):
        read("caption", row, context)


# --- vqa ------------------------------------------------------------------------------------------------------------


def test_questions(context):
    row = {"image": "a.png", "question": "What is it?", "answer": "cat"}
    assert turns(read("vqa", row, context)) == [("user", "[image:a.png]", "\nWhat is it?"), ("assistant", "cat")]
    asked = read("vqa", row, context, template="Q: {question}", prompt="One word.")
    assert turns(asked)[0][2] == "\nQ: What is it?\nOne word."
    braces = {**row, "question": "What does {choices} print?"}
    assert turns(read("vqa", braces, context))[0][2] == "\nWhat does {choices} print?"


def test_several_answers_vote_and_the_earliest_of_equals_wins(context):
    row = {"image": "a.png", "question": "?"}
    votes = [{"answer": "kitten", "id": 1}, {"answer": "cat"}, {"answer": "cat"}]
    assert read("vqa", {**row, "answers": votes}, context).messages[1].text == "cat"
    assert read("vqa", {**row, "answers": ["b", "a", "a", "b"]}, context).messages[1].text == "b"
    assert read("vqa", {**row, "answer": 3}, context).messages[1].text == "3"
    assert read("vqa", {**row, "answers": ["x", "y"]}, context).meta["answers"] == ["x", "y"]


@pytest.mark.parametrize("answer", ["dog", "B", "b", 1])
def test_choices_are_lettered(answer, context):
    row = {"image": "a.png", "question": "Which?", "choices": ["cat", "dog"], "answer": answer}
    got = turns(read("vqa", row, context))
    assert got[0][2] == (
        "\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )  # fmt: skip
    assert got[1] == ("assistant", "B")


def test_questions_without_a_picture_must_say_so(context):
    row = {"question": "2+2?", "answer": "4"}
    assert turns(read("vqa", {**row, "image": None}, context)) == [("user", "2+2?"), ("assistant", "4")]
    assert turns(read("vqa", row, context, image=None, video=None))[0] == ("user", "2+2?")
    with pytest.raises(BadSampleError, match="neither 'image' nor 'video'"):
        read("vqa", row, context)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"question": None}, "'question' is None"),
        ({"answer": None}, "no column 'answer'"),
        ({"answer": []}, "no column 'answer'"),
        ({"answer": True}, "'answer' is True"),
        ({"answer": "C", "choices": ["a", "b"]}, "'C' is none of the choices"),
        ({"answer": 2, "choices": ["a", "b"]}, "2 is none of the choices"),
        ({"answer": 0, "choices": [str(i) for i in range(30)]}, "30 choices, at most 26"),
    ],
)
def test_questions_that_cannot_be_used(columns, reason, context):
    with pytest.raises(BadSampleError, match=reason):
        read("vqa", {"image": "a.png", "question": "What?", "answer": "x", **columns}, context)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vqa", {"template": "no"}, "no {question}"),
        ("vqa", {"prompt": 3}, "prompt is a text"),
        ("caption", {"prompt": [3]}, "prompt is a text or a list"),
        ("interleaved", {"max_images": 0}, "a number of pictures from 1 on"),
        ("interleaved", {"min_similarity": "high"}, "min_similarity is a number"),
    ],
)
def test_options_that_cannot_be(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        DATA_FORMATS.get(name)(**options)


# --- interleaved ----------------------------------------------------------------------------------------------------

A, B = "[image:a.png]", "[image:b.png]"
IN_TURN = {"texts": ["Pets.", "All.", None, " A cat.", "It sleeps.", None, "A dog."],
           "images": [None, None, "a.png", None, None, "b.png", None]}  # fmt: skip
MATCHED = {
    "text_list": ["Pets.", "A cat.", "It sleeps.", "A dog."],
    "image_info": [
        {"image_name": "b.png", "matched_text_index": 3, "matched_sim": 0.2},
        {"image_name": "a.png", "matched_text_index": 1, "matched_sim": 0.3},
    ],
}
WRITTEN = {"text": "Pets. <image>A cat. It sleeps.\n<image>A dog.", "images": ["a.png", "b.png"]}


@pytest.mark.parametrize(("row", "lead"), [(IN_TURN, "Pets. All."), (MATCHED, "Pets."), (WRITTEN, "Pets.")])
def test_interleaved_spellings(context, row, lead):
    assert turns(read("interleaved", row, context)) == [
        ("user", lead, A),
        ("assistant", "A cat. It sleeps."),
        ("user", B),
        ("assistant", "A dog."),
    ]


def test_interleaved_limits(context):
    assert turns(read("interleaved", IN_TURN, context, max_images=1)) == [
        ("user", "Pets. All.", A),
        ("assistant", "A cat. It sleeps."),
    ]
    assert turns(read("interleaved", MATCHED, context, min_similarity=0.24, glue="\n")) == [
        ("user", "Pets.", A),
        ("assistant", "A cat.\nIt sleeps.\nA dog."),
    ]


def test_interleaved_pictures_in_a_row_and_at_the_end(context):
    row = {"text": "<image><image>Two.<image> ", "images": ["a.png", "b.png", "a.png"]}
    assert turns(read("interleaved", row, context)) == [("user", A, B), ("assistant", "Two.")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "neither a text nor a list"),
        ({"text": "Only text."}, "without a picture"),
        ({"text": "Text. <image>", "images": ["a.png"]}, "no text behind a picture"),
        ({"text": "<image> x", "images": []}, "1 <image> placeholders"),
        ({"texts": ["x", None], "images": ["a.png"]}, "not a list of 2 entries"),
        ({"texts": ["x"], "images": ["a.png"]}, "both a text and a picture"),
        ({"texts": [None], "images": [None]}, "place 0 has nothing"),
        ({"text_list": ["x"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]}, "one of 1 texts"),
        ({"text_list": ["x"], "image_info": 3}, "not a list"),
    ],
)
def test_interleaved_rows_that_cannot_be_used(context, row, reason):
    with pytest.raises(BadSampleError, match=reason):
        read("interleaved", row, context)


# --- any format -----------------------------------------------------------------------------------------------------

ours = [name for name in DATA_FORMATS.names() if name != "scenes"]


@pytest.mark.parametrize("name", DATA_FORMATS.names())
def test_an_unknown_option_lists_the_known(name):
    known = DATA_FORMATS.get(name).defaults
    with pytest.raises(ValueError, match="unknown option 'nonsense'") as error:
        DATA_FORMATS.get(name)(nonsense=1)
    assert all(option in str(error.value) for option in known)


@pytest.mark.parametrize("name", DATA_FORMATS.names())
def test_every_option_is_documented(name):
    for option in DATA_FORMATS.get(name).defaults:
        assert f"\n        {option}: " in DATA_FORMATS.get(name).__doc__


texts = st.sampled_from(
    ["", "x", "<image>", "<video>y", "a.png", "v.mp4", "../a.png", "human", "user", "gpt", "\ud800"]
)
scalars = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | texts | st.binary(max_size=3)
COLUMNS = (
    "id image images video videos conversations messages from value role content type text url path bytes image_url "
    "question answer answers choices caption texts text_list image_info image_name matched_text_index matched_sim"
)
keys = st.sampled_from(COLUMNS.split())
hostile = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@pytest.mark.parametrize("name", ours)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=hostile | st.dictionaries(keys, hostile, max_size=6))
def test_nothing_but_bad_sample_errors_leaves_a_format(name, row, context):
    try:
        sample = read(name, row, context)
    except BadSampleError as error:
        json.dumps(str(error))
        return
    assert any(message.role == "assistant" for message in sample.messages)
    for message in sample.messages:
        assert isinstance(message, Message)
        for part in message.content:
            assert isinstance(part, (str, Media))
            if isinstance(part, str):
                part.encode()
            else:
                assert part.kind in (MediaKind.IMAGE, MediaKind.VIDEO)
