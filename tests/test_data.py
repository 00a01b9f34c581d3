# SPDX-License-Identifier: Apache-2.0
"""Tests of `data.py`: order, resume, replicas, sources and their reports."""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

import data
import data_util

_VIEW = data_util.Augmentation(size=8)
_SMALL_VIEW = data_util.Augmentation(size=4)
_WHOLE = {}  # what the fixture `whole` has read, by dataset


def _picture(value, size=(12, 10), mode="RGB"):
    """Returns a picture of one colour, `value` in the first channel."""
    depth = len(Image.new(mode, (1, 1)).getbands())
    colour = (value, *(255 - value,) * (depth - 1))
    return Image.new(mode, size, colour if depth > 1 else value)


def _write(root, names, **picture):
    """Writes a picture a name; the i-th has the value i."""
    for value, name in enumerate(names):
        path = pathlib.Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture(value, **picture).save(path)
    return str(root)


def _write_records(root, num_examples, static, per_shard):
    """Writes a TFDS dataset of PNGs, label = id // 8, in several shards."""
    shape = (12, 12, 3) if static else (None, None, 3)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="shards",
            version=tfds.core.Version("1.0.0"),
            data_dir=str(root),
            module_name="",
        ),
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(
                    shape=shape, encoding_format="png"
                ),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            }
        ),
    )
    os.makedirs(root, exist_ok=True)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=per_shard)
    writer.initialize_splits(["train"])
    examples = [
        {"image": np.asarray(_picture(i, (12, 12))), "label": i // 8}
        for i in range(num_examples)
    ]
    writer.add_examples({"train": examples})
    writer.close_all()
    return str(root)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Returns a dataset of 23 examples from each source, example i first."""
    root = tmp_path_factory.mktemp("sources")
    images = np.arange(23, dtype=np.uint8)[:, None, None, None]
    images = np.tile(images, (1, 6, 5, 2))
    np.savez(root / "arrays.npz", images=images, labels=np.arange(23) // 8)
    names = [f"train/{'abc'[i // 8]}/{i:03}.png" for i in range(23)]
    _write(root / "files", names, size=(200, 150))
    _write_records(root / "records", 23, static=False, per_shard=4)
    records = data.load(str(root / "records"))
    two = dataclasses.replace(records.source, shards_per_group=2)
    return {
        "arrays": data.load(str(root / "arrays.npz")),
        "files": data.load(str(root / "files")),
        "records": dataclasses.replace(records, source=two),
    }


@pytest.fixture(params=["arrays", "files", "records"])
def source(request, sources, monkeypatch):
    """Returns each dataset in turn; crops are corners, quick to trace."""

    def corner(encoded, size, channels):
        image = tf.io.decode_png(encoded, channels)[:size, :size]
        return tf.ensure_shape(image, (size, size, channels))

    monkeypatch.setattr(
        data_util,
        "decode_crop",
        lambda encoded, _, view, channels: corner(encoded, view.size, channels),
    )
    monkeypatch.setattr(
        data_util,
        "decode_center_crop",
        lambda encoded, size, _, channels: corner(encoded, size, channels),
    )
    return sources[request.param]


@pytest.fixture
def whole(source):
    """Returns 15 elements of 5 examples of the train stream of `source`."""
    if source.name not in _WHOLE:
        _WHOLE[source.name] = _train(source, num_steps=15)
    return _WHOLE[source.name]


def _views(dataset):
    return (_VIEW, _VIEW) if dataset.is_encoded else ()


def _train(dataset, batch_size=5, seed=1, **layout):
    """Returns the elements of a train stream."""
    stream = data.train_stream(
        dataset,
        batch_size=batch_size,
        seed=seed,
        views=_views(dataset),
        **layout,
    )
    return list(stream.as_numpy_iterator())


def _joined(elements):
    """Returns the elements end to end."""
    return {
        key: np.concatenate([element[key] for element in elements])
        for key in elements[0]
    }


def _assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key], key)


# Order


@pytest.mark.parametrize("size", [1, 2, 23, 1000, 4096])
def test_permutation_has_each_index_once(size):
    index = tf.range(size, dtype=tf.int64)
    permuted = data._permute(index, size, 0, 1, tf.constant(2, tf.int64))
    np.testing.assert_array_equal(np.sort(permuted), index)


def test_permutations_of_neighbouring_epochs_and_seeds_do_not_correlate():
    # 4,096 = 2^12, where the public `index_shuffle` correlates most.
    index = tf.range(4096, dtype=tf.int64)
    orders = [index] + [
        data._permute(index, 4096, use, seed, tf.constant(epoch, tf.int64))
        for use in (0, 1)
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    ]
    correlation = np.corrcoef(np.stack(orders)) - np.eye(len(orders))
    assert np.abs(correlation).max() < 5 / 4096**0.5


def test_every_epoch_has_each_example_once_in_another_order(whole):
    batch = _joined(whole)
    np.testing.assert_array_equal(batch["epoch"], np.arange(75) // 23)
    epochs = batch["id"][: 3 * 23].reshape(3, 23)
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_id_and_label_belong_to_the_image(source, whole):
    batch = _joined(whole)
    images = batch["crops"][:, 0] if source.is_encoded else batch["image"]
    np.testing.assert_array_equal(images[:, 0, 0, 0], batch["id"])
    np.testing.assert_array_equal(batch["label"], batch["id"] // 8)


@pytest.mark.parametrize("first_step", [0, 4, 13])
def test_resumed_stream_is_the_tail_of_the_uninterrupted_one(
    source, whole, first_step
):
    tail = _train(source, first_step=first_step, num_steps=15 - first_step)
    _assert_equal(_joined(tail), _joined(whole[first_step:]))


def test_order_depends_on_the_seed(source, whole):
    other = _train(source, seed=2, num_steps=15)
    assert not np.array_equal(_joined(other)["id"], _joined(whole)["id"])


def test_resumed_stream_reads_no_earlier_group(sources, monkeypatch):
    groups = []
    load = data._Groups._load

    def spy(self, group):
        tf.py_function(lambda g: groups.append(int(g)), [group], [])
        return load(self, group)

    monkeypatch.setattr(data._Groups, "_load", spy)
    records = sources["records"]
    assert records.source.shards_per_group == 2
    _train(records, batch_size=23, first_step=5, num_steps=1)
    assert min(groups) == 5 * 3  # three groups an epoch


def test_stream_without_a_number_of_steps_is_endless(source):
    stream = data.train_stream(
        source, batch_size=23, seed=0, views=_views(source)
    )
    epochs = [batch["epoch"][0] for batch in stream.take(3)]
    assert epochs == [0, 1, 2]


# Replicas


def _global_steps(dataset, stream, num_replicas, num_pipelines):
    """Returns the global batches that all pipelines yield together."""
    pipelines = [
        list(
            stream(
                dataset,
                num_replicas=num_replicas,
                num_pipelines=num_pipelines,
                pipeline_index=index,
            ).as_numpy_iterator()
        )
        for index in range(num_pipelines)
    ]
    assert len({len(elements) for elements in pipelines}) == 1
    local = num_replicas // num_pipelines
    steps = range(0, len(pipelines[0]), local)
    return [
        _joined([e for p in pipelines for e in p[step : step + local]])
        for step in steps
    ]


def _train_steps(dataset, **layout):
    return data.train_stream(
        dataset,
        batch_size=8,
        seed=1,
        first_step=2,
        num_steps=4,
        views=_views(dataset),
        **layout,
    )


def _eval_steps(dataset, **layout):
    return data.eval_stream(dataset, batch_size=8, image_size=6, **layout)


@pytest.mark.parametrize("stream", [_train_steps, _eval_steps])
def test_replicas_and_hosts_see_the_global_batches_of_one(source, stream):
    expected = _global_steps(source, stream, 1, 1)
    for layout in ((2, 1), (4, 2)):
        actual = _global_steps(source, stream, *layout)
        for one, other in zip(expected, actual, strict=True):
            _assert_equal(other, one)


def test_stream_runs_under_a_strategy(source):
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    stream = strategy.distribute_datasets_from_function(
        lambda context: _train_steps(
            source,
            num_replicas=context.num_replicas_in_sync,
            pipeline_index=context.input_pipeline_id,
            num_pipelines=context.num_input_pipelines,
        )
    )
    ids = [batch["id"].numpy() for batch in stream]
    expected = [batch["id"] for batch in _train_steps(source)]
    np.testing.assert_array_equal(ids, expected)


def test_shapes_are_static(source):
    layout = {"num_replicas": 2}
    for stream in (_train_steps, _eval_steps):
        for spec in tf.nest.flatten(stream(source, **layout).element_spec):
            assert spec.shape.is_fully_defined()
            assert spec.shape[0] == 4


def test_views_of_two_sizes_come_as_a_tuple(sources):
    stream = data.train_stream(
        sources["files"], batch_size=2, seed=0, views=(_VIEW, _SMALL_VIEW)
    )
    crops = next(stream.as_numpy_iterator())["crops"]
    assert [crop.shape for crop in crops] == [(2, 8, 8, 3), (2, 4, 4, 3)]


def test_views_of_an_image_differ(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    os.mkdir(tmp_path / "train")
    Image.fromarray(noise).save(tmp_path / "train" / "noise.png")
    dataset = data.load(str(tmp_path))
    crops = _train(dataset, batch_size=1, num_steps=2)
    views = [*crops[0]["crops"][0], *crops[1]["crops"][0]]
    assert len({view.tobytes() for view in views}) == 4


# Evaluation


def test_evaluation_has_each_example_once_and_then_padding(source):
    batch = _joined(
        list(
            data.eval_stream(
                source, batch_size=8, image_size=6
            ).as_numpy_iterator()
        )
    )
    padding = [-1]
    np.testing.assert_array_equal(batch["id"], [*range(23), *padding])
    np.testing.assert_array_equal(batch["weight"], [1] * 23 + [0])
    labels = [i // 8 for i in range(23)]
    np.testing.assert_array_equal(batch["label"], labels + padding)
    np.testing.assert_array_equal(batch["image"][:23, 0, 0, 0], range(23))


def test_evaluation_batch_may_exceed_the_dataset(source):
    batches = list(
        data.eval_stream(source, batch_size=40, image_size=6, num_replicas=2)
    )
    assert [float(np.sum(b["weight"])) for b in batches] == [20, 3]


# Folders


def test_class_folders_are_split_by_a_stable_hash(tmp_path):
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(80)]
    root = _write(tmp_path, names)
    train, test = data.load(root), data.load(root, "test")
    assert train.class_names == test.class_names == ("a", "b")
    held_out = [n for n in names if _hash(n) % 10 == 0]
    assert 2 < test.num_examples == len(held_out) < 20
    assert train.num_examples + test.num_examples == 80
    assert data.load(root, "all").num_examples == 80


def _hash(name):
    return int(hashlib.blake2b(name.encode(), digest_size=4).hexdigest(), 16)


@pytest.mark.parametrize("prefix", ["", "train/", "Training/"])
def test_flat_folder_is_unlabelled(tmp_path, prefix):
    root = _write(tmp_path, [f"{prefix}{i}.png" for i in range(30)])
    dataset = data.load(root)
    assert dataset.num_classes == 0
    assert set(dataset.source.labels) == {-1}
    assert "unlabelled" in data.describe(dataset)


def test_class_index_is_the_same_in_every_split(tmp_path):
    names = ["train/a/0.png", "train/b/1.png", "val/b/2.png", "val/b/s/3.png"]
    root = _write(tmp_path, names)
    dataset = data.load(root, "validation")
    assert dataset.class_names == ("a", "b")
    assert list(dataset.source.labels) == [1, 1]
    assert "without examples in this split: a" in data.describe(dataset)


def test_report_names_what_was_skipped_and_counts_classes(tmp_path):
    root = _write(tmp_path / "x", [f"train/a/{i}.png" for i in range(3)])
    folder = tmp_path / "x" / "train" / "a"
    whole = (folder / "0.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    os.truncate(folder / "cut.png", 8000)  # of 11 kB: the header is whole
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.bmp").write_text("no image")
    (folder / "appended.png").write_bytes(whole + b"a few bytes more")
    (folder / "picture.webp").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(b"")
    dataset = data.load(root)
    report = data.describe(dataset)
    assert dataset.num_examples == 4
    assert "3 unreadable, skipped: " in report
    for name in ("cut.png", "empty.jpg", "text.bmp"):
        assert name in report
    assert "'.webp': 1" in report
    assert "a: 4" in report
    assert "'a' is the only folder" in report


def test_image_that_breaks_later_becomes_grey_and_is_named(tmp_path):
    names = [f"train/a/{i:02}.png" for i in range(20)]
    root = _write(tmp_path, names, size=(200, 200))
    dataset = data.load(root)
    broken = dataset.source.paths[7]
    os.truncate(broken, 60)
    os.remove(dataset.source.paths[18])
    batch = _joined(_train(dataset, batch_size=20, num_steps=2))
    lost = np.isin(batch["id"], [7, 18])
    assert np.sum(lost) == 4
    np.testing.assert_array_equal(batch["label"], np.where(lost, -1, 0))
    assert (batch["crops"][lost] == 128).all()
    assert (batch["crops"][~lost][..., 0] < 20).all()
    assert broken in data.describe(dataset)
    evaluated = _joined(list(_eval_steps(dataset).as_numpy_iterator()))
    np.testing.assert_array_equal(evaluated["id"][:20], range(20))
    assert evaluated["weight"].sum() == 18


def test_many_broken_images_end_the_stream(tmp_path):
    names = [f"train/a/{i:02}.png" for i in range(20)]
    dataset = data.load(_write(tmp_path, names, size=(200, 200)))
    for path in dataset.source.paths[:11]:
        os.truncate(path, 60)
    with pytest.raises(tf.errors.OpError, match="11 did not decode"):
        _train(dataset, batch_size=20, num_steps=1)


def test_small_images_of_one_size_are_held_in_memory(tmp_path):
    names = [f"train/{i}.png" for i in range(5)]
    root = _write(tmp_path / "small", names, size=(12, 10))
    dataset = data.load(root)
    assert not dataset.is_encoded
    assert dataset.image_size == (10, 12)
    np.testing.assert_array_equal(
        dataset.source.images[:, 0, 0, 0], [0, 1, 2, 3, 4]
    )
    assert data.load(root, memory_limit=5 * 360 - 1).is_encoded
    root = _write(tmp_path / "large", names, size=(129, 10))
    assert data.load(root).is_encoded


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("L", 1), ("L", 3), ("RGB", 1), ("RGBA", 4), ("RGB", 4), ("I;16", 1)],
)
@pytest.mark.parametrize("size", [(12, 10), (150, 150)])
def test_channels_are_those_asked_for(tmp_path, mode, channels, size):
    os.mkdir(tmp_path / "train")
    picture = Image.new(mode, size, 0x2000 if mode == "I;16" else None)
    picture.save(tmp_path / "train" / "0.png")
    dataset = data.load(str(tmp_path), channels=channels)
    batch = next(iter(_eval_steps(dataset)))
    assert batch["weight"][0] == 1
    assert batch["image"].shape[-1] == channels
    assert not dataset.undecodable
    if mode == "I;16":
        assert batch["image"][0, 0, 0, 0] == 0x20
        assert "16 bits" in data.describe(dataset)


def test_dropped_alpha_is_said(tmp_path):
    root = _write(tmp_path, ["train/0.png"], mode="RGBA")
    assert "alpha channel" in data.describe(data.load(root))
    assert "alpha channel" not in data.describe(data.load(root, channels=4))


def test_jpeg_gif_and_bmp_are_read(tmp_path):
    names = [f"train/{i}.{e}" for i, e in enumerate(("jpg", "gif", "bmp"))]
    dataset = data.load(_write(tmp_path, names))
    assert dataset.num_examples == 3
    assert not dataset.undecodable
    with pytest.raises(ValueError, match="each format decodes to.*JPEG"):
        data.load(str(tmp_path), channels=4)


# Arrays


def test_npz_may_have_any_channels_and_no_labels(tmp_path):
    path = str(tmp_path / "x.npz")
    np.savez(path, images=np.zeros((10, 4, 4, 6), np.uint8))
    dataset = data.load(path, "train[:50%]")
    assert (dataset.num_examples, dataset.channels) == (5, 6)
    assert dataset.num_classes == 0
    with pytest.raises(ValueError, match="6 channels.*channels=3"):
        data.load(path, channels=3)


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros(3)},
        {"images": np.zeros((3, 4, 4, 3), np.float32)},
        {"images": np.zeros((3, 4, 4), np.uint8)},
        {"images": np.zeros((3, 4, 4, 3), np.uint8), "labels": np.zeros(3)},
        {"images": np.zeros((3, 4, 4, 3), np.uint8), "labels": np.arange(2)},
    ],
)
def test_npz_of_other_arrays_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match="must hold `images`, uint8"):
        data.load(str(tmp_path / "x.npz"))


# Photo patches


def test_photo_patches_are_the_same_bits_everywhere():
    train, test = (data.load("photo_patches", s) for s in ("train", "test"))
    assert train.num_examples, test.num_examples == (10_000, 2_000)
    assert np.ptp(np.bincount(train.source.labels, minlength=16)) == 0
    digests = [
        hashlib.sha256(d.source.images.tobytes()).hexdigest()[:16]
        for d in (train, test)
    ]
    assert digests == ["e3b84fb10076b65d", "ffe4e6615ba74217"]


@pytest.mark.parametrize("size", [(451, 300), (303, 384)])
def test_train_and_test_patches_share_no_pixel(size):
    boxes = {
        split: np.array(
            [
                data._patch_box(size, split, np.random.RandomState(seed))
                for seed in range(500)
            ]
        )
        for split in ("train", "test")
    }
    seen = {split: np.zeros(size, bool) for split in boxes}
    for split, all_boxes in boxes.items():
        assert (all_boxes >= 0).all()
        assert (all_boxes[:, 2:] <= size).all()
        for left, top, right, bottom in all_boxes:
            assert right - left == bottom - top
            seen[split][left:right, top:bottom] = True
    assert not (seen["train"] & seen["test"]).any()
    assert seen["train"].mean() > 0.6
    assert seen["test"].mean() > 0.2


# TFDS


def test_slices_and_sums_of_splits_are_read(tmp_path):
    root = _write_records(tmp_path, 20, static=True, per_shard=6)
    dataset = data.load(root, "train[25%:75%]+train[-2:]")
    assert not dataset.is_encoded
    np.testing.assert_array_equal(
        dataset.source.images[:, 0, 0, 0], [*range(5, 15), 18, 19]
    )
    encoded = data.load(root, "train[25%:75%]+train[-2:]", memory_limit=0)
    batch = _joined(list(_eval_steps(encoded).as_numpy_iterator()))
    np.testing.assert_array_equal(
        batch["image"][:12, 0, 0, 0], dataset.source.images[:, 0, 0, 0]
    )
    np.testing.assert_array_equal(batch["id"][:12], range(12))


def _prepared(name, split):
    if not tfds.builder(name).is_prepared():
        pytest.skip(f"{name} is not prepared in {tfds.builder(name).data_dir}")
    return data.load(name, split)


def test_cifar10_is_loaded_as_tfds_reads_it():
    dataset = _prepared("cifar10", "test[:1000]")
    assert dataset.class_names[:2] == ("airplane", "automobile")
    expected = tfds.load("cifar10", split="test[:1000]", batch_size=-1)
    np.testing.assert_array_equal(dataset.source.images, expected["image"])
    np.testing.assert_array_equal(dataset.source.labels, expected["label"])


def test_imagenet_is_cropped_on_the_host():
    dataset = _prepared("imagenet2012", "train")
    assert dataset.image_size is None
    assert dataset.num_classes == 1000
    batch = _joined(_train(dataset, batch_size=4, num_steps=1))
    assert batch["crops"].shape == (4, 2, 8, 8, 3)
    assert not dataset.undecodable


# Errors


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cifar11", "train", "no dataset of this name.*'cifar10'"),
        ("./nowhere", "train", "no such folder.*nowhere"),
        ("./nowhere.npz", "train", "No .npz archive"),
        ("photo_patches", "tset", "'tset'.*{'train': 10000, 'test': 2000}"),
        ("photo_patches", "train[:0%]", "no examples in split"),
    ],
)
def test_unknown_name_or_split_is_explained(name, split, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, split)


def test_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.webp").write_bytes(b"")
    with pytest.raises(ValueError, match="no images.*'.webp': 1"):
        data.load(str(tmp_path))


def test_folder_of_broken_images_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="can be decoded: train.a.png"):
        data.load(str(tmp_path))


def test_folder_too_small_to_hold_out_a_test_split_is_refused(tmp_path):
    root = _write(tmp_path, ["a/0.png"])
    with pytest.raises(ValueError, match="no examples in split 'test'"):
        data.load(root, "test")


def test_failed_preparation_names_the_folder(tmp_path, monkeypatch):
    def fail(self):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(ValueError, match=f"{tmp_path}.*no network.*tfds build"):
        data.load("mnist", data_dir=str(tmp_path))


def test_batches_that_cannot_be_are_refused(sources):
    arrays, files = sources["arrays"], sources["files"]
    with pytest.raises(ValueError, match="own negative.*batch_size=24"):
        data.train_stream(arrays, batch_size=24, seed=0)
    with pytest.raises(ValueError, match="multiple.*batch_size=5"):
        data.train_stream(arrays, batch_size=5, seed=0, num_replicas=2)
    with pytest.raises(ValueError, match="num_pipelines"):
        data.eval_stream(arrays, batch_size=6, num_replicas=2, num_pipelines=3)
    with pytest.raises(ValueError, match="`views` must"):
        data.train_stream(files, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="`image_size`"):
        data.eval_stream(files, batch_size=4)
