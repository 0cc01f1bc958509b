"""Encoded images -> uint8 pixels of the training size. In: JPEG, PNG, ... bytes. Out: uint8 [C, size, size].

Normalisation happens on the device, on what arrives as uint8: a quarter of the bytes to move.
"""

import io
import math

import numpy as np
import simplejpeg
from PIL import Image

from jepa_fast.data.shards import BadSample


def decode(data: bytes, channels: int) -> np.ndarray:
    """uint8 [H, W, 3], or [H, W] for one channel. Raises BadSample.

    simplejpeg for JPEG; Pillow for the rest, and for the JPEGs that strict decoders refuse (ImageNet has one).
    """
    if data[:2] == b"\xff\xd8":
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
            return pixels if channels == 3 else pixels[:, :, 0]
        except ValueError:
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise BadSample(f"not a readable image ({type(error).__name__}: {error})".replace("\n", " ")) from None


def random_resized_crop(
    pixels: np.ndarray, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A crop of `scale` of the area and aspect 3/4 to 4/3, resized to [size, size]: torchvision's RandomResizedCrop."""
    height, width = pixels.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return _resize(pixels, size, (left, top, left + w, top + h))
    # The image is longer than any crop: the middle, at the nearest allowed aspect.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    top, left = (height - h) // 2, (width - w) // 2
    return _resize(pixels, size, (left, top, left + w, top + h))


def center_crop(pixels: np.ndarray, size: int, shorter: int) -> np.ndarray:
    """The middle [size, size] of the image resized so that its shorter side has `shorter` pixels (evaluation)."""
    height, width = pixels.shape[:2]
    side = size / shorter * min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(pixels, size, (left, top, left + side, top + side))


def whole(pixels: np.ndarray, size: int) -> np.ndarray:
    """The whole image, resized to [size, size]."""
    return _resize(pixels, size, (0, 0, pixels.shape[1], pixels.shape[0]))


def _resize(pixels: np.ndarray, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    if pixels.shape[:2] == (size, size) and box == (0, 0, size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=box))


def planar(pixels: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] -> contiguous [C, H, W]."""
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
