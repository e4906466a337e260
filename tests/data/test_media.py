"""Pictures: every mode comes out as upright RGB, every fault as BadSampleError with its reason."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsevlm.data.media import MAX_PIXELS, image_size, load_image
from sparsevlm.data.sample import BadSampleError, Media
from sparsevlm.vision.tokens import MediaKind
from tests.data.media_files import encoded, picture


def image(source) -> Media:
    return Media(MediaKind.IMAGE, source)


def rgb(source) -> np.ndarray:
    loaded = load_image(image(source))
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def test_path_bytes_pil_and_array_give_the_same_pixels(tmp_path):
    original = picture(1, (5, 3))
    path = tmp_path / "a.png"
    original.save(path)
    for source in (path, str(path), path.read_bytes(), original, np.asarray(original)):
        np.testing.assert_array_equal(rgb(source), np.asarray(original))
        assert image_size(image(source)) == (5, 3)


def test_transparency_is_laid_over_white():
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], dtype=np.uint8)
    expected = [[200, 0, 0], [255, 255, 255], [244, 204, 204]]  # 0.2 * colour + 0.8 * white
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(rgba)))[0], expected)
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putdata([0, 1])
    opaque, clear = encoded(palette), encoded(palette, transparency=1)
    np.testing.assert_array_equal(rgb(opaque)[0], [[9, 8, 7], [1, 2, 3]])
    np.testing.assert_array_equal(rgb(clear)[0], [[9, 8, 7], [255, 255, 255]])
    grey_alpha = Image.merge("LA", [Image.new("L", (1, 1), 40), Image.new("L", (1, 1), 0)])
    np.testing.assert_array_equal(rgb(encoded(grey_alpha))[0, 0], [255, 255, 255])


def test_sixteen_bit_grey_keeps_its_upper_byte():
    levels = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], dtype=np.uint16)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(levels)))[0, :, 0], [0, 0, 1, 127, 255])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    upright = np.asarray(picture(2, (6, 4)))
    stored = {  # how a camera stores an upright picture under each orientation
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    np.testing.assert_array_equal(rgb(file), upright)
    assert image_size(image(file)) == (6, 4)


HELD = {
    "PNG": ["1", "L", "P", "RGBA", "LA", "RGB"],
    "TIFF": ["1", "L", "P", "CMYK", "YCbCr", "RGBA", "LA", "RGB"],
    "JPEG": ["1", "L", "CMYK", "YCbCr", "RGB"],
    "WEBP": ["L", "P", "RGBA", "LA", "RGB"],
    "GIF": ["1", "L", "P", "RGBA", "LA", "RGB"],
    "BMP": ["1", "L", "P", "RGB"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in HELD.items() for mode in modes])
def test_every_mode_a_file_can_have_becomes_rgb_of_the_same_size(kind, mode):
    assert rgb(encoded(picture(3, (7, 5)).convert(mode), kind)).shape == (5, 7, 3)


def hollow_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def broken_pictures() -> dict[str, tuple[bytes, str]]:
    jpeg = encoded(picture(4, (64, 64)), "JPEG")
    return {
        "truncated": (jpeg[: len(jpeg) // 2], "truncated"),
        "lost its end": (jpeg[:-50], "truncated"),
        "header only": (jpeg[:20], "decoded|format|truncated"),
        "empty": (b"", "empty file"),
        "text": (b"<html>404 Not Found</html>", "not a picture"),
        "no pixels": (hollow_png(0, 10), "without pixels|decoded|not a picture"),
        "bomb": (hollow_png(10_000, 10_000), "bomb"),
        "huge bomb": (hollow_png(60_000, 60_000), "bomb"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        "float": (encoded(Image.new("F", (2, 2)), "TIFF"), "float"),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fault", broken_pictures())
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_broken_picture_says_what_is_wrong(fault, on_disk, tmp_path):
    file, reason = broken_pictures()[fault]
    if on_disk:
        (tmp_path / "broken.jpg").write_bytes(file)
    with pytest.raises(BadSampleError, match=reason):
        load_image(image(tmp_path / "broken.jpg" if on_disk else file))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_on_its_header():
    assert MAX_PIXELS < 10_000 * 10_000
    with pytest.raises(BadSampleError, match="10000x10000"):  # next to nothing to decode in it
        image_size(image(hollow_png(10_000, 10_000)))


@pytest.mark.parametrize(
    "source",
    [None, 3, ["a"], np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3), np.float32), np.zeros((0, 2, 3), "u1")],
)
def test_things_that_are_no_picture(source):
    with pytest.raises(BadSampleError, match="picture"):
        load_image(image(source))


def test_missing_file(tmp_path):
    with pytest.raises(BadSampleError, match=r"missing file .*gone\.png"):
        load_image(image(tmp_path / "gone.png"))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutilated_files_never_raise_anything_else(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    file = bytearray(encoded(picture(5, (16, 16)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    del file[data.draw(st.integers(1, len(file))) :]
    try:
        loaded = load_image(image(bytes(file)))
    except BadSampleError:
        return
    assert loaded.mode == "RGB"
