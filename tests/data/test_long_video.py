"""Films are decoded in blocks: memory follows the block, not the film."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sparsevlm.data.media import VideoFrames, VideoPolicy, frame_times, load_video
from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.vision.tokens import MediaKind
from tests.data.media_files import SIDE, write_video

ALL = VideoPolicy(fps=None, max_frames=100_000)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return Media(MediaKind.VIDEO, write_video(tmp_path_factory.mktemp("film") / "film.mp4", 240, fps=10))


def test_blocks_are_the_whole_film(film: Media) -> None:
    whole, times = load_video(film, ALL)
    frames = VideoFrames(film, ALL)
    blocks = list(frames.blocks(32))
    assert [len(block) for block in blocks] == [32] * 7 + [16]
    assert len(frames) == len(whole) == 240
    assert all(np.array_equal(a, b) for a, b in zip([f for block in blocks for f in block], whole, strict=True))
    assert times == pytest.approx(frame_times(film, ALL), abs=1e-6)


@pytest.mark.parametrize("policy", [VideoPolicy(fps=1.0), VideoPolicy(None, 1, 5), VideoPolicy(None, 1, 7, "stride")])
def test_frames_can_be_gone_through_again_and_picked(film: Media, policy: VideoPolicy) -> None:
    frames = VideoFrames(film, policy)
    wanted, _ = load_video(film, policy)
    for _ in range(2):
        assert all(np.array_equal(a, b) for a, b in zip(frames, wanted, strict=True))
    assert np.array_equal(frames[-1], wanted[-1])
    assert all(np.array_equal(a, b) for a, b in zip(frames[1:3], wanted[1:3], strict=True))


def test_memory_does_not_grow_with_the_film(film: Media) -> None:
    def peak(seconds: float) -> int:
        clip = VideoFrames(Media(MediaKind.VIDEO, film.source, end=seconds), ALL)
        tracemalloc.start()
        for _ in clip.blocks(8):
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(1.0)  # imports
    frame = SIDE * SIDE * 3
    short, long = peak(6.0), peak(24.0)
    # Two blocks at most: the one given out and the one that is filled. Holding the film would be 240 frames.
    assert long < short + 8 * frame and long < 60 * frame


def test_faults_of_the_file_show_at_once(tmp_path: Path) -> None:
    (tmp_path / "none.mp4").write_bytes(b"")
    with pytest.raises(BadSampleError, match="empty file"):
        VideoFrames(Media(MediaKind.VIDEO, tmp_path / "none.mp4"), ALL)
