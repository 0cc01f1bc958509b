"""Encoded images -> uint8 pixels of the training size. In: JPEG, PNG, ... bytes. Out: uint8 [C, size, size].

JPEG is decoded by libjpeg-turbo (simplejpeg) and resized in C++: both leave Python's lock, both give Pillow's pixels bit
for bit, and both are faster, by how much benchmarks/bench_data.py says. Pillow decodes the rest, and is the reference of
the tests. Normalisation happens on the device, on what arrives as uint8: a quarter of the bytes to move.
"""

import io
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from jepa_fast.config import Data
from jepa_fast.data.sample import BadSample, Box, Counts, Encoded, nothing
from jepa_fast.extension import extension

MOST_PIXELS = 2**26  # 67 million: 200 MB decoded, in every thread
MOST_SIDE = 2**16  # the memory that resizing takes is 32 rows as wide as the picture
MOST_KEPT = 2**24  # bytes that a thread keeps for the next image; fresh memory costs a sixth of a decode
MOST_SCANS, MOST_WORK = 100, 2**30  # of a JPEG: scans, and scans times pixels; programs write some ten scans
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Of Pillow's formats those that we mean. Others run programs (EPS starts Ghostscript) or are rarely looked after.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
_kept = threading.local()


def decode(data: bytes, channels: int, reuse: bool = False) -> tuple[np.ndarray, bool]:
    """(uint8 [H, W, 3], or [H, W, 1] for one channel; whether Pillow decoded it). Raises BadSample.

    With `reuse` the pixels are this thread's until it decodes again. Pillow takes what is no JPEG, CMYK, and the JPEGs
    that libjpeg-turbo refuses for other reasons than damage in the picture: Pillow would show such damage as grey or as
    smears and say nothing. EXIF orientation is ignored, as ImageNet's usual pipelines do.
    """
    if not data:
        raise BadSample("is empty (0 bytes)", "empty")
    shape = plain_jpeg(data)
    if shape is not None:
        try:
            buffer = _memory(shape[0] * shape[1] * channels) if reuse else None
            return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY", buffer=buffer), False
        except ValueError as error:
            if _damaged(str(error), data):
                raise BadSample(f"not a readable image ({error})", "undecodable") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_bomb(*image.size)
            if image.format in ("JPEG", "MPO"):  # of those that libjpeg's quick look could not read
                _refuse_scans(data, image.size[0] * image.size[1])
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


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that needs no Pillow, by its header; None of anything else. Raises BadSample for a bomb."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _refuse_bomb(width, height)
    _refuse_scans(data, width * height)
    return None if colours in ("CMYK", "YCCK") else (height, width)  # Pillow's conversion of inks is the reference


