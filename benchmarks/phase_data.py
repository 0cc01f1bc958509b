"""Generated sets that the phase detector is calibrated on: series and small images, each with a class to probe for.

Like the demo's sensor set: the classes overlap, single samples tell little and the spectrum much.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.signal import lfilter

LENGTH, TRAIN, TEST = 500, 3000, 1000
SIZE = 24  # pixels a side of an image

Generator = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def _ar2(rng: np.random.Generator, frequency: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Unit-variance resonances [n, LENGTH] at `frequency` cycles/sample."""
    out = []
    for f, r in zip(frequency, np.broadcast_to(radius, frequency.shape), strict=True):
        x = lfilter([1], [1, -2 * r * np.cos(2 * np.pi * f), r * r], rng.normal(size=LENGTH + 400))[400:]
        out.append(x / x.std())
    return np.stack(out)


def _ar1(rng: np.random.Generator, count: int, coefficient: float = 0.6) -> np.ndarray:
    x = lfilter([1], [1, -coefficient], rng.normal(size=(count, LENGTH + 100)), axis=1)[:, 100:]
    return x * np.sqrt(1 - coefficient**2)


def weak_line(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A strong line that says nothing, and a weak second one that carries the class."""
    strong = _ar2(rng, 0.05 + rng.normal(0, 0.008, len(y)), np.array(0.985))
    weak = _ar2(rng, 0.13 + 0.025 * y + rng.normal(0, 0.005, len(y)), np.array(0.985))
    return strong + 0.6 * weak + 0.8 * _ar1(rng, len(y))


def impacts(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Shocks that ring out, as of a damaged bearing; the class is their rate."""
    out = np.zeros((len(y), LENGTH))
    ring = np.exp(-np.arange(30) / 7) * np.sin(2 * np.pi * 0.1 * np.arange(30))
    for i, label in enumerate(y):
        period, at = (90, 40, 18)[label] * rng.normal(1, 0.08), rng.uniform(0, 48)
        while at < LENGTH:
            out[i, int(at)] += rng.uniform(0.7, 1.3)
            at += period * rng.normal(1, 0.03)
        out[i] = np.convolve(out[i], ring)[:LENGTH]
    return out / out.std() + 0.3 * _ar1(rng, len(y), 0.4)


def resonance(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """One broader line at a higher frequency, shifted by the class."""
    line = _ar2(rng, 0.10 + 0.03 * y + rng.normal(0, 0.008, len(y)), np.array(0.97))
    return line + 1.2 * _ar1(rng, len(y))


def bandwidth(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """The class is how sharp a line is, not where."""
    line = _ar2(rng, 0.1 + rng.normal(0, 0.01, len(y)), np.array([0.985, 0.8])[y])
    return line + 0.3 * _ar1(rng, len(y))


def harmonics(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A tone and its octave, of random phases; the class is its pitch."""
    t, n = np.arange(LENGTH), (len(y), 1)
    pitch = (0.04 + 0.012 * y + rng.normal(0, 0.004, len(y)))[:, None]
    tones = (a * np.sin(2 * np.pi * (k * pitch * t + rng.uniform(size=n))) for k, a in ((1, 1.0), (2, 0.7)))
    return sum(tones) + _ar1(rng, len(y))


def chirp(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A tone whose pitch rises; the class is how fast."""
    t, n = np.arange(LENGTH), (len(y), 1)
    rate = (np.array([4e-5, 12e-5])[y] + rng.normal(0, 2e-5, len(y)))[:, None]
    phase = rng.normal(0.05, 0.006, n) * t + rate * t * t / 2 + rng.uniform(size=n)
    return 1.3 * np.sin(2 * np.pi * phase) + 0.8 * _ar1(rng, len(y))


# ---- since the second calibration ------------------------------------------------------------------


def modulation(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A carrier that swells and fades; the class is how far."""
    t, n = np.arange(LENGTH), (len(y), 1)
    depth = (np.array([0.3, 1.0])[y] + rng.normal(0, 0.1, len(y)))[:, None]
    swell = 1 + depth * np.sin(2 * np.pi * (t / rng.uniform(80, 160, n) + rng.uniform(size=n)))
    carrier = np.sin(2 * np.pi * (rng.normal(0.12, 0.01, n) * t + rng.uniform(size=n)))
    return 1.4 * swell * carrier + 0.4 * _ar1(rng, len(y))


def pulses(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Beats at one rate; the class is the shape of a beat: one-sided, two-sided, or with an echo."""
    t = np.arange(40)
    bump = np.exp(-(((t - 8) / 3.0) ** 2))
    shapes = (bump, np.gradient(bump) * 3.5, bump + 0.6 * np.roll(bump, 14))
    out = np.zeros((len(y), LENGTH))
    for i, label in enumerate(y):
        at = rng.uniform(0, 50)
        while at < LENGTH:
            out[i, int(at)] += rng.uniform(0.7, 1.3)
            at += 50 * rng.normal(1, 0.1)
        out[i] = np.convolve(out[i], shapes[label])[:LENGTH]
    return out / out.std() + 0.7 * _ar1(rng, len(y), 0.8)


def colour(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Noise of spectrum 1/f^a and a line anywhere; the class is a."""
    f = np.fft.rfftfreq(LENGTH, 1.0)
    f[0] = np.inf
    a = (0.7 + 0.4 * y + rng.normal(0, 0.12, len(y)))[:, None]
    noise = np.fft.irfft(np.fft.rfft(rng.normal(size=(len(y), LENGTH))) * f ** (-a / 2), LENGTH)
    noise /= noise.std(1, keepdims=True)
    return noise + 0.7 * _ar2(rng, rng.uniform(0.03, 0.2, len(y)), np.array(0.98))


def gaps(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A line that is cut off now and then; the class is for what share of the time."""
    line = _ar2(rng, 0.08 + rng.normal(0, 0.01, len(y)), np.array(0.97))
    for i, label in enumerate(y):
        for at in rng.integers(0, LENGTH, (2, 7)[label] + rng.integers(0, 3)):
            line[i, at : at + 40] = 0
    return line + 0.3 * _ar1(rng, len(y))


def spots(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Images [n, SIZE, SIZE] of round spots on noise that covers an equal area; the class is their size."""
    radius = np.array([1.2, 1.8, 2.7])[y] * rng.normal(1, 0.08, len(y))
    grid, out = np.arange(SIZE), np.zeros((len(y), SIZE, SIZE))
    for i, r in enumerate(radius):
        for cy, cx in rng.uniform(-2, SIZE + 2, (max(1, round(110 / r**2)), 2)):
            out[i] += rng.choice((-1, 1)) * np.outer(
                np.exp(-((grid - cy) ** 2) / (2 * r * r)), np.exp(-((grid - cx) ** 2) / (2 * r * r))
            )
    out /= out.std((1, 2), keepdims=True)
    return out + 0.7 * rng.normal(size=out.shape)


# ---- of the later lists ----------------------------------------------------------------------------


def bursts(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Hiss that comes and goes, for as long altogether; the class is how long at a time."""
    out = 0.8 * _ar1(rng, len(y), 0.9)
    length = np.array([12, 36])[y]
    for i, long in enumerate(length):
        for at in rng.integers(0, LENGTH, 144 // long):
            out[i, at : at + long] += 1.5 * rng.normal(size=len(out[i, at : at + long]))
    return out


def sawtooth(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Ramps of any rate; the class is whether they rise or fall, which no power spectrum tells."""
    t, n = np.arange(LENGTH), (len(y), 1)
    ramp = 2 * ((t / rng.uniform(25, 60, n) + rng.uniform(size=n)) % 1) - 1
    return 1.2 * np.where(y[:, None] == 1, ramp, -ramp) + 0.7 * _ar1(rng, len(y))


def echo(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Noise and a copy of it that comes later; the class is how much."""
    x, t = _ar1(rng, len(y), 0.3), np.arange(LENGTH)
    late = np.array([7, 12])[y] + rng.integers(-1, 2, len(y))
    return x + 0.7 * x[np.arange(len(y))[:, None], (t - late[:, None]) % LENGTH] + 0.5 * _ar1(rng, len(y), 0.9)


def stripes(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Images [n, SIZE, SIZE] of a grating of any width under noise; the class is its direction."""
    angle = (np.pi / 3 * y + rng.normal(0, 0.15, len(y)))[:, None, None]
    grid, n = np.arange(SIZE), (len(y), 1, 1)
    along = grid[:, None] * np.sin(angle) + grid * np.cos(angle)
    return np.sin(2 * np.pi * (along / rng.uniform(4, 9, n) + rng.uniform(size=n))) + 1.2 * rng.normal(size=along.shape)


# ---- files -----------------------------------------------------------------------------------------

GENERATORS: dict[str, tuple[Generator, int]] = {  # and the number of classes
    "weak_line": (weak_line, 2), "impacts": (impacts, 3), "resonance": (resonance, 2), "bandwidth": (bandwidth, 2),
    "harmonics": (harmonics, 4), "chirp": (chirp, 2), "modulation": (modulation, 2), "pulses": (pulses, 3),
    "colour": (colour, 2), "gaps": (gaps, 2), "spots": (spots, 3), "bursts": (bursts, 2), "stripes": (stripes, 3),
    "sawtooth": (sawtooth, 2), "echo": (echo, 2),
}  # fmt: skip
IMAGES = ("spots", "stripes")


def write(folder: Path, name: str) -> Path:
    """What --data.path takes: the training file of a generated set of series, or the folder of a set of images."""
    folder = folder / "data" / name
    make, num_classes = GENERATORS[name]
    if not (folder / "written").exists():
        rng = np.random.default_rng([20250905, *name.encode()])
        for split, count in (("train", TRAIN), ("test", TEST)):
            y = rng.integers(0, num_classes, count)
            x = make(rng, y)
            if x.ndim == 3:
                _write_images(folder / split, x, y)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
                np.save(folder / f"{split}_labels.npy", y)
                np.save(folder / f"{split}.npy", x.astype(np.float32))
        (folder / "written").touch()
    return folder if name in IMAGES else folder / "train.npy"


def _write_images(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    pixels = np.clip(np.rint(127.5 + 46 * x / x.std((1, 2), keepdims=True)), 0, 255).astype(np.uint8)
    for i, (image, label) in enumerate(zip(pixels, y, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{i:05}.png")
