"""A film's features in the film's place: the same answers, one block in memory, nothing from another tower."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sparsevlm.cli import app
from sparsevlm.data.collate import Collator
from sparsevlm.data.media import VideoPolicy
from sparsevlm.data.sample import BadSampleError, Media, Message, Sample
from sparsevlm.features import keep_film, keep_films, open_tower
from sparsevlm.model.build import build_model
from sparsevlm.model.media_input import kept_of
from sparsevlm.train.launch import train
from sparsevlm.vision import encoder
from sparsevlm.vision.tokens import MediaKind
from tests import tiny
from tests.data.media_files import frame_pixels, write_video
from tests.model.test_native_model import NATIVE
from tests.model.test_native_model import recipe as native_recipe
from tests.train.runs import write_recipe

VIDEO = {"fps": 1.0, "max_frames": 5}


def ask(*media: Media, answer: str = "") -> Sample:
    turns = [Message("user", (*media, "what moves ?"))]
    return Sample(tuple(turns + [Message("assistant", (answer,))] * bool(answer)))


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds."""
    file = tmp_path_factory.mktemp("films") / "film.mp4"
    write_video(file, frames=80, fps=8)
    return file


@pytest.fixture
def built(tiny_parts: dict[str, str], tmp_path: Path) -> tuple[Any, Any, Path]:
    """Model, processor, and the directory of both."""
    model, processor = build_model(tiny.recipe_model(tiny_parts, video=VIDEO))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return model.eval(), processor, tmp_path / "model"


@pytest.fixture
def kept(built: tuple[Any, Any, Path], film: Path, tmp_path: Path) -> Path:
    """Features of the film, from the saved model."""
    return keep_film(open_tower(str(built[2])), film, tmp_path / "film.safetensors", block=3).path


def videos(*files: Path) -> list[Media]:
    return [Media(MediaKind.VIDEO, file) for file in files]


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).logits


def test_answers_are_those_of_the_film(built: tuple[Any, Any, Path], film: Path, kept: Path) -> None:
    model, processor, _ = built
    for start, end in ((2.0, 6.0), (0.0, 3.0), (5.0, None)):  # at most five seconds: none is left out
        shown, given = (Media(MediaKind.VIDEO, file, start=start, end=end) for file in (film, kept))
        plain, known = processor.encode_prompts([ask(shown)]), processor.encode_prompts([ask(given)])
        assert torch.equal(plain["input_ids"], known["input_ids"]) and "pixel_values" not in known
        # Blocks of three frames, or all together: rounding of differently shaped products
        torch.testing.assert_close(logits(model, known), logits(model, plain), rtol=1e-5, atol=1e-5)
        assert processor.measure(ask(given, answer="a cat")) == processor.measure(ask(shown, answer="a cat"))


def test_films_features_and_pictures_share_a_batch(built: tuple[Any, Any, Path], film: Path, kept: Path) -> None:
    model, processor, _ = built
    clip = [Media(MediaKind.VIDEO, file, start=2.0, end=6.0) for file in (film, kept)]
    picture = Media(MediaKind.IMAGE, tiny.picture("blue"))
    both = [[picture, media, picture] for media in clip]
    plain = processor.encode_prompts([ask(clip[0]), ask(*both[0]), ask(picture)])
    known = processor.encode_prompts([ask(clip[0]), ask(*both[1]), ask(picture)])
    assert known["pixel_values"].shape[0] == plain["pixel_values"].shape[0] - 4
    assert (known["feature_towers"] > 0).tolist() == [False, False, True, False, False]
    torch.testing.assert_close(logits(model, known), logits(model, plain), rtol=1e-5, atol=1e-5)
    one, other = (processor.encode(ask(*media, answer="a cat")) for media in both)
    for packed in (True, False):
        rows = ([one, one], [other, one], [other, other])
        losses = [model(**Collator(0, packed=packed)([row])).loss.item() for row in rows]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        torch.manual_seed(0)
        want = model.generate(**plain, max_new_tokens=3, pad_token_id=0, **options)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**known, max_new_tokens=3, pad_token_id=0, **options), want)


