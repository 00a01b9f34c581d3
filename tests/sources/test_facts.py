# SPDX-License-Identifier: Apache-2.0
"""Facts that are found without TensorFlow equal those that `data` finds."""

import json
import shutil
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

import data
from contrastive.sources import facts
from tests.support.image_data import write_pictures, write_records


def _assert_equal_to_outline(name, split="train", **options):
    """Asserts that facts are known and equal to those of `data.outline`."""
    found = facts.known_facts(name, split, **options)
    expected = data.outline(name, split, **options)
    assert found is not None
    for field in facts.Facts.__dataclass_fields__:
        assert getattr(found, field) == getattr(expected, field), field


@pytest.mark.parametrize("split", ["train", "test", "all", "train[:5%]+test"])
def test_facts_of_photo_patches_equal_the_outline(split):
    _assert_equal_to_outline("photo_patches", split)
    _assert_equal_to_outline("photo_patches", split, channels=3)


@pytest.mark.parametrize("name", facts._TFDS)
def test_facts_of_a_dataset_not_prepared_equal_the_outline(name, tmp_path):
    for channels in (None, 1):
        options = {"data_dir": str(tmp_path), "channels": channels}
        _assert_equal_to_outline(name, "train[:10%]", **options)
    assert str(tfds.builder(name).version) == facts._TFDS[name][0]


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("split", ["train", "train[25%:]", "train[:2shard]"])
def test_facts_of_a_prepared_folder_equal_the_outline(tmp_path, static, split):
    root = write_records(tmp_path / "records", 20, static, 6)
    _assert_equal_to_outline(root, split)
    _assert_equal_to_outline(root, split, channels=1)


def _prepare(root, name, version):
    """Writes 20 examples as a dataset of TFDS of this name."""
    folder = root / name / version
    write_records(root / "records", 20, True, 6)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(root / "records", folder)
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "name": name, "version": version}))


def test_facts_of_a_prepared_dataset_equal_the_outline(tmp_path):
    _prepare(tmp_path, "cifar10", "3.0.2")
    _prepare(tmp_path, "own_images", "1.0.0")
    options = {"data_dir": str(tmp_path)}
    for name in ("own_images", "own_images:1.0.0"):
        _assert_equal_to_outline(name, "train[:10]", **options)
    found = facts.known_facts("cifar10", "train[:10]", **options)
    assert (found.num_examples, found.notes) == (10, ())


def test_facts_of_another_version_are_those_of_a_dataset_not_prepared(tmp_path):
    _prepare(tmp_path, "cifar10", "2.9.0")
    _assert_equal_to_outline("cifar10", data_dir=str(tmp_path))


@pytest.mark.prepared_data
@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_facts_of_prepared_data_equal_the_outline(prepared, name):
    prepared(name, "train")
    _assert_equal_to_outline(name, "train[:90%]")


def test_facts_that_only_the_opener_finds_are_none(tmp_path):
    root = write_pictures(tmp_path / "images", ["train/a/0.png"])
    data_dir = str(tmp_path)
    for name in (root, "./nowhere", "x.npz", "cifar01", "gs://bucket/photos"):
        assert facts.known_facts(name, "train", data_dir=data_dir) is None
    assert facts.known_facts("photo_patches", "tset") is None
    assert facts.known_facts("photo_patches", "train", channels=1) is None
    assert facts.known_facts("cifar10", "train", data_dir="gs://b/d") is None
    _prepare(tmp_path, "cifar10", "3.0.2")
    assert facts.known_facts("cifar10", "tset", data_dir=data_dir) is None
    (tmp_path / "cifar10" / "3.0.2" / "features.json").write_text("{")
    assert facts.known_facts("cifar10", "train", data_dir=data_dir) is None


def test_facts_and_settings_of_views_are_imported_without_tensorflow():
    code = (
        "import sys; import contrastive.config.augmentation;"
        "from contrastive.sources import facts;"
        "print(facts.known_facts('photo_patches', 'test').num_examples);"
        "print(facts.known_facts('cifar10', 'train') is not None);"
        "heavy = {'tensorflow', 'keras', 'tensorflow_datasets', 'sklearn'};"
        "assert not heavy & {*sys.modules}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["2000", "True"], result.stderr
