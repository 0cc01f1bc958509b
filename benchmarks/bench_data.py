"""Loading images: each stage alone and all of them together, against Pillow and against webdataset's own pipeline.

    python benchmarks/bench_data.py                 # one core; images of 500 x 375 pixels and about 105 KB

`decode`, `resize`: one stage over the same images in memory. `decode+crop`: RandomResizedCrop (0.3, 1.0) to 224, the same
crops for all; `pillow` is what torchvision does on PIL images, in either interpolation. `index`: the headers of one shard
of 1,250 samples, against `tarfile` and against reading the shard through with webdataset. `loader`: shards to batches with
masks, one decoding thread, over 96 batches, so that the start of the threads counts for little; `decode+crop in a loop` is
the least it can take: the same crops from memory into memory that is used again. `webdataset` is its own pipeline with
Pillow, over two of the shards.

The images are synthetic (smooth colours with grain), so rates are of this machine and these images; ratios travel better.
"""

import io
import math
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import webdataset
from PIL import Image

from benchmarks.harness import Bench, Case, arguments
from jepa_fast.config import Config, replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.loading.loader import Loader
from jepa_fast.data.loading.order import Order
from jepa_fast.data.random import augmentation
from jepa_fast.data.readers import images
from jepa_fast.data.shards.index import _scan
from jepa_fast.data.shards.writer import write_shards
from jepa_fast.presets import preset

SIZE, SCALE, BATCH = 224, (0.3, 1.0), 32
SHARD = 8  # batches in a shard
PIL_FILTER = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TESTS = ["tests/test_images.py", "tests/test_tar.py", "tests/test_order.py"]