def test_the_tower_sees_a_block_at_a_time(
    built: tuple[Any, Any, Path], film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, directory = built
    calls: list[int] = []
    original = encoder.encode_frames

    def counting(tower: Any, pixels: Any, **options: Any) -> Any:
        calls.append(len(pixels))
        return original(tower, pixels, **options)

    monkeypatch.setattr("sparsevlm.model.visual.encode_frames", counting)
    keep_film(open_tower(str(directory)), film, tmp_path / "all.safetensors", fps=100.0, block=7)
    assert max(calls) == 7 and sum(calls) == 80  # all frames of the film
    frames = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), np.uint8)
    processor.reader.policy = VideoPolicy(max_frames=150)
    batch = processor.encode_prompts([ask(Media(MediaKind.VIDEO, frames, fps=1.0), Media(MediaKind.IMAGE, frames[0]))])
    calls.clear()
    blocks = logits(model, batch)
    assert calls == [64, 64, 23]
    monkeypatch.setattr("sparsevlm.model.visual.FRAMES_AT_ONCE", 1000)
    torch.testing.assert_close(logits(model, batch), blocks, rtol=1e-5, atol=1e-5)


def test_features_of_another_tower_layer_or_size_are_refused(
    built: tuple[Any, Any, Path], kept: Path, tiny_parts: dict[str, str]
) -> None:
    model, processor, _ = built
    batch = processor.encode_prompts([ask(*videos(kept))])
    other, _ = build_model(tiny.recipe_model(tiny_parts, video=VIDEO, vision={"layer": -1}))
    with pytest.raises(ValueError, match=r"features that another tower computed .* `sparsevlm features`"):
        logits(other, batch)
    _, larger = build_model(tiny.recipe_model(tiny_parts, video=VIDEO, vision={"image_size": 48}))
    sizes = "brought to image_size 32, patch_grid .*, but the model sees image_size 48"
    with pytest.raises(BadSampleError, match=sizes):
        larger.encode_prompts([ask(*videos(kept))])
    with pytest.raises(BadSampleError, match=sizes):
        larger.reader.measure(videos(kept)[0])  # before a stage starts
    with torch.no_grad():
        next(model.model.vision_tower.parameters())[0] += 1e-3
    with pytest.raises(ValueError, match="features that another tower computed"):
        logits(model, batch)


def test_a_tower_that_trains_takes_none(built: tuple[Any, Any, Path], kept: Path) -> None:
    model, processor, _ = built
    batch = Collator(0, packed=False)([[processor.encode(ask(*videos(kept), answer="a cat"))]])
    with pytest.raises(ValueError, match="the tower trains"):
        model.train()(**batch)
    model.model.vision_tower.requires_grad_(False)
    model.train()(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.connector.parameters())


def test_batches_that_do_not_add_up_are_refused(built: tuple[Any, Any, Path], kept: Path, film: Path) -> None:
    model, processor, _ = built
    batch = processor.encode_prompts([ask(*videos(kept, film))])
    with pytest.raises(ValueError, match="needs its pixels, or features"):
        logits(model, {key: value for key, value in batch.items() if key != "pixel_values"})
    one = processor.encode(ask(*videos(kept), answer="a"))
    wide = replace(one, kept=(replace(one.kept[0], features=torch.zeros(len(one.kept[0].features), 7)),))
    with pytest.raises(ValueError, match=r"widths \[7, 32\]: they are of different towers"):
        Collator(0, packed=True)([[one, wide]])
    short = replace(one.kept[0], features=one.kept[0].features[:-1])
    seen = processor.reader.read(videos(kept)[0])
    medium = processor.medium(MediaKind.VIDEO, seen.extent[0])
    with pytest.raises(BadSampleError, match="79 features, the medium has 80"):
        kept_of([replace(seen, kept=short)], [medium])


def test_times_and_subtitles_are_those_of_the_film(
    tiny_parts: dict[str, str], film: Path, kept: Path, tmp_path: Path
) -> None:
    video = {"fps": 1.0, "max_frames": 20, "frame_text": "{index} ", "subtitles": {}}
    _, processor = build_model(tiny.recipe_model(tiny_parts, video=video))
    (tmp_path / "said.srt").write_text("1\n00:00:03,400 --> 00:00:04,000\na big cat\n")
    asked = [ask(replace(media, subtitles=tmp_path / "said.srt")) for media in videos(film, kept)]
    plain, known = (processor.encode_prompts([sample])["input_ids"] for sample in asked)
    assert torch.equal(plain, known)


