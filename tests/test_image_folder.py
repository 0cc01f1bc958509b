"""Folders of images as people have them: links, splits of any name, and what systems leave between the data."""

import numpy as np
import pytest
from PIL import Image

from jepa_fast.config import replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.readers.image_folder import find, images_under
from jepa_fast.errors import UsageError
from jepa_fast.presets import preset


def write(folder, count=12, suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8))
        image.save(
            folder / f"{i}{suffix}",
            format={".jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".dib": "BMP"}[suffix.lower()],
        )
    return folder


def opened(root):
    return open_dataset(replace(preset("images"), {"data.path": str(root), "data.image_size": 16}))


def test_linked_class_folders_are_classes(tmp_path):
    source, root = tmp_path / "source", tmp_path / "root"
    for name in "abc":
        write(source / name)
    write(root / "a")
    for name in "bc":
        (root / name).symlink_to(source / name)
    data = opened(root)
    assert data.num_classes == 3 and len(images_under(root)) == 36


def test_a_linked_image_counts_and_a_loop_ends(tmp_path):
    write(tmp_path / "root/a"), write(tmp_path / "root/b")
    (tmp_path / "root/a/again").symlink_to(tmp_path / "root")
    (tmp_path / "root/b/self").symlink_to(tmp_path / "root/b")
    (tmp_path / "root/b/linked.jpg").symlink_to(tmp_path / "root/a/0.jpg")
    assert len(images_under(tmp_path / "root")) == 25


def test_what_systems_leave_between_data_is_passed_over(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b")
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "$RECYCLE.BIN"):
        write(tmp_path / name), write(tmp_path / "a" / name)
    assert opened(tmp_path).num_classes == 2 and len(images_under(tmp_path)) == 24


@pytest.mark.parametrize(("train", "test"), [
    ("train", "val"), ("Train", "Val"), ("TRAIN", "TEST"), ("training", "validation"), ("Training", "Testing"), ("train", "dev"),
    ("training_set", "test_set"), ("train-images", "val-images"), ("Training Set", "Test Set"), ("train", "valid"),
])  # fmt: skip
def test_splits_are_found_under_the_names_that_people_give_them(tmp_path, train, test):
    for name in "ab":
        write(tmp_path / train / name, 12), write(tmp_path / test / name, 5)
    data = opened(tmp_path)
    assert len(data.train) == 24 and len(data.probe_test) == 10 and data.num_classes == 2


def test_validation_goes_before_test_and_an_archive_in_a_folder_of_its_name_is_opened(tmp_path):
    for split, count in (("train", 9), ("val", 3), ("test", 2)):
        write(tmp_path / "name" / split / "a", count), write(tmp_path / "name" / split / "b", count)
    splits = find(tmp_path)
    assert splits["test"][0].name == "val" and len(splits["train"][1]) == 18 and len(splits["test"][1]) == 6


def test_classes_that_training_lacks_are_said(tmp_path):
    for name in "ab":
        write(tmp_path / "train" / name), write(tmp_path / "val" / name, 4)
    write(tmp_path / "val/z", 4)
    data = opened(tmp_path)
    assert data.num_classes == 2 and len(data.probe_test) == 8
    assert any("val has 1 classes that training lacks ('z')" in note for note in data.notes)


def test_a_class_called_train_is_not_taken_for_the_whole_silently(tmp_path):
    for name in ("train", "car", "plane"):
        write(tmp_path / name)
    assert any("car, plane next to it is not used" in note for note in opened(tmp_path).notes)


@pytest.mark.parametrize("more", [(), ("val",)])
def test_test_parts_alone_are_refused_in_one_line(tmp_path, more):
    for split in ("Test", *more):
        write(tmp_path / split / "a"), write(tmp_path / split / "b")
    with pytest.raises(UsageError, match=r"holds (Test|val) and no folder to train on: give .*(Test|val)"):
        opened(tmp_path)


def test_more_endings_of_the_formats_that_are_read(tmp_path):
    for suffix in (".jfif", ".jpe", ".dib", ".JPG"):
        write(tmp_path / suffix[1:], 6, suffix)
    data = opened(tmp_path)
    assert len(images_under(tmp_path)) == 24 and data.num_classes == 4
    assert data.train.load(0, None) is not None


def test_labels_that_look_like_numbers_of_samples_are_said(tmp_path):
    for i in range(20):
        write(tmp_path / f"sample{i}", 1)
    assert any("20 classes of 20 labelled samples" in note for note in opened(tmp_path).notes)