def photographs(count: int) -> list[bytes]:
    """JPEGs of 500 x 375 pixels, smooth colours with grain, of about the size of ImageNet's."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(float)
        pixels = np.clip(smooth + rng.normal(0, 14, (375, 500, 1)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        made.append(buffer.getvalue())
    return made


def pillow_decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def pillow_crop(image: Image.Image, how: str, rng: np.random.Generator) -> np.ndarray:
    """RandomResizedCrop on a PIL image, with the draws of images.random_resized_crop: uint8 [3, 224, 224]."""
    for _ in range(10):
        area = image.height * image.width * rng.uniform(*SCALE)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= image.width and h <= image.height:
            top, left = int(rng.integers(image.height - h + 1)), int(rng.integers(image.width - w + 1))
            break
    cut = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), PIL_FILTER[how])
    return np.ascontiguousarray(np.asarray(cut).transpose(2, 0, 1))


def ours(data: bytes, how: str, rng: np.random.Generator) -> np.ndarray:
    return images.random_resized_crop(images.decode(data, 3, reuse=True)[0], SIZE, SCALE, rng, how)


def stream(number: int) -> np.random.Generator:
    return augmentation(0, 0, number)


def same(a: np.ndarray, b: np.ndarray) -> None:
    difference = np.abs(a.astype(int) - b)
    assert difference.max() <= 1, f"differs by {difference.max()} of 255"  # by none from Pillow 13


BOX = (40, 30, 420, 330)  # left, top, right, bottom


def our_resize(pixels: np.ndarray, how: str) -> np.ndarray:
    left, top, right, bottom = BOX
    return images.resize(pixels[top:bottom, left:right], SIZE, how)


def pillow_resize(picture: Image.Image, how: str) -> np.ndarray:
    return np.asarray(picture.crop(BOX).resize((SIZE, SIZE), PIL_FILTER[how])).transpose(2, 0, 1)


def pillow(data: bytes, how: str, rng: np.random.Generator) -> np.ndarray:
    return pillow_crop(pillow_decode(data), how, rng)


def stages(bench: Bench, jpegs: list[bytes]) -> None:
    count, pixels = len(jpegs), [images.decode(data, 3)[0] for data in jpegs]
    pictures = [Image.fromarray(p) for p in pixels]

    def same_pixels() -> None:
        for data, decoded in zip(jpegs, pixels, strict=True):
            np.testing.assert_array_equal(decoded, np.asarray(pillow_decode(data)))

    case = bench.case(f"decode {count} JPEG of {np.mean([*map(len, jpegs)]) / 1e3:.0f} KB", "uint8")
    case.add("jepa_fast", lambda: [images.decode(d, 3) for d in jpegs], check=same_pixels)
    case.add("pillow", lambda: [pillow_decode(d) for d in jpegs], check=same_pixels)
    finish(case, count)
    for how in PIL_FILTER:
        resize_stage(bench, pixels, pictures, how)
        crop_stage(bench, jpegs, how)


def resize_stage(bench: Bench, pixels: list[np.ndarray], pictures: list[Image.Image], how: str) -> None:
    def alike() -> None:
        for array, picture in zip(pixels, pictures, strict=True):
            same(our_resize(array, how), pillow_resize(picture, how))

    case = bench.case(f"resize {len(pixels)} crops of 380x300 {how}", "uint8")
    case.add("jepa_fast", lambda: [our_resize(p, how) for p in pixels], check=alike)
    case.add("pillow", lambda: [pillow_resize(p, how) for p in pictures], check=alike)
    finish(case, len(pixels))


def crop_stage(bench: Bench, jpegs: list[bytes], how: str) -> None:
    def alike() -> None:
        for i, data in enumerate(jpegs):
            same(ours(data, how, stream(i)), pillow(data, how, stream(i)))

    case = bench.case(f"decode+crop {len(jpegs)} {how}", "uint8")
    case.add("jepa_fast", lambda: [ours(d, how, stream(i)) for i, d in enumerate(jpegs)], check=alike)
    case.add("pillow", lambda: [pillow(d, how, stream(i)) for i, d in enumerate(jpegs)], check=alike)
    finish(case, len(jpegs))


def finish(case: Case, count: int, over: str = "pillow") -> None:
    if case.run():
        case.rate("images_per_s", "1/s", count)
        case.speedup(f"ratio_to_{over}", over=over)
    print(case.table())


def indexing(bench: Bench, folder: Path, payload: int, count: int) -> None:
    rng = np.random.default_rng(0)
    samples = ({"__key__": f"{i:08}", "jpg": rng.bytes(payload), "cls": i % 1000, "json": {"filename": f"n{i % 1000:08}_{i}.JPEG"}} for i in range(count))  # fmt: skip
    write_shards(folder, {"train": samples}, "index", count)
    file = folder / "index-train-0000.tar"
    stat = file.stat()

    def scan():
        return _scan(file, (stat.st_size, stat.st_mtime_ns))

    def headers() -> list[tuple[int, int]]:
        with tarfile.open(file, "r:") as tar:
            return [(member.offset_data, member.size) for member in tar]

    def same() -> None:
        expected = [offset for offset, size in headers() if size == payload]
        assert scan().rows["offset"].tolist() == expected

    case = bench.case(f"index a shard of {count} x {payload} B", "headers")
    case.add("jepa_fast", scan, check=same)
    case.add("tarfile headers", headers, check=lambda: None)
    case.add("webdataset read through", lambda: sum(1 for _ in webdataset.WebDataset(str(file), shardshuffle=False)), check=lambda: None)  # fmt: skip
    case.add("bytes read through", lambda: file.read_bytes(), check=lambda: None)
    if case.run():
        case.rate("samples_per_s", "1/s", count)
        case.compare("speedup_of_index_over_it", "jepa_fast", lambda own, index: own / index)
    print(case.table())


def loading(bench: Bench, folder: Path, jpegs: list[bytes], batches: int) -> None:
    count = BATCH * batches
    samples = ({"__key__": f"{i:06}", "jpg": jpegs[i % len(jpegs)]} for i in range(count))
    write_shards(folder, {"train": samples}, "load", SHARD * BATCH)
    os.sync()  # or writing to the disk would go on beside what is measured
    one = replace(preset("images"), {"data.path": str(folder), "data.workers": 1, "train.batch_size": BATCH})
    two = replace(one, {"data.workers": 2})
    source = open_dataset(one).train
    epochs, numbers = (column.tolist() for column in Order(count, BATCH, 0).samples(np.arange(count)))
    payloads = [jpegs[number % len(jpegs)] for number in numbers]
    out = np.empty((BATCH, 3, SIZE, SIZE), np.uint8)

    def ours_loader(config: Config = one, stop: int = batches) -> int:
        loader = Loader(config, source, 0, 0, 1, 0, stop)
        try:
            return sum(len(batch.inputs) for batch in loader)
        finally:
            loader.close()

    def loop(stop: int = count) -> None:
        for row, (payload, epoch, number) in enumerate(zip(payloads[:stop], epochs, numbers, strict=False)):
            out[row % BATCH] = ours(payload, "bilinear", augmentation(0, epoch, number))

    def same() -> None:
        loader = Loader(one, source, 0, 0, 1, 0, 1)
        loop(BATCH)
        np.testing.assert_array_equal(next(iter(loader)).inputs.numpy(), out)
        loader.close()

    bench.seconds *= 10  # a round takes seconds
    case = bench.case(f"loader {count} images, one thread", "uint8")
    case.add("jepa_fast", ours_loader, check=same)
    case.add("decode+crop in a loop", loop, check=same)
    if case.run():
        case.rate("images_per_s", "1/s", count)
        case.overhead("overhead_over_decode", over="decode+crop in a loop")
    print(case.table())
    bench.seconds /= 10

    few = [str(file) for file in sorted(folder.glob("*.tar"))][:2]
    images_of_few = min(count, 2 * SHARD * BATCH)

    def wds() -> int:
        rng = np.random.default_rng(0)
        pipeline = webdataset.WebDataset(few, shardshuffle=False).decode("pilrgb").to_tuple("jpg")
        made = pipeline.map_tuple(lambda pixels: torch.from_numpy(pillow_crop(pixels, "bilinear", rng))).batched(BATCH)
        return sum(len(batch[0]) for batch in made)

    def whole(call: Callable[[], int]) -> None:
        assert call() == images_of_few

    case = bench.case(f"loader {images_of_few} images against webdataset", "uint8")
    for name, call in {
        "jepa_fast": lambda: ours_loader(one, images_of_few // BATCH),
        "jepa_fast, two threads": lambda: ours_loader(two, images_of_few // BATCH),
        "webdataset": wds,
    }.items():
        case.add(name, call, check=lambda call=call: whole(call))
    if case.run():
        case.rate("images_per_s", "1/s", images_of_few)
        case.speedup("ratio_to_webdataset", over="webdataset")
    print(case.table())


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__, rounds=11, seconds=6.0).parse_args(argv)
    args.device, args.threads = "cpu", args.threads or 1
    bench = Bench("data", args, tests=TESTS)
    jpegs = photographs(2 if bench.tiny else 16)
    with tempfile.TemporaryDirectory() as folder:
        stages(bench, jpegs)
        for payload in (600, 110_000):
            indexing(bench, Path(folder) / f"index {payload}", payload, 20 if bench.tiny else 1250)
        loading(bench, Path(folder) / "load", jpegs, 4 if bench.tiny else 96)
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
