# SPDX-License-Identifier: Apache-2.0
"""Data in a bucket: TensorFlow's file system in memory stands for gs://."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from etils.epath import gpath, register
from PIL import Image

import data
from contrastive import storage
from tests.support import program
from tests.support.image_data import write_pictures, write_records

_BUCKET = "ram://storage-test"


@pytest.fixture
def upload():
    """Returns a function that copies a local folder, and returns where to."""

    def copy(local, name="data"):
        root = f"{_BUCKET}/{name}"
        for folder, _, files in os.walk(local):
            target = os.path.join(root, os.path.relpath(folder, local))
            target = os.path.normpath(target).replace("ram:/", "ram://")
            tf.io.gfile.makedirs(target)
            for file in files:
                content = pathlib.Path(folder, file).read_bytes()
                with tf.io.gfile.GFile(f"{target}/{file}", "wb") as copied:
                    copied.write(content)
        return root

    yield copy
    tf.io.gfile.rmtree(_BUCKET)
    assert not tf.io.gfile.exists(f"{_BUCKET}/data")


def _write_folder(root):
    """Writes 60 images of two classes, and files that are to be skipped."""
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(60)]
    names += ["a/nested.d/60.png", "a/.hidden.png", ".hidden/61.png"]
    write_pictures(root, names)
    root = pathlib.Path(root)
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "b" / "text.jpg").write_text("this is no image")
    (root / "b" / "picture.webp").write_bytes(b"")
    (root / "b" / "README").write_text("")
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    Image.fromarray(noise).save(root / "b" / "cut.png")
    os.truncate(root / "b" / "cut.png", 60_000)  # of 68 kB


@pytest.mark.parametrize("split", ["train", "test", "all", "train[:50%]"])
@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_bucket_folder_is_loaded_as_the_local_one(tmp_path, upload, split, memory_limit):
    _write_folder(tmp_path)
    bucket = upload(tmp_path)
    local, remote = (
        data.load(root, split, memory_limit=memory_limit) for root in (str(tmp_path), bucket)
    )
    assert local.num_examples > 2
    assert remote.file_names == local.file_names
    assert remote.unreadable == local.unreadable
    assert remote.notes == local.notes
    assert remote.class_names == local.class_names
    np.testing.assert_array_equal(remote.source.labels, local.source.labels)
    described = data.describe(local).replace(str(tmp_path), bucket)
    assert data.describe(remote) == described
    here, there = (
        next(data.eval_stream(d, batch_size=4, image_size=8).as_numpy_iterator())
        for d in (local, remote)
    )
    np.testing.assert_array_equal(there["image"], here["image"])
    names = remote.names()
    assert names == local.names()


def test_bucket_folder_of_large_images_is_cropped_from_the_bucket(tmp_path, upload):
    names = [f"train/{'ab'[i % 2]}/{i}.jpg" for i in range(4)]
    write_pictures(tmp_path, names, size=(150, 140))
    remote = data.load(upload(tmp_path))
    assert remote.is_encoded
    assert remote.image_size == (140, 150)
    batch = next(data.eval_stream(remote, batch_size=4, image_size=32).as_numpy_iterator())
    assert not remote.undecodable
    assert batch["weight"].tolist() == [1, 1, 1, 1]
    assert batch["label"].tolist() == [0, 0, 1, 1]


def test_run_on_a_bucket_folder_is_evaluated_on_its_test_split(tmp_path, upload):
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(80)]
    bucket = upload(write_pictures(tmp_path / "images", names, size=(16, 16)))
    code = program.main(
        "--mode=train_then_eval",
        f"--dataset={bucket}",
        f"--model_dir={tmp_path}/run",
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        "--train_batch_size=8",
        "--train_steps=2",
    )
    assert code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    local = data.load(str(tmp_path / "images"), "test")
    assert result["split"] == "test"
    assert result["num_examples"] == local.num_examples > 2


def test_fingerprint_of_a_bucket_changes_with_a_file(tmp_path, upload):
    write_pictures(tmp_path, ["train/0.png", "train/1.png"], size=(150, 150))
    bucket = upload(tmp_path)
    dataset = data.load(bucket)
    before = dataset.fingerprint()
    assert data.load(bucket).fingerprint() == before
    with tf.io.gfile.GFile(dataset.source.paths[1], "ab") as file:
        file.write(b"more")
    assert dataset.fingerprint() != before


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_masks_in_a_bucket_are_found_and_read(tmp_path, upload, memory_limit):
    images = write_pictures(tmp_path / "images", ["train/a/0.png", "train/a/1.png"], size=(12, 12))
    half = np.zeros((12, 12), np.uint8)
    half[:6] = 255
    (tmp_path / "masks/train/a").mkdir(parents=True)
    Image.fromarray(half).save(tmp_path / "masks/train/a/0.png")
    dataset = data.load(
        upload(images),
        mask_dir=upload(tmp_path / "masks", "masks"),
        memory_limit=memory_limit,
    )
    assert "masks of 1 images" in data.describe(dataset)
    masks = dataset.masks
    if memory_limit == 0:
        masks = masks(tf.zeros((2, 12, 12, 3), tf.uint8), tf.constant([0, 1]))
    expected = [half // 255, np.ones((12, 12))]
    np.testing.assert_array_equal(np.asarray(masks) > 0, expected)


def test_empty_mask_folder_of_a_bucket_is_named(tmp_path, upload):
    bucket = upload(write_pictures(tmp_path, ["train/0.png"]))
    with pytest.raises(ValueError, match=f"in '{bucket}/none'"):
        data.load(bucket, mask_dir=f"{bucket}/none")


def test_archive_in_a_bucket_is_loaded_as_the_local_one(tmp_path, upload):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 6, 6, 3), np.uint8)
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=images, labels=np.arange(40) % 3)
    local, remote = (data.load(f"{root}/x.npz") for root in (tmp_path, upload(tmp_path)))
    np.testing.assert_array_equal(remote.source.images, local.source.images)
    np.testing.assert_array_equal(remote.source.labels, local.source.labels)
    assert remote.notes == local.notes
    with pytest.raises(ValueError, match=f"No .npz.*{_BUCKET}/data/y.npz"):
        data.load(f"{_BUCKET}/data/y.npz")


def test_bucket_data_is_outlined_as_it_is_loaded(tmp_path, upload):
    np.savez(tmp_path / "x.npz", images=np.zeros((40, 6, 6, 1), np.uint8))
    write_pictures(tmp_path / "images", [f"train/a/{i}.png" for i in range(5)])
    bucket = upload(tmp_path)
    for name in ("x.npz", "images"):
        dataset = data.load(f"{bucket}/{name}")
        outlined = data.outline(f"{bucket}/{name}")
        assert outlined.num_examples == dataset.num_examples
        assert outlined.image_size == dataset.image_size
        assert outlined.channels == dataset.channels
    nowhere = data.outline(f"{bucket}/nowhere")
    assert "not here" in nowhere.notes[0]


@pytest.fixture
def epath_in_memory(monkeypatch):
    """Lets TFDS's paths, which know gs://, know ram:// as well."""
    monkeypatch.setattr(gpath, "_URI_PREFIXES", ("ram://",))
    monkeypatch.setattr(gpath, "_URI_SCHEMES", frozenset(["ram"]))
    monkeypatch.setattr(gpath, "_URI_MAP_ROOT", {"ram://": "/ram/"})
    backends = gpath._PREFIX_TO_BACKEND
    monkeypatch.setitem(backends, "ram", backends["gs"])
    classes = register._URI_PREFIXES_TO_CLS
    monkeypatch.setitem(classes, "ram://", classes["gs://"])


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_tfds_folder_in_a_bucket_is_loaded_as_the_local_one(
    tmp_path, upload, epath_in_memory, memory_limit
):
    local = write_records(tmp_path / "a", 20, static=True, per_shard=6)
    bucket = upload(tmp_path)
    here, there = (
        data.load(root, "train[3:]", memory_limit=memory_limit) for root in (local, f"{bucket}/a")
    )
    assert there.num_examples == here.num_examples == 17
    assert there.is_encoded == (memory_limit == 0)
    np.testing.assert_array_equal(there.labels(), here.labels())
    assert there.has_labels()
    outlined = data.outline(f"{bucket}/a", "train[3:]")
    assert outlined.num_examples == 17
    assert outlined.class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ram://storage-test/nowhere", "no such folder.*storage-test/nowhere"),
        ("ram://storage-test/nowhere.npz", "No .npz archive"),
        ("other://bucket/folder", "other://bucket/folder.*cannot be read"),
        ("other://bucket/x.npz", "No .npz archive.*'other' not implemented"),
    ],
)
def test_bucket_that_is_missing_or_unreachable_is_one_line(name, message):
    with pytest.raises(ValueError, match=message) as error:
        data.load(name)
    assert "\n" not in str(error.value)