def test_films_are_kept_once_and_never_mistaken(
    built: tuple[Any, Any, Path], film: Path, tmp_path: Path, tiny_parts: dict[str, str]
) -> None:
    tower = open_tower(str(built[2]))
    folder = tmp_path / "kept"
    ((_, first),) = keep_films(tower, [film], folder)
    assert first.shape == (10, 16, 32) and first.path == folder / "film.safetensors"
    before = first.path.stat().st_mtime_ns
    ((_, again),) = keep_films(tower, [film], folder)
    assert again == replace(first, was_there=True) and first.path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="is there and was made of another film, tower, size or rate"):
        list(keep_films(tower, [film], folder, fps=2.0))
    other = tmp_path / "cut" / "film.mp4"  # as long, of other pictures
    other.parent.mkdir()
    write_video(other, frames=80, fps=8, pixels=lambda number: 255 - frame_pixels(number))
    with pytest.raises(ValueError, match="is there and was made of another film"):
        list(keep_films(tower, [other], folder))
    with pytest.raises(ValueError, match="two films have the same name"):
        list(keep_films(tower, [film, film.with_suffix(".webm")], folder))
    (tmp_path / "no.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match=r"no\.mp4: cannot be decoded"):
        list(keep_films(tower, [tmp_path / "no.mp4"], folder))
    assert [path.name for path in folder.iterdir()] == ["film.safetensors"]


def test_from_the_command_line_to_training_evaluation_and_chat(
    tiny_parts: dict[str, str], film: Path, tmp_path: Path
) -> None:
    talk = [{"from": "human", "value": "<video>\nwhat moves ?"}, {"from": "gpt", "value": "a cat"}]
    rows = [{"id": str(i), "video": "film.safetensors", "conversations": talk} for i in range(4)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "ask.json").write_text(
        json.dumps([{"video": "film.safetensors", "question": "what moves ?", "answer": "a cat"}])
    )
    batch = {"rows": 2, "workers": 0, "max_length": 128}
    file = write_recipe(
        tmp_path,
        tiny_parts,
        only=["align"],
        stage={"batch": batch, "steps": 2},
        model=tiny.recipe_model(tiny_parts, video=VIDEO).model_dump(mode="json"),
        evals={"films": {"task": "vqa", "path": str(tmp_path / "data" / "ask.json"), "batch_size": 1}},
    )

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    said = run("features", str(file), str(film), "--output", str(tmp_path / "data"))
    assert "10 frames of 16 x 32" in said
    (summary,) = train(file)
    assert 0 < summary.loss_last < 10 and summary.eval
    assert not (tmp_path / "run" / "align" / "skipped.jsonl").exists()
    shown = ["--video", str(tmp_path / "data" / "film.safetensors"), "--prompt", "what moves ?"]
    run("chat", str(tmp_path / "run"), *shown, "--max-new-tokens", "2")
    # the tower did not train, so the run's own model gives the same file
    assert "10 frames" in run("features", str(tmp_path / "run"), str(film), "--output", str(tmp_path / "data"))


def test_native_films(tmp_path: Path, film: Path) -> None:
    parts = tiny.save_parts(tmp_path / "parts", vision="siglip")
    small = NATIVE | {"video": {"type": "area", "multiple": 16, "max_pixels": 16**2}}
    model, processor = build_model(native_recipe(parts, native=small))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    kept = keep_film(open_tower(str(tmp_path / "model")), film, tmp_path / "film.safetensors", block=4)
    # as a long video's frames, since all of the film's are enough for one; so is a clip of eight, one of three is not
    shown, given = (Media(MediaKind.VIDEO, file, start=2.0) for file in (film, kept.path))
    plain, known = processor.encode_prompts([ask(shown)]), processor.encode_prompts([ask(given)])
    assert torch.equal(plain["input_ids"], known["input_ids"]) and "pixel_values" not in known
    torch.testing.assert_close(logits(model.eval(), known), logits(model, plain), rtol=1e-5, atol=1e-5)
    assert processor.measure(ask(given, answer="a cat")) == processor.measure(ask(shown, answer="a cat"))
    with pytest.raises(BadSampleError, match=r"sides of a long_video, but the 3 that are drawn are a video"):
        processor.encode_prompts([ask(replace(given, end=5.0))])
