"""Decoding and cropping of images: fast where libjpeg-turbo can, Pillow's answer everywhere."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from jepa_fast.data.readers import images
from jepa_fast.data.readers.images import center_crop, decode, random_resized_crop, resize, resize_by_pillow
from jepa_fast.data.sample import BadSample
from jepa_fast.extension import extension


def gradient(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / max(1, width - 1), y * 255 / max(1, height - 1), 0 * x], -1).astype(np.uint8)


def photograph(height, width):
    """Smooth colours with grain: what JPEG and resampling find hard enough."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return np.clip(smooth + rng.normal(0, 12, (height, width, 1)), 0, 255).astype(np.uint8)


def encoded(pixels, kind, mode=None, **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_images_come_back_exactly(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels, by_pillow = decode(encoded(gradient(30, 40), kind, **options), 3)
    np.testing.assert_array_equal(pixels, gradient(30, 40))
    assert by_pillow


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}, {"mode": "L"}], ids=str
)
def test_jpeg_is_decoded_as_pillow_decodes_it(channels, options):
    data = encoded(photograph(61, 83), "JPEG", **{"quality": 95, **options})
    pixels, by_pillow = decode(data, channels)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
    assert pixels.shape == (61, 83, channels) and pixels.dtype == np.uint8 and not by_pillow
    difference = np.abs(pixels.astype(int) - expected.reshape(pixels.shape))
    if channels == 3:
        assert difference.max() == 0
    else:  # the luma that the file holds, where Pillow computes it from colours that were clipped
        assert difference.mean() < 1.5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")],
)
def test_every_mode_becomes_what_is_asked(mode, kind, channels):
    data = encoded(gradient(16, 17), kind, mode)
    pixels, by_pillow = decode(data, channels)
    assert pixels.shape == (16, 17, channels) and by_pillow
    reference = Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L")
    np.testing.assert_array_equal(pixels.squeeze(), np.asarray(reference))


def test_sixteen_bits_become_eight_by_their_upper_half():
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    pixels, _ = decode(encoded(Image.fromarray(deep), "PNG"), 1)
    np.testing.assert_array_equal(pixels[:, :, 0], np.arange(256).reshape(16, 16))
    assert decode(encoded(Image.fromarray(deep), "TIFF"), 3)[0].max() == 255


@pytest.mark.parametrize(("data", "kind"), [
    (b"", "empty"), (b"rubbish", "undecodable"), (b"\xff\xd8\xff\xe0rubbish", "undecodable"),
    (b"\x89PNG\r\n\x1a\n", "undecodable"), (encoded(photograph(64, 64), "JPEG")[:-300], "undecodable"),
    (encoded(photograph(64, 64), "PNG")[:-300], "undecodable"), (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "undecodable"),
])  # fmt: skip
def test_rubbish_is_a_bad_sample_with_its_reason(data, kind):
    with pytest.raises(BadSample) as raised:
        decode(data, 3)
    assert raised.value.kind == kind and "\n" not in str(raised.value)