def test_unreachable_bucket_is_outlined_from_imagenet(monkeypatch):
    def fail(path):
        raise tf.errors.FailedPreconditionError(None, None, "no\n\t network")

    monkeypatch.setattr(tf.io.gfile, "stat", fail)
    dataset = data.outline("gs://bucket/photos")
    assert "not here" in dataset.notes[0]
    with pytest.raises(ValueError, match="'gs://bucket/photos' cannot be read: no network.$"):
        data.load("gs://bucket/photos")


def test_image_that_may_not_be_read_is_unreadable_as_a_local_one_is(tmp_path, upload, monkeypatch):
    names = [f"train/a/{i}.png" for i in range(3)]
    bucket = upload(write_pictures(tmp_path, names, size=(16, 16)))

    def open_binary(path):
        if path.endswith("1.png"):
            raise tf.errors.PermissionDeniedError(None, None, "403")
        return open_any(path)

    open_any = storage.open_binary
    monkeypatch.setattr(storage, "open_binary", open_binary)
    dataset = data.load(bucket)
    assert dataset.unreadable == ("train/a/1.png",)
    assert dataset.num_examples == 2


def test_unreachable_folder_of_tfds_is_one_line(monkeypatch):
    def fail(*_):
        raise tf.errors.FailedPreconditionError(None, None, "no\n\t network")

    monkeypatch.setattr(tf.io.gfile, "exists", fail)
    with pytest.raises(ValueError, match="'gs://a/b': .* no network") as error:
        data.load("cifar10", data_dir="gs://a/b")
    assert "\n" not in str(error.value)


