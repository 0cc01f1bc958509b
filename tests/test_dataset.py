"""Whatever files the data lie in, a run gets numbered samples, labels and a fingerprint, or one clear sentence."""

import io
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from jepa_fast.config import check, replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.readers import generated
from jepa_fast.data.sample import BadSample
from jepa_fast.data.shards.writer import write_shards
from jepa_fast.data.sources import fixed_draw
from jepa_fast.errors import UsageError
from jepa_fast.presets import PRESETS, preset


def small_images(path, **changes):
    return replace(preset("images"), {"data.path": str(path), "data.image_size": 32, "model.patch": 8, **changes})


def write_images(folder, count, size=(40, 50), start=0):
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(start + i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_class_folders_are_split_for_the_probe(tmp_path):
    write_images(tmp_path / "cats", 12)
    write_images(tmp_path / "dogs", 18, start=50)
    data = open_dataset(small_images(tmp_path))
    assert (len(data.train), len(data.probe_test), data.num_classes) == (24, 6, 2)
    keys = {data.train.key(i) for i in range(24)} | {data.probe_test.key(i) for i in range(6)}
    assert len(keys) == 30
    for i in range(24):
        assert data.train.labels[i] == int(data.train.key(i).startswith("dogs"))
    assert data.train.load(0, np.random.default_rng(0)).shape == data.shape == (3, 32, 32)
    assert "6 of the labelled samples held out" in data.description


def test_imagenet_layout_and_plain_folders(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / "in" / split / "n01440764", 3)
        write_images(tmp_path / "in" / split / "n02102040", 2)
    data = open_dataset(small_images(tmp_path / "in"))
    assert (len(data.train), len(data.probe_test), data.num_classes) == (5, 5, 2)
    write_images(tmp_path / "plain", 4)
    plain = open_dataset(small_images(tmp_path / "plain"))
    assert plain.probe_train is None and len(plain.train) == 4 and "no labels" in plain.description


def test_training_samples_are_augmented_and_probe_samples_are_not(tmp_path):
    write_images(tmp_path / "x", 2)
    source = open_dataset(small_images(tmp_path / "x")).train
    a, b = (source.load(0, np.random.default_rng(seed)) for seed in (1, 2))
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(a, source.load(0, np.random.default_rng(1)))
    np.testing.assert_array_equal(source.load(0, None), source.load(0, None))


@pytest.mark.parametrize("kind", ["py", "bin"])
def test_cifar_archives(tmp_path, kind):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 4, 3072), dtype=np.uint8), rng.integers(0, 10, (6, 4))
    folder = tmp_path / f"cifar-10-batches-{kind}"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"]):
        if kind == "py":
            (folder / name).write_bytes(pickle.dumps({"data": pixels[i], "labels": labels[i].tolist()}, protocol=i))
        else:
            (folder / f"{name}.bin").write_bytes(
                np.concatenate([labels[i][:, None].astype(np.uint8), pixels[i]], 1).tobytes()
            )
    data = open_dataset(replace(preset("cifar10-vitb"), {"data.path": str(tmp_path), "data.random_crop": False}))
    assert (len(data.train), len(data.probe_test), data.shape) == (20, 4, (3, 32, 32))
    np.testing.assert_array_equal(data.train.load(9, None), pixels[2, 1].reshape(3, 32, 32))
    assert data.train.labels.tolist() == labels[:5].ravel().tolist()


def test_cifar_batches_that_do_not_add_up_are_refused(tmp_path):
    def write(labels):
        for name in ("train", "test"):
            batch = {"data": np.zeros((3, 3072), np.uint8), "fine_labels": labels}
            (tmp_path / name).write_bytes(pickle.dumps(batch))
        open_dataset(small_images(tmp_path))

    write([0, 5, 99])
    with pytest.raises(UsageError, match="train holds 3 images and 2 labels"):
        write([0, 5])
    with pytest.raises(UsageError, match="train has labels from 0 to 100"):
        write([0, 5, 100])


def test_sets_of_different_shapes_are_not_mixed(tmp_path):
    for name, length in (("a", 20), ("b", 30)):
        (tmp_path / f"{name}.csv").write_text(
            "".join(f"{i % 2}," + ",".join(["1.5"] * length) + "\n" for i in range(9))
        )
    path = f"{tmp_path}/a.csv::{tmp_path}/b.csv"
    with pytest.raises(UsageError, match="different shapes"):
        open_dataset(replace(preset("series"), {"data.path": path, "data.weights": (1.0, 1.0)}))


def test_series_labels_are_numbered_over_both_files(tmp_path):
    (tmp_path / "F_TRAIN.tsv").write_text("-1\t1\t2\t3\t5\n1\t4\t5\t6\t1\n")
    (tmp_path / "F_TEST.tsv").write_text("1\t1\t2\t3\t7\n7\t4\t5\t6\t1\n")
    data = open_dataset(replace(preset("series"), {"data.path": str(tmp_path)}))
    assert data.train.labels.tolist() == [0, 1] and data.probe_test.labels.tolist() == [1, 2]
    assert data.shape == (1, 4) and data.num_classes == 3
    np.testing.assert_allclose(data.train.load(0, None).std(), 1, rtol=1e-5)