def test_a_picture_that_libjpeg_calls_corrupt_is_not_used_and_padding_is_no_damage():
    whole = encoded(photograph(120, 160), "JPEG", quality=92)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(20):
        data = bytearray(whole)
        data[len(data) // 2 : len(data) // 2 + 20] = rng.bytes(20)
        try:
            decode(bytes(data), 3)
        except BadSample as error:
            assert error.kind == "undecodable"
            refused += 1
    assert refused >= 18, "Pillow shows them all, with smears"
    np.testing.assert_array_equal(decode(whole[:-2] + bytes(40) + whole[-2:], 3)[0], decode(whole, 3)[0])
    with pytest.raises(BadSample, match="extraneous bytes"):
        decode(whole[:-2] + b"ab" * 20 + whole[-2:], 3)


def png_of(width, height):
    """A PNG that says it has so many pixels, in a few bytes."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def jpeg_of(width, height):
    """A JPEG whose header says it has so many pixels."""
    data = bytearray(encoded(gradient(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("bomb", [png_of(50_000, 50_000), png_of(50_000, 2_000), jpeg_of(50_000, 50_000), jpeg_of(65_000, 2_000)], ids=["png", "wide png", "jpeg", "wide jpeg"])  # fmt: skip
def test_a_bomb_is_refused_before_it_is_unpacked(bomb):
    with pytest.raises(BadSample, match="pixels") as raised:
        decode(bomb, 3)
    assert raised.value.kind == "too_large"


def test_a_long_thin_image_is_none():
    assert decode(encoded(gradient(2, 50_000), "JPEG"), 3)[0].shape == (2, 50_000, 3)


# Rows first, columns first, enlarged, one pass only, narrower than a step, a crop of one pixel, hundreds of taps.
SHAPES = [(300, 340), (900, 400), (100, 120), (224, 600), (600, 224), (31, 500), (500, 31), (1, 1), (7, 5), (1200, 900), (40, 9000)]  # fmt: skip


def pillows(pixels, size, how):
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    resized = np.asarray(image.resize((size, size), Image.Resampling[how.upper()]))
    return resized.reshape(size, size, -1).transpose(2, 0, 1)


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_resizing_is_pillows_bit_for_bit(shape, channels, how):
    """Of noise in black and white, on which a cubic overshoots everywhere."""
    noise = np.random.default_rng(0).integers(0, 2, (*shape, channels), dtype=np.uint8) * 255
    for pixels, size in ((noise, 224), (noise, 33), (photograph(*shape)[:, :, :channels], 96)):
        expected = resize_by_pillow(np.ascontiguousarray(pixels), size, how)
        np.testing.assert_array_equal(resize(pixels, size, how), expected)
        if int(PIL.__version__.partition(".")[0]) >= 13:  # older ones always begin with the rows
            np.testing.assert_array_equal(expected, pillows(pixels, size, how))


@pytest.mark.parametrize(("how", "most"), [("bilinear", 1), ("bicubic", 2)])
def test_the_order_of_the_passes_is_hardly_seen_on_a_tall_photograph(how, most):
    """Pillow before 13 begins with the rows of every image."""
    pixels, name = photograph(480, 300), Image.Resampling[how.upper()]
    rows_first = np.asarray(Image.fromarray(pixels).resize((224, 480), name).resize((224, 224), name))
    difference = np.abs(resize(pixels, 224, how).transpose(1, 2, 0).astype(int) - rows_first)
    assert 0 < difference.max() <= most and difference.mean() < 0.3


@pytest.mark.skipif(extension() is None, reason="jepa_fast_C is not built")
@pytest.mark.parametrize("cubic", [False, True])
def test_every_instruction_set_gives_the_same_pixels(cubic):
    for shape in SHAPES:
        pixels = photograph(*shape)
        found = [extension().resize(pixels, 65, cubic, name) for name in extension().instruction_sets()]
        assert all((one == found[0]).all() for one in found)


@pytest.mark.skipif(extension() is None, reason="jepa_fast_C is not built")
@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)], ids=str
)
def test_the_extension_refuses_what_is_no_image(pixels):
    with pytest.raises(ValueError, match="H, W, 1 or 3"):
        extension().resize(pixels, 8, False)


def test_a_crop_is_read_where_it_lies():
    """Whatever the array's steps from row to row and from pixel to pixel are."""
    pixels = photograph(80, 90)
    for crop in (pixels[10:60, 20:71], pixels[::-1], pixels[:, ::2], pixels[:, :, ::-1], pixels[:, :, 1:2]):
        np.testing.assert_array_equal(resize(crop, 40), resize(np.ascontiguousarray(crop), 40))


def test_pixels_decoded_into_kept_memory_are_the_same_until_the_next_decode():
    first, second = (encoded(photograph(*shape), "JPEG") for shape in ((61, 83), (40, 50)))
    fresh = decode(first, 3)[0]
    kept = decode(first, 3, reuse=True)[0]
    np.testing.assert_array_equal(kept, fresh)
    copies = [resize(kept, 32), resize(kept[:61, :61], 61)]
    before = [c.copy() for c in copies]
    assert np.shares_memory(decode(second, 3, reuse=True)[0], kept)
    np.testing.assert_array_equal(copies[0], before[0])
    np.testing.assert_array_equal(copies[1], before[1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_smallest_images_survive_every_crop(shape, channels):
    pixels = np.full((*shape, channels), 7, np.uint8)
    for crop in (
        random_resized_crop(pixels, 32, (0.3, 1.0), np.random.default_rng(0)),
        center_crop(pixels, 32, 36),
        resize(pixels, 32),
    ):
        assert crop.shape == (channels, 32, 32) and (crop == 7).all()


def test_crops_take_the_scale_and_aspect_asked_for():
    """On a gradient the colours of a crop's corners tell where it was taken."""
    rng = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(300):
        crop = random_resized_crop(gradient(300, 400), 64, (0.3, 1.0), rng).astype(float)
        assert crop.shape == (3, 64, 64)
        width, height = (crop[c].max() - crop[c].min() for c in (0, 1))  # of 255
        areas.append(width * height / 255**2)
        aspects.append(width * 4 / (height * 3))
    assert 0.26 < min(areas) < 0.36 and 0.85 < max(areas) < 1.02
    assert 0.5 < np.mean(areas) < 0.75
    assert 0.70 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.40


def test_an_image_longer_than_any_crop_gives_its_middle():
    crop = random_resized_crop(gradient(10, 400), 8, (1.0, 1.0), np.random.default_rng(0))
    assert abs(crop[0].mean() - 127.5) < 4


def test_evaluation_takes_the_middle():
    crop = center_crop(gradient(300, 400), 224, 256).astype(float)
    assert crop.shape == (3, 224, 224)
    side = 224 / 256 * 300
    np.testing.assert_allclose(crop[0].max() - crop[0].min(), 255 * side / 400, atol=3)
    np.testing.assert_allclose(crop.mean((1, 2))[:2], 127.5, atol=1)


def test_an_image_of_the_right_size_is_left_alone():
    np.testing.assert_array_equal(resize(gradient(48, 48), 48), gradient(48, 48).transpose(2, 0, 1))


UNLOCKED = """
import sys, threading
import numpy as np
from jepa_fast.data.readers import images

pixels, kind = np.zeros((40, 40, 3), np.uint8), np.dtype("uint8")
def resize():
    for _ in range(10_000):
        images.resize(pixels, 8, "bilinear"), np.empty(1, np.uint8)
before, threads = sys.getrefcount(kind), [threading.Thread(target=resize) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sys.getrefcount(kind) - before)
"""


@pytest.mark.parametrize("shape", [(1, 70_000, 3), (70_000, 1, 1)])
def test_what_is_wider_than_any_jpeg_is_left_to_pillow(monkeypatch, shape):
    """The C++ resize would take, and keep, 32 rows of it in every thread."""
    monkeypatch.setattr(images, "extension", lambda: pytest.fail("C++ is asked"))
    assert resize(np.zeros(shape, np.uint8), 8).shape == (shape[2], 8, 8)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("shape", [(90, 70, 3), (90, 70, 1), (48, 48, 3)])
def test_an_image_is_resized_where_it_is_wanted(monkeypatch, built, shape):
    if not built:
        monkeypatch.setattr(images, "extension", lambda: None)
    pixels = np.ascontiguousarray(gradient(*shape[:2])[:, :, : shape[2]])
    batch = np.full((3, shape[2], 48, 48), 7, np.uint8)
    place = batch[1]
    assert resize(pixels, 48, out=place) is place
    np.testing.assert_array_equal(batch[1], resize(pixels, 48))
    assert (batch[[0, 2]] == 7).all()
    for wrong in (np.empty((shape[2], 47, 48), np.uint8), np.empty((shape[2], 48, 47), np.uint8)):
        with pytest.raises(ValueError, match=r"out must be|broadcast"):
            resize(pixels, 48, out=wrong)


@pytest.mark.skipif(extension() is None, reason="jepa_fast_C is not built")
@pytest.mark.parametrize("wrong", [np.empty((3, 8, 8), np.int8), np.empty((3, 8, 16), np.uint8)[:, :, ::2]])
def test_memory_that_is_not_that_of_an_image_is_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        resize(gradient(30, 40), 8, out=wrong)


def test_threads_resize_without_a_hand_on_pythons_counts():
    """Where the lock is given up nothing of Python's may be touched: counts would be lost, and the process with them."""
    run = subprocess.run([sys.executable, "-c", UNLOCKED], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "0"), run.stderr[-500:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(executed) (w) file closefile\nshowpage\n"


def test_an_image_of_a_format_that_we_do_not_mean_is_no_image(tmp_path, monkeypatch):
    """EPS would start Ghostscript, on a program that the file holds."""
    called = tmp_path / "gs"
    called.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    called.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    pixels = Image.fromarray(photograph(18, 20))
    others = [encoded(pixels, name) for name in ("TGA", "PCX", "ICO", "SGI", "IM", "JPEG2000")]
    for data in (EPS, b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + bytes(24) + EPS, *others):
        with pytest.raises(BadSample, match="no image of a known format"):
            decode(data, 3)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"])
def test_the_formats_that_data_come_in_are_read(name):
    pixels, _ = decode(encoded(Image.fromarray(photograph(18, 20)), name), 3)
    assert pixels.shape == (*photograph(18, 20).shape[:2], 3)
