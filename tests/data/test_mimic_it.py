"""MIMIC-IT's files: related instructions as turns, pictures out of tables of base64 texts, what cannot be used."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from sparsevlm.data.formats.mimic_it import MimicItFormat
from sparsevlm.data.media import load_image
from sparsevlm.data.opened import OpenSource
from sparsevlm.data.sample import Media, Sample
from sparsevlm.recipe.schema import Source
from sparsevlm.vision.tokens import MediaKind
from tests import tiny

COLORS = ("red", "green", "blue")
DATA = {
    "T_1": {"instruction": "what ?", "answer": "red", "image_ids": ["T_red"], "rel_ins_ids": ["T_2", "T_3"]},
    "T_2": {"instruction": "and ?", "answer": "green", "image_ids": ["T_green"], "rel_ins_ids": []},
    "T_3": {"instruction": "so ?", "answer": "both", "image_ids": ["T_red", "T_blue"], "rel_ins_ids": []},
}


def encoded(color: str) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(color).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(params=["parquet", "json", "files"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Gives a source with options, its pictures in a table, in a JSON file or as files."""
    (tmp_path / "T_instructions.json").write_text(json.dumps({"meta": {}, "data": DATA}))
    texts = {f"T_{color}": base64.urlsafe_b64encode(encoded(color)).decode() for color in COLORS}
    images: dict[str, Any] = {}
    if request.param == "parquet":
        from datasets import Dataset

        table = Dataset.from_dict({"base64": list(texts.values()), "id": list(texts)})
        table.to_parquet(str(tmp_path / "T.parquet"))
        images = {"images": "T.parquet"}
    elif request.param == "json":
        (tmp_path / "T.json").write_text(json.dumps(texts))
        images = {"images": "T.json"}
    else:
        for color in COLORS:
            (tmp_path / f"T_{color}.png").write_bytes(encoded(color))
        images = {"extension": ".png"}

    def make(**options: Any) -> OpenSource:
        made = Source(path="T_instructions.json", format="mimic_it", options={**images, **options})
        return OpenSource("t", made, tmp_path)

    return make


def turns(sample: Any) -> list[tuple[Any, ...]]:
    """Roles and contents, pictures as their colours."""
    assert isinstance(sample, Sample), sample

    def word(part: str | Media) -> str:
        if isinstance(part, str):
            return part
        frames = part.source if part.kind is MediaKind.VIDEO else [part.source]
        pixels = [load_image(Media(MediaKind.IMAGE, frame)).getpixel((0, 0)) for frame in frames]
        names = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}
        return f"[{part.kind} {' '.join(names[pixel] for pixel in pixels)}]"  # type: ignore[index]

    return [(message.role, *map(word, message.content)) for message in sample.messages]


def test_turns_about_the_first_ones_pictures(source: Any) -> None:
    rows = source()
    assert len(rows) == 3
    assert turns(rows.read(0)) == [
        ("user", "[image green]", "and ?"),
        ("assistant", "green"),
        ("user", "so ?"),
        ("assistant", "both"),
        ("user", "what ?"),
        ("assistant", "red"),
    ]
    assert rows.read(0).id == "T_1" and "T_instructions.json:T_1" in rows.read(0).where


def test_examples_in_context_have_their_own(source: Any) -> None:
    assert turns(source(group="in_context", max_related=1).read(0)) == [
        ("user", "[image green]", "and ?"),
        ("assistant", "green"),
        ("user", "[image red]", "what ?"),
        ("assistant", "red"),
    ]
    assert turns(source(group="in_context").read(2)) == [
        ("user", "[image red]", "[image blue]", "so ?"),
        ("assistant", "both"),
    ]


def test_frames_of_a_video(source: Any) -> None:
    assert turns(source(group="video_text").read(2)) == [("user", "[video red blue]", "so ?"), ("assistant", "both")]


def test_related_instructions_from_a_file(source: Any, tmp_path: Path) -> None:
    (tmp_path / "related.json").write_text(json.dumps({"T_2": ["T_3"]}))
    rows = source(related="related.json", group="in_context")
    assert len(turns(rows.read(0))) == 2 and len(turns(rows.read(1))) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rel_ins_ids": ["T_9"]}, "no instruction"),
        ({"rel_ins_ids": 3}, "not a list"),
        ({"image_ids": ["T_9"]}, "T_9"),
        ({"image_ids": [3]}, "not a list of names"),
        ({"answer": " "}, "'answer' is empty"),
        ({"instruction": None}, "not a text"),
    ],
)
def test_rows_that_cannot_be_used(source: Any, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    data = {"T_1": {**DATA["T_1"], "rel_ins_ids": [], **change}}
    (tmp_path / "T_instructions.json").write_text(json.dumps({"data": data}))
    assert reason in source().read(0).reason


def test_files_and_options_that_cannot_be(tmp_path: Path) -> None:
    file = Source(path="x.json", format="mimic_it")
    with pytest.raises(ValueError, match="cannot read"):
        MimicItFormat().rows(file, tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="no object 'data'"):
        MimicItFormat().rows(file, tmp_path)
    with pytest.raises(ValueError, match="one file of instructions"):
        MimicItFormat().rows(file.model_copy(update={"path": ["x.json"]}), tmp_path)
    for options, reason in (({"group": "x"}, "group is one of"), ({"max_related": -1}, "from 0 on")):
        with pytest.raises(ValueError, match=reason):
            MimicItFormat(**options)
