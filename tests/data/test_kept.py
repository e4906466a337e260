"""A film's features on disk, drawn from like the film; and names of what media hold."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsevlm.data.digest import media_digest
from sparsevlm.data.kept import probe_film, read_film, tower_number, write_film
from sparsevlm.data.media import VideoFrames, count_frames, frame_size, frame_times, load_video
from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.data.video import VideoPolicy
from sparsevlm.vision.tokens import MediaKind

FACTS = {"fps": "2", "tower": "0123456789abcdef0123", "pictures": "{}", "size": "64x48", "film": "f1"}


def write(path: Path, frames: int = 10, dtype: torch.dtype = torch.float32) -> Tensor:
    features = torch.arange(frames * 6).view(frames, 2, 3).to(dtype)
    assert write_film(path, features.split(4), frames, FACTS) == (frames, 2, 3)
    return features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_film_is_safetensors_read_frame_by_frame(dtype: torch.dtype, tmp_path: Path) -> None:
    features = write(tmp_path / "a.safetensors", dtype=dtype)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["features"], features)
    info = probe_film(tmp_path / "a.safetensors")
    assert (info.total, info.fps, info.duration, info.size) == (10, 2, 5, (64, 48))
    kept = read_film(tmp_path / "a.safetensors", info, [0, 7, 9])
    assert torch.equal(kept.features, features[[0, 7, 9]].flatten(0, 1))
    assert kept.tower == tower_number(FACTS["tower"]) > 0


def test_frames_are_drawn_as_from_the_film(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    whole = Media(MediaKind.VIDEO, tmp_path / "a.safetensors")
    clip = Media(MediaKind.VIDEO, tmp_path / "a.safetensors", start=1.0, end=3.0)
    in_memory = np.zeros((10, 8, 8, 3), np.uint8)
    for policy in (VideoPolicy(), VideoPolicy(fps=None, max_frames=4), VideoPolicy(fps=2.0, max_frames=64)):
        for media in (whole, clip):
            same = Media(MediaKind.VIDEO, in_memory, fps=2.0, start=media.start, end=media.end)
            assert VideoFrames(media, policy).indices == VideoFrames(same, policy).indices
            assert count_frames(media, policy) == count_frames(same, policy)
            assert frame_times(media, policy) == frame_times(same, policy)
    assert frame_size(whole, VideoPolicy()) == (64, 48)
    for look in (lambda: load_video(whole, VideoPolicy()), lambda: list(VideoFrames(whole, VideoPolicy()))):
        with pytest.raises(BadSampleError, match="holds no frames to look at"):
            look()


def test_what_is_no_film_is_a_bad_sample(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for name, data in {"torn": whole[:-5], "empty": b"", "text": b"what" * 30, "longer": whole + b"\0"}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        with pytest.raises(BadSampleError, match="features cannot be read"):
            probe_film(tmp_path / f"{name}.safetensors")
    save_file({"features": torch.zeros(2, 2)}, tmp_path / "weights.safetensors")
    with pytest.raises(BadSampleError, match="not a film's features; make them with `sparsevlm features`"):
        probe_film(tmp_path / "weights.safetensors")
    with pytest.raises(BadSampleError, match="missing file"):
        probe_film(tmp_path / "none.safetensors")


def test_writing_holds_one_block_and_leaves_nothing_half(tmp_path: Path) -> None:
    def blocks(count: int) -> Iterator[Tensor]:
        for _ in range(count):
            yield torch.zeros(4, 100, 100)

    write_film(tmp_path / "warm.safetensors", blocks(1), 4, FACTS)
    tracemalloc.start()
    write_film(tmp_path / "long.safetensors", blocks(50), 200, FACTS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "long.safetensors").stat().st_size > 8_000_000 > 10 * peak
    with pytest.raises(ValueError, match="8 frames came of 12"):
        write_film(tmp_path / "short.safetensors", blocks(2), 12, FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.safetensors", "warm.safetensors"]


# ---- names of what media hold -----------------------------------------------------------------------------------


def test_a_medium_is_named_by_what_it_holds_not_by_where_it_lies(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "c.png")
    a, b, c = (media_digest(Media(MediaKind.IMAGE, tmp_path / name)) for name in ("a.png", "b.png", "c.png"))
    assert a == b != c
    assert media_digest(Media(MediaKind.IMAGE, (tmp_path / "a.png").read_bytes())) == a
    before = (tmp_path / "a.png").stat()
    (tmp_path / "a.png").write_bytes((tmp_path / "c.png").read_bytes())
    os.utime(tmp_path / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time say nothing
    assert media_digest(Media(MediaKind.IMAGE, tmp_path / "a.png")) == c
    with pytest.raises(BadSampleError, match="missing file"):
        media_digest(Media(MediaKind.IMAGE, tmp_path / "none.png"))


def test_pictures_in_memory_frames_and_kinds_count() -> None:
    picture, array = Image.new("RGB", (8, 4), "red"), np.zeros((3, 8, 8, 3), np.uint8)
    array[2] = 1
    opaque, clear = Image.new("P", (8, 4)), Image.new("P", (8, 4))
    opaque.putpalette([255, 0, 0, 255], "RGBA")
    clear.putpalette([255, 0, 0, 0], "RGBA")
    names = [
        media_digest(Media(MediaKind.IMAGE, opaque)),
        media_digest(Media(MediaKind.IMAGE, clear)),
        media_digest(Media(MediaKind.IMAGE, picture)),
        media_digest(Media(MediaKind.IMAGE, picture.resize((4, 8)))),
        media_digest(Media(MediaKind.IMAGE, picture.convert("L"))),
        media_digest(Media(MediaKind.IMAGE, array[0])),
        media_digest(Media(MediaKind.VIDEO, array), [0, 1]),
        media_digest(Media(MediaKind.VIDEO, array), [0, 2]),
        media_digest(Media(MediaKind.VIDEO, array), [0]),
        media_digest(Media(MediaKind.MULTI_VIEW, (picture, picture))),
        media_digest(Media(MediaKind.MULTI_VIEW, (picture,))),
    ]
    assert len(set(names)) == len(names)
    assert media_digest(Media(MediaKind.IMAGE, picture.copy())) == names[2]


def test_a_large_file_is_hashed_again_once_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsevlm.data.digest._LARGE", 10)
    film = Media(MediaKind.VIDEO, tmp_path / "film.mp4")
    names = set()
    for content, when in ((b"a" * 20, 10**9), (b"b" * 20, 10**9 + 1), (b"c" * 21, 10**9 + 1)):
        (tmp_path / "film.mp4").write_bytes(content)
        os.utime(tmp_path / "film.mp4", ns=(when, when))
        names |= {media_digest(film, [0]), media_digest(film, [0])}
    (tmp_path / "film.mp4").write_bytes(b"d" * 21)  # just now: the next change may come within the same tick
    names.add(media_digest(film, [0]))
    (tmp_path / "film.mp4").write_bytes(b"e" * 21)
    names.add(media_digest(film, [0]))
    assert len(names) == 5
