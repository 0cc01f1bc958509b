"""Decoding and cropping of images."""

import io

import numpy as np
import pytest
from PIL import Image

from jepa_fast.data.images import center_crop, decode, planar, random_resized_crop, whole
from jepa_fast.data.shards import BadSample


def gradient(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), 0 * x], -1).astype(np.uint8)


def encoded(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def test_lossless_images_come_back_exactly():
    np.testing.assert_array_equal(decode(encoded(gradient(30, 40), "PNG"), 3), gradient(30, 40))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_decoded_as_pillow_decodes_it(channels):
    data = encoded(gradient(64, 80), "JPEG", quality=95)
    pixels = decode(data, channels)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
    assert pixels.shape == expected.shape and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected.astype(int)).mean() < 1.5


def test_grey_palette_and_cmyk_images_become_what_is_asked():
    image = Image.fromarray(gradient(16, 16))
    for mode, kind in (("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG")):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind)
        assert decode(buffer.getvalue(), 3).shape == (16, 16, 3), mode
        assert decode(buffer.getvalue(), 1).shape == (16, 16), mode


@pytest.mark.parametrize("data", [b"", b"rubbish", b"\xff\xd8\xff\xe0rubbish", b"\x89PNG\r\n\x1a\n"])
def test_rubbish_is_a_bad_sample(data):
    with pytest.raises(BadSample):
        decode(data, 3)


def test_crops_take_the_scale_and_aspect_asked_for():
    """On a gradient the colours of a crop's corners tell where it was taken."""
    rng = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(300):
        crop = random_resized_crop(gradient(300, 400), 64, (0.3, 1.0), rng).astype(float)
        assert crop.shape == (64, 64, 3)
        width, height = (crop[:, :, c].max() - crop[:, :, c].min() for c in (0, 1))  # of 255
        areas.append(width * height / 255**2)
        aspects.append(width * 4 / (height * 3))
    assert 0.26 < min(areas) < 0.36 and 0.85 < max(areas) < 1.02
    assert 0.5 < np.mean(areas) < 0.75
    assert 0.70 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.40


def test_an_image_longer_than_any_crop_gives_its_middle():
    crop = random_resized_crop(gradient(10, 400), 8, (1.0, 1.0), np.random.default_rng(0))
    assert abs(crop[..., 0].mean() - 127.5) < 4


def test_evaluation_takes_the_middle():
    crop = center_crop(gradient(300, 400), 224, 256).astype(float)
    assert crop.shape == (224, 224, 3)
    side = 224 / 256 * 300
    np.testing.assert_allclose(crop[:, :, 0].max() - crop[:, :, 0].min(), 255 * side / 400, atol=3)
    np.testing.assert_allclose(crop.mean((0, 1))[:2], 127.5, atol=1)


def test_an_image_of_the_right_size_is_left_alone():
    pixels = gradient(48, 48)
    assert whole(pixels, 48) is pixels
    assert planar(pixels).shape == (3, 48, 48) and planar(pixels[..., 0]).shape == (1, 48, 48)