def _damaged(error: str, data: bytes) -> bool:
    """Whether libjpeg found the coded picture corrupt; zeros that pad it before its end mark are no damage."""
    if not error.startswith("Corrupt JPEG data"):
        return False
    extra = re.match(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9", error)
    end = data.rfind(b"\xff\xd9")
    return extra is None or any(data[max(0, end - int(extra[1])) : end])


def _memory(size: int) -> np.ndarray | None:
    """At least `size` bytes that are this thread's own; None where they are too many to be kept."""
    if size > MOST_KEPT:
        return None
    if not hasattr(_kept, "memory") or len(_kept.memory) < size:
        _kept.memory = np.empty(size, np.uint8)
    return _kept.memory


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise BadSample(f"has {width} x {height} pixels, more than {MOST_PIXELS}", "too_large")
    if max(width, height) > MOST_SIDE:
        raise BadSample(f"has {width} x {height} pixels, more than {MOST_SIDE} on a side", "too_large")


def _refuse_scans(data: bytes, pixels: int) -> None:
    """A progressive JPEG is decoded once for every scan, of which a small file may have thousands."""
    most = max(16, min(MOST_SCANS, MOST_WORK // max(1, pixels)))
    if data.count(b"\xff\xda") > most:  # the mark of a scan; in the headers before the first the bytes may be others'
        count = data.count(b"\xff\xda", _end_of_headers(data))
        if count > most:
            raise BadSample(f"is a progressive JPEG of {count} scans, more than {most}", "too_large")


def _end_of_headers(data: bytes) -> int:
    """Where a JPEG's first scan begins, or the end of what can be followed."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 [H, W, channels]; 16 bits become 8 by their upper half (Pillow would clip them to white)."""
    if image.mode.startswith("I;16") or image.mode == "I":
        deep = np.asarray(image)
        image = Image.fromarray((np.clip(deep, 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise BadSample("holds floating-point pixels, whose range nobody told", "undecodable")
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))  # a copy: torch wants to be able to write
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def random_box(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A box of `scale` of the area and aspect 3/4 to 4/3, as torchvision's RandomResizedCrop takes it."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # The image is longer than any crop: the middle, at the nearest allowed aspect.
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    pixels: np.ndarray, size: int, scale: tuple[float, float], rng: np.random.Generator, how: str = "bilinear",
    out: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """A random box of the image, resized to [C, size, size]."""
    height, width = pixels.shape[:2]
    return crop(pixels, random_box(height, width, scale, rng), size, how, out)


def center_crop(pixels: np.ndarray, size: int, shorter: int, how: str = "bilinear") -> np.ndarray:
    """The middle [C, size, size] of the image resized so that its shorter side has `shorter` pixels (evaluation)."""
    height, width = pixels.shape[:2]
    side = max(1, round(size / shorter * min(height, width)))
    return crop(pixels, ((height - side) // 2, (width - side) // 2, side, side), size, how)


def crop(pixels: np.ndarray, box: Box, size: int, how: str, out: np.ndarray | None = None) -> np.ndarray:
    """A box of the image, resized to [C, size, size]."""
    top, left, height, width = box
    return resize(pixels[top : top + height, left : left + width], size, how, out)


def resize(pixels: np.ndarray, size: int, how: str = "bilinear", out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [H, W, C] -> [C, size, size], antialiased, `bilinear` or `bicubic`: Pillow's pixels, bit for bit.

    In `out`, contiguous and of that shape, if it is given, and else in memory of its own.
    """
    if pixels.shape[:2] == (size, size):
        made = pixels.transpose(2, 0, 1)
    elif max(pixels.shape) <= MOST_SIDE and (module := extension()) is not None:
        return module.resize(pixels, size, how == "bicubic", out=out)
    else:
        made = resize_by_pillow(pixels, size, how)
    if out is None:
        return made.copy()
    out[...] = made
    return out


def resize_by_pillow(pixels: np.ndarray, size: int, how: str) -> np.ndarray:
    """`resize` without the extension: rows and columns one after the other, in Pillow 13's order with any Pillow."""
    height, width, channels = pixels.shape
    columns_first = height - size > 2 * max(0, width - size)
    image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
    image = image.resize((width, size) if columns_first else (size, height), FILTERS[how])
    return np.asarray(image.resize((size, size), FILTERS[how])).reshape(size, size, channels).transpose(2, 0, 1).copy()


@dataclass(frozen=True)
class ImageSource:
    """Pixels or encoded images, brought to the training size: uint8 [C, size, size]."""

    read: Callable[[int], bytes | np.ndarray]
    key: Callable[[int], str]
    count: int
    labels: np.ndarray | None
    data: Data
    prepare: Callable[[np.ndarray], None] = nothing
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, rng: np.random.Generator | None, out: np.ndarray | None = None) -> np.ndarray | Encoded:
        raw, size, how = self.read(index), self.data.image_size, self.data.interpolation
        if rng is not None and self.data.decoder == "nvjpeg" and isinstance(raw, bytes):
            shape = plain_jpeg(raw)
            if shape is not None:
                self.counts.add(len(raw))
                whole = (0, 0, *shape)
                return Encoded(raw, random_box(*shape, self.data.crop_scale, rng) if self.data.random_crop else whole)
        by_pillow = False
        if isinstance(raw, np.ndarray):
            pixels = raw if raw.ndim == 3 else raw[:, :, None]
        else:
            pixels, by_pillow = decode(raw, self.data.channels, reuse=True)
        self.counts.add(len(raw) if isinstance(raw, bytes) else raw.nbytes, by_pillow)
        if not self.data.random_crop:
            return resize(pixels, size, how)
        if rng is None:
            shorter = round(size * 256 / 224) if min(pixels.shape[:2]) > size else size
            return center_crop(pixels, size, shorter, how)
        return random_resized_crop(pixels, size, self.data.crop_scale, rng, how, out)
