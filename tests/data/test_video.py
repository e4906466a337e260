"""Videos: which frames are drawn, that they are the right ones in any container, and every fault by name."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevlm.data import video as video_module
from sparsevlm.data.media import VideoPolicy, count_frames, load_video, sample_frame_indices
from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.data.video import clip_indices, decode_video, probe_video
from sparsevlm.vision.tokens import MediaKind
from tests.data.media_files import SIDE, encoded, frame_pixels, index_of, picture, write_video

ALL = VideoPolicy(fps=None, max_frames=256)
KINDS = [  # container, codec, B-frames
    ("mp4", "mpeg4", 0),
    ("mp4", "libx264", 2),
    ("mkv", "libx264", 2),
    ("webm", "libvpx", 0),
    ("avi", "mpeg4", 0),
    ("avi", "mjpeg", 0),
    ("ts", "libx264", 2),
    ("flv", "libx264", 0),
    ("mpg", "mpeg2video", 0),
]
KINDS = [kind for kind in KINDS if kind[1] in av.codecs_available]


def video(source, **options) -> Media:
    return Media(MediaKind.VIDEO, source, **options)


def indices(media: Media, policy: VideoPolicy) -> list[int]:
    frames, times = load_video(media, policy)
    assert len(frames) == len(times) == count_frames(media, policy)
    assert all(frame.shape == (SIDE, SIDE, 3) and frame.dtype == np.uint8 for frame in frames)
    return [index_of(frame) for frame in frames]


# --- which frames ---------------------------------------------------------------------------------------------------

policies = st.builds(
    lambda fps, low, more: VideoPolicy(fps, low, low + more),
    st.none() | st.sampled_from([0.1, 0.5, 1.0, 2.0, 2.997, 10.0, 24.0]),
    st.integers(1, 8),
    st.integers(0, 60),
)


@given(st.integers(1, 500), st.sampled_from([1.0, 10.0, 23.976, 25.0, 29.97, 60.0]), policies)
def test_indices_are_distinct_ascending_and_as_many_as_asked_for(total, native, policy):
    drawn = sample_frame_indices(total, native, policy)
    assert drawn == sorted(set(drawn))
    assert drawn[0] >= 0 and drawn[-1] < total
    assert min(policy.min_frames, total) <= len(drawn) <= policy.max_frames
    if policy.fps is None:
        assert len(drawn) == min(total, policy.max_frames)


@given(st.integers(1, 60), st.sampled_from([5, 10, 25, 30]), st.sampled_from([1, 2, 5]))
def test_at_an_fps_the_frame_shown_at_each_tick_is_taken(total, native, fps):
    ticks = [k for k in range(total) if Fraction(k, fps) < Fraction(total, native)]
    naive = [max(i for i in range(total) if Fraction(i, native) <= Fraction(k, fps)) for k in ticks]
    assert sample_frame_indices(total, native, VideoPolicy(fps, 1, 10_000)) == naive


def test_evenly_drawn_frames_reach_from_the_first_to_the_last():
    assert sample_frame_indices(9, 1, VideoPolicy(None, 1, 5)) == [0, 2, 4, 6, 8]
    assert sample_frame_indices(100, 25, VideoPolicy(1.0, 8, 64)) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert sample_frame_indices(100, 1, VideoPolicy(1.0, 1, 3)) == [0, 50, 99]
    assert sample_frame_indices(9, 1, VideoPolicy(None, 1, 1)) == [4]
    assert sample_frame_indices(3, 1, VideoPolicy(None, 1, 64)) == [0, 1, 2]
    assert sample_frame_indices(0, 1, VideoPolicy()) == []


def test_clips_hold_the_frames_shown_within_them():
    policy = VideoPolicy(None, 1, 100)
    assert clip_indices(40, 10, 1.0, 2.0, policy) == list(range(10, 20))
    assert clip_indices(40, 10, 1.05, None, policy) == list(range(11, 40))
    assert clip_indices(40, 10, 3.0, 99.0, policy) == list(range(30, 40))
    for start, end in ((4.0, None), (2.0, 1.0), (7.0, 9.0)):
        with pytest.raises(BadSampleError, match=r"no frame between .* of a video of 4.00 s"):
            clip_indices(40, 10, start, end, policy)


@pytest.mark.parametrize("options", [{"fps": 0}, {"min_frames": 0}, {"min_frames": 9, "max_frames": 8}])
def test_impossible_policies_are_refused(options):
    with pytest.raises(ValueError, match="min_frames"):
        VideoPolicy(**options)


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("container", "codec", "b_frames"), KINDS)
def test_the_drawn_frames_are_the_right_ones(container, codec, b_frames, tmp_path):
    fps = 25 if codec == "mpeg2video" else 10
    path = write_video(tmp_path / f"clip.{container}", 40, fps, codec, b_frames=b_frames)
    assert indices(video(path), ALL) == list(range(40))
    assert indices(video(path.read_bytes()), VideoPolicy(None, 1, 4)) == [0, 13, 26, 39]
    assert indices(video(path), VideoPolicy(fps / 5)) == list(range(0, 40, 5))
    assert indices(video(path, start=5 / fps, end=15 / fps), ALL) == list(range(5, 15))
    _, times = load_video(video(path), VideoPolicy(fps / 5))
    np.testing.assert_allclose(times, [i / fps for i in range(0, 40, 5)], atol=2e-3)


@pytest.mark.parametrize(("container", "codec", "b_frames"), [k for k in KINDS if k[1] != "mpeg2video"])
def test_seeking_finds_the_frames_that_reading_through_finds(container, codec, b_frames, tmp_path, monkeypatch):
    path = write_video(tmp_path / f"long.{container}", 200, 2, codec, gop=15, b_frames=b_frames)
    info = probe_video(path)
    wanted = [3, 60, 61, 130, 199]
    read_through, _ = decode_video(path, info, wanted)
    assert [index_of(frame) for frame in read_through] == wanted
    monkeypatch.setattr(video_module, "_SEEK_GAP", 1e9)
    plain, _ = decode_video(path, info, wanted)
    for seeking, reading in zip(read_through, plain, strict=True):
        assert index_of(seeking) == index_of(reading)


def test_seeking_decodes_less(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mp4", 200, 2, "mpeg4", gop=15)
    decoded = []
    original = video_module._decode

    def counting(*args):
        for item in original(*args):
            decoded.append(item)
            yield item

    monkeypatch.setattr(video_module, "_decode", counting)
    decode_video(path, probe_video(path), [0, 100, 199])
    assert len(decoded) < 60


def test_frames_of_varying_rate_are_drawn_by_time(tmp_path):
    times = [0, 100, 200, 300, 400, 2400, 4400, 4500, 4600, 4700]  # two frames stand still for two seconds
    path = write_video(tmp_path / "vfr.mkv", 10, 10, "libx264", times=times)
    frames, seconds = load_video(video(path), VideoPolicy(fps=1.0))
    for frame, second in zip(frames, seconds, strict=True):
        assert times[index_of(frame)] == round(second * 1000)
    assert {4, 5} <= {index_of(frame) for frame in frames}


def test_a_turned_video_is_shown_upright(tmp_path):
    gradient = np.zeros((SIDE, SIDE, 3), np.uint8)
    gradient[: SIDE // 2] = 255  # white above
    path = write_video(tmp_path / "turned.mp4", 3, rotation=90, pixels=lambda i: gradient)
    with av.open(str(path)) as container:
        turn = next(container.decode(video=0)).rotation
    assert abs(turn) == 90
    (frame, *_), _ = load_video(video(path), ALL)
    left, right = frame[:, : SIDE // 4].mean(), frame[:, -SIDE // 4 :].mean()
    assert (left > 200 and right < 50) if turn == 90 else (right > 200 and left < 50)  # counter-clockwise is positive


def test_only_the_drawn_frames_are_held(tmp_path, monkeypatch):
    converted = []
    original = video_module._upright
    monkeypatch.setattr(video_module, "_upright", lambda frame: converted.append(1) or original(frame))
    path = write_video(tmp_path / "a.mp4", 100)
    load_video(video(path), VideoPolicy(None, 1, 3))
    assert len(converted) == 3


# --- faults ---------------------------------------------------------------------------------------------------------


def test_a_cut_off_video_is_not_padded_with_its_last_frame(tmp_path):
    path = write_video(tmp_path / "a.mkv", 100)
    whole = path.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSampleError, match=r"video ends at .* its container says 10.00 s"):
        load_video(video(cut), ALL)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.mp4", b"", "empty file"),
        ("text.mp4", b"<html>404</html>" * 100, "cannot be decoded as a video"),
        ("noise.mp4", bytes(range(256)) * 50, "cannot be decoded as a video|no video stream|without frames"),
        ("playlist.mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "cannot be decoded as a video"),
        ("concat.mp4", b"ffconcat version 1.0\nfile a.mp4\n", "cannot be decoded as a video"),
        ("picture.mp4", encoded(picture()), "cannot be decoded as a video"),
    ],
)
def test_what_is_no_video_says_so(name, content, reason, tmp_path):
    write_video(tmp_path / "a.mp4", 3)  # what the playlists would open
    path = tmp_path / name
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(BadSampleError, match=reason):
            load_video(video(source), ALL)
        with pytest.raises(BadSampleError, match=reason):
            count_frames(video(source), ALL)


def test_an_mp4_without_its_index(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40)
    path.write_bytes(path.read_bytes()[:-400])  # the index is at the end
    with pytest.raises(BadSampleError, match="cannot be decoded as a video"):
        load_video(video(path), ALL)


def test_missing_video_and_sound_without_pictures(tmp_path):
    with pytest.raises(BadSampleError, match="missing file"):
        load_video(video(tmp_path / "gone.mp4"), ALL)
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadSampleError, match="no video stream"):
        load_video(video(path), ALL)


def test_frames_beyond_the_pixel_limit_are_refused_before_decoding(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(video_module, "MAX_PIXELS", SIDE * SIDE - 1)
    monkeypatch.setattr(video_module, "_decode", None)
    with pytest.raises(BadSampleError, match="frames of 32x32 pixels"):
        load_video(video(path), ALL)


@pytest.mark.parametrize("seed", range(12))
def test_mutilated_videos_never_raise_anything_else(seed, tmp_path):
    rng = np.random.default_rng(seed)
    container, codec, _ = KINDS[seed % len(KINDS)]
    path = write_video(tmp_path / f"a.{container}", 20, 25, codec)
    file = bytearray(path.read_bytes())
    for at in rng.integers(0, len(file), 20):
        file[at] = rng.integers(256)
    try:
        frames, _ = load_video(video(bytes(file[: rng.integers(1, len(file) + 1)])), ALL)
    except BadSampleError:
        return
    assert frames


# --- frames in memory -----------------------------------------------------------------------------------------------


def test_frames_in_memory():
    arrays = [frame_pixels(i) for i in range(40)]
    from PIL import Image

    for frames in (arrays, tuple(arrays), np.stack(arrays), [Image.fromarray(a) for a in arrays]):
        assert indices(video(frames), VideoPolicy(fps=1.0, max_frames=64)) == list(range(40))
        assert indices(video(frames), VideoPolicy(fps=1.0, max_frames=4)) == [0, 13, 26, 39]
        assert indices(video(frames, fps=10.0), VideoPolicy(fps=2.0)) == list(range(0, 40, 5))
        assert indices(video(frames, fps=10.0, start=1.0, end=1.5), ALL) == [10, 11, 12, 13, 14]
    assert indices(Media(MediaKind.MULTI_VIEW, arrays), VideoPolicy(max_frames=2)) == list(range(40))
    with pytest.raises(BadSampleError, match="without frames"):
        count_frames(video([]), ALL)
    with pytest.raises(BadSampleError, match="frame rate"):
        count_frames(video(arrays, start=1.0), ALL)
    with pytest.raises(BadSampleError, match="cannot be read from int"):
        load_video(video(3), ALL)
    with pytest.raises(BadSampleError, match="picture in memory"):
        load_video(video([np.zeros((2, 2))]), ALL)