def test_a_label_filter_keeps_classes_and_renumbers_them(tmp_path):
    def samples(count):
        for i in range(count):
            yield {"__key__": f"{i:03}", "npy": np.full((1, 20), i, np.float32), "cls": i % 5}

    write_shards(tmp_path / "s", {"train": samples(50), "test": samples(20)}, "s", 20)
    (tmp_path / "list.txt").write_text("4\n1\n")
    config = replace(
        preset("series"),
        {"data.path": str(tmp_path / "s"), "data.label_filter": str(tmp_path / "list.txt"), "data.series_norm": "none"},
    )
    data = open_dataset(config)
    assert (len(data.train), len(data.probe_test), data.num_classes) == (20, 8, 2)
    for i in range(20):
        assert data.train.load(i, None)[0, 0] % 5 == (1, 4)[data.train.labels[i]]
    (tmp_path / "list.txt").write_text("9\n")
    with pytest.raises(UsageError, match="no sample"):
        open_dataset(config)


def test_the_fingerprint_tells_other_data(tmp_path):
    (tmp_path / "a.csv").write_text("0,1,2,3\n1,2,3,1\n")
    config = replace(preset("series"), {"data.path": str(tmp_path / "a.csv")})
    before = open_dataset(config).fingerprint
    assert open_dataset(config).fingerprint == before
    (tmp_path / "a.csv").write_text("0,1,2,3\n0,2,3,1\n")
    assert open_dataset(config).fingerprint != before


def test_the_embedded_sensor_set_is_what_it_says():
    data = open_dataset(replace(preset("demo"), {"data.embedded": "sensor"}))
    assert (len(data.train), len(data.probe_test), data.shape, data.num_classes) == (3601, 1320, (1, 500), 2)
    assert "synthetic" in data.description
    x, chosen = fixed_draw(data.train, 1000)
    y = data.train.labels[chosen]
    np.testing.assert_allclose(x.std(2), 1, atol=1e-4)
    power = np.abs(np.fft.rfft(x[:, 0], axis=1)) ** 2
    peak = [power[y == c, 10:60].mean(0).argmax() + 10 for c in (0, 1)]  # cycles of 500 samples
    assert abs(peak[0] / 500 - 0.045) < 0.008 and abs(peak[1] / 500 - 0.060) < 0.008


def test_textures_differ_by_the_radius_of_their_spectrum_only():
    rng = np.random.default_rng(0)
    radius = np.hypot(np.fft.fftfreq(48)[:, None], np.fft.fftfreq(48)[None, :])
    for label in range(4):
        fields = np.stack([generated.texture(label, 48, rng) for _ in range(40)])
        np.testing.assert_allclose(fields.std((1, 2)), 1)
        power = (np.abs(np.fft.fft2(fields)) ** 2).mean(0)
        ring = [power[abs(radius - r) < 0.012].mean() for r in (0.08, 0.11, 0.14, 0.17)]
        assert np.argmax(np.array(ring) / [3, 2, 1.5, 1]) in (label, max(0, label - 1))
        assert ring[label] == max(ring[label:])


def test_unreadable_samples_are_left_out_of_the_probe(tmp_path):
    write_images(tmp_path / "x", 6)
    (tmp_path / "x" / "3.png").write_bytes(b"rubbish")
    source = open_dataset(small_images(tmp_path / "x")).train
    inputs, numbers = fixed_draw(source, 100)
    assert len(inputs) == 5 and 3 not in numbers
    with pytest.raises(BadSample):
        source.load(3, None)


def test_the_large_textures_are_colour_jpegs_whose_spectrum_tells_their_class():
    fy, fx = np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None]
    radius, right = np.hypot(fy, fx), []
    for sample in itertools.islice(generated._textures224()["test"], 40):
        image = Image.open(io.BytesIO(sample["jpg"]))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))
        planes = np.asarray(image).astype(float)
        power = sum(np.abs(np.fft.fft2(planes[..., c])) ** 2 for c in range(3)) * radius**2  # the 1/f part made flat
        peaks = [power[np.abs(radius - 0.08 - 0.03 * label) < 0.012].max() for label in range(4)]
        right.append(np.argmax(peaks) == sample["cls"])
    assert np.mean(right) > 0.85


@pytest.mark.parametrize("name", [n for n in PRESETS if not preset(n).data.embedded and not preset(n).data.path])
def test_a_preset_without_its_data_says_in_one_line_what_to_put_where(name, tmp_path):
    for config in (preset(name), replace(preset(name), {"data.path": str(tmp_path / "missing")})):
        with pytest.raises(UsageError) as raised:
            open_dataset(config)
        assert "--data.path" in str(raised.value) and preset(name).data.hint in str(raised.value)
        assert "\n" not in str(raised.value)


