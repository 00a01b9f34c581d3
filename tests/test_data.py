# SPDX-License-Identifier: Apache-2.0
"""Tests of `data.py`: order, resume, replicas, images that do not decode."""

import dataclasses
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import data
import data_util
from contrastive.sources import decoding, records
from contrastive.sources.order import Plan
from tests.support.image_data import write_pictures, write_records

_VIEW = data_util.Augmentation(size=8)
_SMALL_VIEW = data_util.Augmentation(size=4)
_WHOLE = {}  # what the fixture `whole` has read, by dataset


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Returns a dataset of 23 examples from each source, example i first."""
    root = tmp_path_factory.mktemp("sources")
    images = np.arange(23, dtype=np.uint8)[:, None, None, None]
    images = np.tile(images, (1, 6, 5, 2))
    np.savez(root / "arrays.npz", images=images, labels=np.arange(23) // 8)
    names = [f"train/{'abc'[i // 8]}/{i:03}.png" for i in range(23)]
    write_pictures(root / "files", names, size=(200, 150))
    write_records(root / "records", 23, static=False, per_shard=4)
    records = data.load(str(root / "records"))
    two = dataclasses.replace(records.source, shards_per_group=2)
    return {
        "arrays": data.load(str(root / "arrays.npz"), "all"),
        "files": data.load(str(root / "files")),
        "records": dataclasses.replace(records, source=two),
    }


@pytest.fixture
def corner_crops(monkeypatch):
    """Makes crops corners, which are quick to trace."""

    def corner(encoded, size, channels):
        image = tf.io.decode_png(encoded, channels)[:size, :size]
        return tf.ensure_shape(image, (size, size, channels))

    monkeypatch.setattr(
        decoding,
        "decode_crop",
        lambda encoded, _, view, channels: corner(encoded, view.size, channels),
    )
    monkeypatch.setattr(
        decoding,
        "decode_center_crop",
        lambda encoded, size, _, channels: corner(encoded, size, channels),
    )


@pytest.fixture(params=["arrays", "files", "records"])
def source(request, sources, corner_crops):
    """Returns each dataset in turn."""
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
    elements = list(elements)
    return {key: np.concatenate([element[key] for element in elements]) for key in elements[0]}


def _assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key], key)


# Order


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
def test_resumed_stream_is_the_tail_of_the_uninterrupted_one(source, whole, first_step):
    tail = _train(source, first_step=first_step, num_steps=15 - first_step)
    _assert_equal(_joined(tail), _joined(whole[first_step:]))


def test_order_depends_on_the_seed(source, whole):
    other = _train(source, seed=2, num_steps=15)
    assert not np.array_equal(_joined(other)["id"], _joined(whole)["id"])


def test_resumed_stream_reads_no_earlier_group(sources, monkeypatch):
    read, read_shard = [], records._read_shard

    def spy(filename, *args):
        tf.py_function(lambda x: read.append(x.numpy()), [filename], [])
        return read_shard(filename, *args)

    monkeypatch.setattr(records, "_read_shard", spy)
    source = sources["records"].source
    assert (len(source.filenames), source.shards_per_group) == (6, 2)
    epoch = Plan(23, 23, 1, 0, 1, seed=1, first_step=5, num_steps=1)
    assert len(list(source.read(epoch, None))) == 23
    assert sorted(read) == [os.fsencode(name) for name in source.filenames]
    read.clear()
    last_row = Plan(23, 1, 1, 0, 1, seed=1, first_step=137, num_steps=1)
    assert len(list(source.read(last_row, None))) == 1
    assert len(read) == 2


def test_stream_without_a_number_of_steps_is_endless(source):
    stream = data.train_stream(source, batch_size=23, seed=0, views=_views(source))
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
    return [_joined([e for p in pipelines for e in p[step : step + local]]) for step in steps]


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


def test_views_of_two_sizes_come_as_a_tuple(sources, corner_crops):
    stream = data.train_stream(sources["files"], batch_size=2, seed=0, views=(_VIEW, _SMALL_VIEW))
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


# Subsets and labelled rows

_IDS = [1, 2, 3, 5, 8, 13, 21]


def test_subset_streams_only_its_examples_under_their_ids(source):
    few = data.subset(source, _IDS[::-1])
    assert few.num_examples == 7
    assert "7 of 23 examples" in data.describe(few)
    batch = _joined(_train(few, num_steps=14))
    for epoch in batch["id"].reshape(10, 7):
        assert sorted(epoch) == _IDS
    np.testing.assert_array_equal(batch["epoch"], np.arange(70) // 7)
    np.testing.assert_array_equal(batch["label"], batch["id"] // 8)
    images = batch["crops"][:, 0] if source.is_encoded else batch["image"]
    np.testing.assert_array_equal(images[:, 0, 0, 0], batch["id"])
    tail = _train(few, first_step=4, num_steps=3)
    np.testing.assert_array_equal(_joined(tail)["id"], batch["id"][20:35])


def test_subset_is_evaluated_in_order(source):
    few = data.subset(data.subset(source, [*_IDS, 4]), _IDS)
    batch = _joined(_eval_steps(few))
    np.testing.assert_array_equal(batch["id"], [*_IDS, -1])
    np.testing.assert_array_equal(batch["image"][:7, 0, 0, 0], _IDS)


def test_subset_of_unknown_examples_is_refused(sources):
    with pytest.raises(ValueError, match="2 ids, 1 unknown: 23"):
        data.subset(sources["arrays"], [0, 23])
    with pytest.raises(ValueError, match="0 ids"):
        data.subset(sources["arrays"], [])


def _labelled_steps(dataset, **layout):
    return data.train_stream(
        dataset,
        batch_size=8,
        seed=1,
        **{"num_steps": 42} | layout,
        views=_views(dataset),
        labelled_ids=_IDS,
        labelled_per_batch=4,
    )


@pytest.fixture(params=["arrays", "files"])
def random_access(request, sources, corner_crops):
    """Returns the datasets whose rows can be chosen."""
    return sources[request.param]


def test_each_batch_has_its_labelled_rows(random_access):
    """42 steps: 24 epochs of 7 labelled, 10.5 of 16 other examples."""
    batch = _joined(_labelled_steps(random_access).as_numpy_iterator())
    rows = {k: batch[k].reshape(42, 8) for k in ("id", "epoch")}
    assert np.isin(rows["id"], _IDS).tolist() == [[False, True] * 4] * 42
    for part, size in ((slice(1, 8, 2), 7), (slice(0, 8, 2), 16)):
        ids = rows["id"][:, part].ravel()
        epochs = rows["epoch"][:, part].ravel()
        np.testing.assert_array_equal(epochs, np.arange(168) // size)
        orders = ids[: 168 // size * size].reshape(-1, size)
        assert all(len(set(order)) == size for order in orders)
        assert len({tuple(order) for order in orders}) > len(orders) // 2
    np.testing.assert_array_equal(batch["label"], batch["id"] // 8)


def test_labelled_stream_resumes(random_access):
    whole = list(_labelled_steps(random_access).as_numpy_iterator())[37:]
    tail = _labelled_steps(random_access, first_step=37, num_steps=5)
    _assert_equal(_joined(tail.as_numpy_iterator()), _joined(whole))


def test_replicas_share_the_labelled_rows(random_access):
    expected = _global_steps(random_access, _labelled_steps, 1, 1)
    for replicas, hosts in ((2, 1), (4, 2)):
        actual = _global_steps(random_access, _labelled_steps, replicas, hosts)
        for one, other in zip(expected, actual, strict=True):
            _assert_equal(other, one)


def test_labelled_rows_of_a_subset_stay_within_it(sources):
    few = data.subset(sources["arrays"], range(2, 23))
    stream = data.train_stream(
        few,
        batch_size=8,
        seed=1,
        num_steps=20,
        labelled_ids=[4, 5],
        labelled_per_batch=2,
    )
    ids = _joined(list(stream.as_numpy_iterator()))["id"]
    assert set(ids) == set(range(2, 23))
    assert sorted(ids[[3, 7]]) == [4, 5]


def test_labelled_rows_that_cannot_be_are_refused(sources):
    def stream(name, ids, count, **layout):
        data.train_stream(
            sources[name],
            batch_size=8,
            seed=0,
            views=(_VIEW,),
            labelled_ids=ids,
            labelled_per_batch=count,
            **layout,
        )

    with pytest.raises(ValueError, match="labelled_ids.*1 unknown: 23"):
        stream("arrays", [1, 23], 2)
    with pytest.raises(ValueError, match="labelled_ids.*0 ids"):
        stream("arrays", None, 2)
    for ids, count in ((_IDS, 0), (_IDS, 8), ([1, 2], 3), (range(20), 1)):
        with pytest.raises(ValueError, match=f"labelled_per_batch={count}, "):
            stream("arrays", ids, count)
    with pytest.raises(ValueError, match="TFRecords are read"):
        stream("records", _IDS, 2)


# Evaluation


def test_evaluation_has_each_example_once_and_then_padding(source):
    batch = _joined(list(data.eval_stream(source, batch_size=8, image_size=6).as_numpy_iterator()))
    padding = [-1]
    np.testing.assert_array_equal(batch["id"], [*range(23), *padding])
    np.testing.assert_array_equal(batch["weight"], [1] * 23 + [0])
    labels = [i // 8 for i in range(23)]
    np.testing.assert_array_equal(batch["label"], labels + padding)
    np.testing.assert_array_equal(batch["image"][:23, 0, 0, 0], range(23))


def test_evaluation_batch_may_exceed_the_dataset(source):
    batches = list(data.eval_stream(source, batch_size=40, image_size=6, num_replicas=2))
    assert [float(np.sum(b["weight"])) for b in batches] == [20, 3]


# Images that do not decode


def test_image_that_breaks_later_becomes_grey_and_is_named(tmp_path, corner_crops):
    names = [f"train/a/{i:02}.png" for i in range(20)]
    root = write_pictures(tmp_path, names, size=(200, 200))
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


def test_many_broken_images_end_the_stream(tmp_path, corner_crops):
    names = [f"train/a/{i:02}.png" for i in range(20)]
    dataset = data.load(write_pictures(tmp_path, names, size=(200, 200)))
    for path in dataset.source.paths[:11]:
        os.truncate(path, 60)
    with pytest.raises(tf.errors.OpError, match="11 did not decode"):
        _train(dataset, batch_size=20, num_steps=1)


@pytest.mark.prepared_data
def test_imagenet_is_cropped_on_the_host(prepared):
    dataset = prepared("imagenet2012", "train")
    assert dataset.image_size is None
    assert dataset.num_classes == 1000
    batch = _joined(_train(dataset, batch_size=4, num_steps=1))
    assert batch["crops"].shape == (4, 2, 8, 8, 3)
    assert not dataset.undecodable


def test_batches_that_cannot_be_are_refused(sources):
    arrays, files = sources["arrays"], sources["files"]
    with pytest.raises(ValueError, match="own negative.*batch_size=24"):
        data.train_stream(arrays, batch_size=24, seed=0)
    with pytest.raises(ValueError, match="multiple.*batch_size=5"):
        data.train_stream(arrays, batch_size=5, seed=0, num_replicas=2)
    with pytest.raises(ValueError, match="multiple.*batch_size=0"):
        data.eval_stream(arrays, batch_size=0)
    with pytest.raises(ValueError, match="num_pipelines"):
        data.eval_stream(arrays, batch_size=6, num_replicas=2, num_pipelines=3)
    with pytest.raises(ValueError, match="`views` must"):
        data.train_stream(files, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="`image_size`"):
        data.eval_stream(files, batch_size=4)
