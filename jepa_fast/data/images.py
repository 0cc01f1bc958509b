"""Encoded images -> uint8 pixels of the training size. In: JPEG, PNG, ... bytes. Out: uint8 [C, size, size].

JPEG is decoded by libjpeg-turbo (simplejpeg) and resized by torch's antialiased uint8 kernel: both leave Python's lock,
and both are faster than Pillow, by how much benchmarks/bench_data.py says. Pillow decodes the rest, and is the reference
of the tests. Normalisation happens on the device, on what arrives as uint8: a quarter of the bytes to move.
"""

import io
import math

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from jepa_fast.data.shards import BadSample

MOST_PIXELS = 2**26  # 67 million: 200 MB decoded, in every thread


def decode(data: bytes, channels: int) -> tuple[np.ndarray, bool]:
    """(uint8 [H, W, 3], or [H, W, 1] for one channel; whether Pillow decoded it). Raises BadSample.

    Pillow takes what is no JPEG, and the JPEGs that simplejpeg refuses: CMYK, and a damaged one that Pillow may still
    read. EXIF orientation is ignored, as ImageNet's usual pipelines do.
    """
    if not data:
        raise BadSample("is empty (0 bytes)", "empty")
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            _refuse_bomb(width, height)
            if colours not in ("CMYK", "YCCK"):  # Pillow's conversion of inks is the reference
                return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY"), False
        except ValueError:
            pass
    try:
        with Image.open(io.BytesIO(data)) as image:
            _refuse_bomb(*image.size)
            return _pixels(image, channels), True
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(str(error), "too_large") from None
    except UnidentifiedImageError:
        raise BadSample("no image of a known format", "undecodable") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise BadSample(
            f"not a readable image ({type(error).__name__}: {error})".replace("\n", " "), "undecodable"
        ) from None


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise BadSample(f"has {width} x {height} pixels, more than {MOST_PIXELS}", "too_large")


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 [H, W, channels]; 16 bits become 8 by their upper half (Pillow would clip them to white)."""
    if image.mode.startswith("I;16") or image.mode == "I":
        deep = np.asarray(image)
        image = Image.fromarray((np.clip(deep, 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise BadSample("holds floating-point pixels, whose range nobody told", "undecodable")
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))  # a copy: torch wants to be able to write
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def random_resized_crop(
    pixels: np.ndarray, size: int, scale: tuple[float, float], rng: np.random.Generator, how: str = "bilinear"
) -> np.ndarray:
    """A crop of `scale` of the area and aspect 3/4 to 4/3, resized to [C, size, size]: torchvision's RandomResizedCrop."""
    height, width = pixels.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return resize(pixels[top : top + h, left : left + w], size, how)
    # The image is longer than any crop: the middle, at the nearest allowed aspect.
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    top, left = (height - h) // 2, (width - w) // 2
    return resize(pixels[top : top + h, left : left + w], size, how)


def center_crop(pixels: np.ndarray, size: int, shorter: int, how: str = "bilinear") -> np.ndarray:
    """The middle [C, size, size] of the image resized so that its shorter side has `shorter` pixels (evaluation)."""
    height, width = pixels.shape[:2]
    side = max(1, round(size / shorter * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(pixels[top : top + side, left : left + side], size, how)


def resize(pixels: np.ndarray, size: int, how: str = "bilinear") -> np.ndarray:
    """uint8 [H, W, C] -> [C, size, size], antialiased, `bilinear` or `bicubic`; unchanged where it has that size."""
    if pixels.shape[:2] == (size, size):
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, C, H, W], channels last
    return interpolate(planes, size=(size, size), mode=how, antialias=True)[0].contiguous().numpy()