def test_data_of_the_other_kind_are_pointed_to_the_right_preset(tmp_path):
    write_images(tmp_path / "pictures", 2)
    with pytest.raises(UsageError, match=r"jepa_fast.train images --data.path"):
        open_dataset(replace(preset("series"), {"data.path": str(tmp_path / "pictures")}))
    (tmp_path / "x.tsv").write_text("1\t2\n")
    with pytest.raises(UsageError, match=r"jepa_fast.train series --data.path"):
        open_dataset(small_images(tmp_path / "x.tsv"))
    with pytest.raises(UsageError, match=r"jepa_fast.train series --data.path"):
        open_dataset(small_images(generated.shards_of("sensor")[0]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no image"):
        open_dataset(small_images(tmp_path / "empty"))


def test_several_sets_are_mixed_by_weight_and_the_first_is_probed(tmp_path):
    for name, count in (("a", 20), ("b", 12)):
        write_images(tmp_path / name / "cats", count // 2)
        write_images(tmp_path / name / "dogs", count // 2, start=50)
    path = f"{tmp_path / 'a'}::{tmp_path / 'b'}"
    data = open_dataset(small_images(path, **{"data.weights": (3.0, 1.0)}))
    assert len(data.train) == 32 and data.train.sizes == [20, 12] and data.train.labels is None
    assert len(data.probe_train) + len(data.probe_test) == 20 and data.num_classes == 2
    assert any("the probe looks at" in note for note in data.notes)
    probed = {part.key(i) for part in (data.probe_train, data.probe_test) for i in range(len(part))}
    assert probed == {data.train.key(i) for i in range(20)}  # one name each: a bad one is counted once
    assert len(open_dataset(small_images(path)).train) == 32  # without weights: one set
    with pytest.raises(UsageError, match=r"--data.weights has 1 numbers and --data.path 2 entries"):
        open_dataset(small_images(path, **{"data.weights": (1.0,)}))
    with pytest.raises(UsageError, match=r"--data.weights .*0.001"):
        check(small_images(path, **{"data.weights": (1.0, 1e-6)}))


def test_an_image_that_cannot_be_read_is_a_bad_sample(tmp_path):
    write_images(tmp_path / "x", 3)
    source = open_dataset(small_images(tmp_path / "x")).train
    (tmp_path / "x" / "1.png").unlink()
    (tmp_path / "x" / "2.png").unlink()
    (tmp_path / "x" / "2.png").mkdir()
    for index, kind in ((1, "missing"), (2, "unreadable")):
        with pytest.raises(BadSample) as raised:
            source.load(index, None)
        assert raised.value.kind == kind


def test_a_class_is_what_occurs_whatever_its_number(tmp_path):
    def samples():
        for i in range(30):
            image = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(image, "PNG")
            yield {"__key__": f"{i:03}", "png": image.getvalue(), "cls": (7, 2**31 - 1)[i % 2]}

    data = open_dataset(small_images(write_shards(tmp_path / "d", {"train": samples()}, "s")))
    assert data.num_classes == 2 and set(data.probe_train.labels) == {0, 1} == set(data.probe_test.labels)
    for source in (data.probe_train, data.probe_test):
        assert all(source.labels[i] == int(source.key(i).rpartition(":")[2]) % 2 for i in range(len(source)))


def test_a_test_file_without_labels_means_no_probe(tmp_path):
    for name, label in (("TRAIN", "1"), ("TEST", "?")):
        (tmp_path / f"F_{name}.tsv").write_text("".join(f"{label}\t{i}\t2\t3\n" for i in range(12)))
    data = open_dataset(replace(preset("series"), {"data.path": str(tmp_path)}))
    assert data.probe_test is None and "no test labels" in data.description and len(data.train) == 12


def test_shards_that_nobody_can_count_are_refused_past_their_share(tmp_path):
    def opened(damaged):
        made = ({"__key__": f"{i}", "npy": np.zeros((1, 20), np.float32)} for i in range(12))
        folder = write_shards(tmp_path / f"{damaged}", {"train": made}, "s", 1)
        (folder / "_info.json").unlink()
        for shard in sorted(folder.glob("*.tar"))[:damaged]:
            shard.write_bytes(b"")
        return open_dataset(replace(preset("series"), {"data.path": str(folder), "data.channels": 1}))

    assert len(opened(2).lost) == 2
    with pytest.raises(
        UsageError, match=r"3 of 12 shards are damaged, more .* 0.01; the first: s-train-0000.tar is empty"
    ):
        opened(3)


def test_a_link_that_leads_nowhere_is_a_bad_sample(tmp_path):
    write_images(tmp_path / "x", 3)
    (tmp_path / "x" / "9.png").symlink_to(tmp_path / "gone.png")
    source = open_dataset(small_images(tmp_path / "x")).train
    with pytest.raises(BadSample, match="no longer there"):
        source.load(3, None)


def test_what_changed_is_named_by_class_folder(tmp_path):
    from jepa_fast.data.opened import changes

    write_images(tmp_path / "cats", 3)
    write_images(tmp_path / "dogs", 3, start=9)
    before = open_dataset(small_images(tmp_path)).contents
    (tmp_path / "dogs" / "0.png").unlink()
    write_images(tmp_path / "owls", 2, start=5)
    said = changes(before, open_dataset(small_images(tmp_path)).contents)
    assert said.startswith("dogs held 3 files") and "and holds 2 files" in said and "owls is new" in said
    assert changes(before, before) == ""