def test_unreachable_archive_is_one_line(monkeypatch):
    def fail(path):
        raise tf.errors.FailedPreconditionError(None, None, "no\n\t network")

    monkeypatch.setattr(storage, "open_binary", fail)
    with pytest.raises(ValueError, match="gs://b/x.npz' .no network.[.]$"):
        data.load("gs://b/x.npz")


def test_file_names_of_a_google_bucket_need_one_request_a_folder(monkeypatch):
    """Google's listings mark folders; other systems are asked."""
    listings = {
        "gs://b/f": ["a/", "b.d/", ".hidden/", "x.png", "NOTICE", ""],
        "gs://b/f/a": ["0.png", ".hidden.png"],
        "gs://b/f/b.d": ["c/"],
        "gs://b/f/b.d/c": ["1.jpg"],
    }
    asked = []

    def listdir(path):
        asked.append(path)
        return listings[path]

    monkeypatch.setattr(tf.io.gfile, "listdir", listdir)
    monkeypatch.delattr(tf.io.gfile, "isdir")
    names = sorted(storage.file_names("gs://b/f"))
    assert names == ["NOTICE", "a/0.png", "b.d/c/1.jpg", "x.png"]
    assert sorted(asked) == sorted(listings)


def test_file_names_follow_local_links(tmp_path):
    write_pictures(tmp_path / "elsewhere", ["0.png"])
    root = tmp_path / "root"
    write_pictures(root, ["a/1.png", ".hidden/2.png"])
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    assert sorted(storage.file_names(str(root))) == ["a/1.png", "linked/0.png"]


@pytest.mark.parametrize("content", ["ü", b"\x00\xff"])
@pytest.mark.parametrize("is_remote", [False, True])
def test_write_whole_makes_the_folder_and_replaces_the_file(tmp_path, upload, is_remote, content):
    bucket = upload(tmp_path)
    folder = f"{bucket}/new" if is_remote else str(tmp_path / "new")
    path = f"{folder}/file"
    storage.write_whole(path, "before, and longer")
    storage.write_whole(path, content)
    with storage.open_binary(path) as file:
        written = file.read()
    assert written == (content.encode() if content == "ü" else content)
    assert tf.io.gfile.listdir(folder) == ["file"]


def test_write_whole_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        storage.write_whole(str(tmp_path / "taken"), "text")
    assert os.listdir(tmp_path) == ["taken"]


def test_write_whole_gives_the_permissions_of_open(tmp_path):
    storage.write_whole(str(tmp_path / "whole"), "")
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize("name", ["ckpt-4", 'ü"ñ ł-4'])
def test_latest_checkpoint_equals_tensorflow(tmp_path, is_relative, name):
    def newest():
        expected = tf.train.latest_checkpoint(str(tmp_path))
        assert storage.latest_checkpoint(str(tmp_path)) == expected
        assert storage.latest_checkpoint(f"{tmp_path}/") == expected
        return expected

    assert newest() is None
    prefix = name if is_relative else str(tmp_path / name)
    tf.compat.v1.train.update_checkpoint_state(
        str(tmp_path), prefix, all_model_checkpoint_paths=["ckpt-2", prefix]
    )
    assert newest() is None
    (tmp_path / f"{name}.index").write_bytes(b"")
    assert newest() == str(tmp_path / name)


def test_latest_checkpoint_equals_tensorflow_for_a_manager(tmp_path):
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(x=tf.Variable(1.0)), str(tmp_path), max_to_keep=2
    )
    for _ in range(3):
        manager.save()
        expected = tf.train.latest_checkpoint(str(tmp_path))
        assert storage.latest_checkpoint(str(tmp_path)) == expected is not None


def test_local_paths_need_no_tensorflow(tmp_path):
    code = f"""
import sys
from contrastive import storage
path = {str(tmp_path)!r}
assert storage.exists(path) and storage.is_folder(path)
assert storage.is_reachable(path) and not storage.why_unreachable(path)
assert storage.latest_checkpoint(path) is None
assert storage.is_remote("gs://bucket") and not storage.is_remote(path)
storage.write_whole(path + "/file", "text")
assert list(storage.file_names(path)) == ["file"]
assert "tensorflow" not in sys.modules and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
