# SPDX-License-Identifier: Apache-2.0
"""Tests of `masks.py`, and of masks on their way from `data` to views."""

import dataclasses
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import data
import data_util
from contrastive.sources import masks as masks_lib
from contrastive.training import views as views_lib

_HEIGHT, _WIDTH = 12, 10
_VIEW = data_util.Augmentation(size=8, mask_probability=1.0)


# Removal


def _views(augmentation, count=200):
    """Returns images, masks of their upper half, and images without rest."""
    random = np.random.default_rng(0)
    images = random.integers(1, 256, (count, 6, 5, 3)).astype(np.uint8)
    masks = np.zeros((count, 6, 5), np.uint8)
    masks[:, :3] = 1
    keys = data_util.example_keys(1, 0, np.arange(count), 0)
    removed = masks_lib.remove_background(images, masks, keys, augmentation)
    return images, removed.numpy()


def test_foreground_is_never_touched():
    for fill in data_util.MASK_FILLS:
        view = dataclasses.replace(_VIEW, mask_fill=fill)
        images, removed = _views(view)
        assert removed.dtype == np.uint8
        np.testing.assert_array_equal(removed[:, :3], images[:, :3])


def test_fill_is_black_the_mean_colour_or_noise():
    _, removed = _views(_VIEW)
    np.testing.assert_array_equal(removed[:, 3:], 0)
    images, removed = _views(dataclasses.replace(_VIEW, mask_fill="mean"))
    mean = np.round(images.mean((1, 2), keepdims=True))
    np.testing.assert_array_equal(removed[:, 3:], np.tile(mean, (1, 3, 5, 1)))
    noisy = dataclasses.replace(_VIEW, mask_fill="noise")
    noise = _views(noisy)[1][:, 3:].astype(np.float64)
    assert (noise.min(), noise.max()) == (0, 255)
    # 9,000 values of a standard deviation of 74.
    assert abs(noise.mean() - 127.5) < 4 * 74 / 9000**0.5
    correlation = np.corrcoef(noise.reshape(200, -1).T) - np.eye(45)
    assert np.abs(correlation).max() < 5 / 200**0.5
    np.testing.assert_array_equal(_views(noisy)[1][:, 3:], noise)


@pytest.mark.parametrize("fill", data_util.MASK_FILLS)
def test_removal_compiles(fill):
    view = dataclasses.replace(_VIEW, mask_fill=fill)
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
    masks = tf.constant(images[..., 0] > 99, tf.uint8)
    keys = data_util.example_keys(1, 0, tf.range(4), 0)
    compiled = tf.function(masks_lib.remove_background, jit_compile=True)
    np.testing.assert_array_equal(
        compiled(images, masks, keys, view),
        masks_lib.remove_background(images, masks, keys, view),
    )


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_backgrounds_are_removed_as_often_as_said(probability):
    view = dataclasses.replace(_VIEW, mask_probability=probability)
    images, removed = _views(view, 2000)
    share = np.mean((removed != images).any((1, 2, 3)))
    tolerance = 4 * (probability * (1 - probability) / 2000) ** 0.5
    assert abs(share - probability) <= tolerance


def test_draw_is_independent_of_view_and_of_all_other_draws():
    view = dataclasses.replace(_VIEW, mask_probability=0.5)
    removes = [
        data_util.removes_background(data_util.example_keys(1, 0, tf.range(2000), index), view)
        for index in range(4)
    ]
    keys = data_util.example_keys(1, 0, tf.range(2000), 0)
    flips = data_util.uniform(keys, data_util._FLIP) < 0.5
    correlation = np.corrcoef([*removes, flips]) - np.eye(5)
    assert np.abs(correlation).max() < 4 / 2000**0.5


def test_fields_out_of_range_are_refused():
    with pytest.raises(ValueError, match="mask_probability.*1.5"):
        data_util.Augmentation(size=8, mask_probability=1.5)
    with pytest.raises(ValueError, match="mask_fill.*'white'"):
        data_util.Augmentation(size=8, mask_fill="white")


def test_implausible_masks_are_whole():
    masks = np.zeros((4, 10, 10), np.uint8)
    masks[1, :5], masks[2], masks[3, 0, :3] = 1, 1, 1
    expected = np.ones_like(masks)
    expected[1] = masks[1]
    actual = masks_lib.whole_if_implausible(masks)
    np.testing.assert_array_equal(actual, expected)


# Datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder of 12 noisy images, and one of masks.

    The mask of an image is its upper half, and white; that of 3 is missing, that of 4 implausible,
    that of 5 of twice the size, that of 6 named by id.
    """
    root = tmp_path_factory.mktemp("masks")
    random = np.random.default_rng(0)
    for i in range(12):
        path = root / "images" / "train" / "ab"[i // 6] / f"{i:02}.png"
        os.makedirs(path.parent, exist_ok=True)
        shape = _HEIGHT, _WIDTH, 3
        pixels = random.integers(1, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(path)
        mask = np.zeros((_HEIGHT, _WIDTH), np.uint8)
        mask[: 0 if i == 4 else 6] = 128
        mask[6 if i != 4 else 0 :] = 127
        mask = mask.repeat(2, 0).repeat(2, 1) if i == 5 else mask
        name = "6" if i == 6 else f"train/{'ab'[i // 6]}/{i:02}"
        path = root / "masks" / f"{name}.png"
        os.makedirs(path.parent, exist_ok=True)
        if i != 3:
            Image.fromarray(mask).save(path)
    return root


@pytest.fixture
def loaded(folder):
    """Returns a loader of the folder, with its masks."""

    def load(**kwargs):
        arguments = {"mask_dir": str(folder / "masks")} | kwargs
        return data.load(str(folder / "images"), **arguments)

    return load


def test_masks_in_memory_are_read_and_reported(loaded):
    dataset = loaded()
    expected = np.zeros((12, _HEIGHT, _WIDTH), np.uint8)
    expected[:, :6] = 1
    expected[3:5] = 1
    np.testing.assert_array_equal(dataset.masks, expected)
    report = data.describe(dataset)
    assert "masks of 11 images (1 implausible), none of 1;" in report


def test_implausible_masks_on_the_host_are_counted_once(loaded, caplog):
    dataset = loaded(memory_limit=0)
    assert "masks of 11 images (implausible ones are" in data.describe(dataset)
    view = data_util.Augmentation(mask_probability=1.0, **_WHOLE_CROP, **_PLAIN)
    with caplog.at_level("INFO", logger="absl"):
        _stream(dataset, (view, view), num_steps=4)  # two epochs
    assert dataset.masks.ids == {4}
    assert caplog.text.count("Implausible masks so far: 1, the last of ex") == 1


def test_masks_are_estimated_in_memory(loaded, monkeypatch):
    monkeypatch.setattr(masks_lib, "_CHUNK", 5)
    dataset = loaded(mask_dir=None, saliency="spectral")
    images = dataset.source.images
    expected = masks_lib.foreground(masks_lib.spectral_residual(images))
    np.testing.assert_array_equal(dataset.masks, expected)
    report = data.describe(dataset)
    assert "masks of 12 images (0 implausible), none of 0;" in report


def _stream(dataset, views, **kwargs):
    """Returns the batches of an epoch."""
    stream = data.train_stream(
        dataset, batch_size=6, seed=1, views=views, **{"num_steps": 2} | kwargs
    )
    return list(stream)


# No two pixels of the crop are mixed, so that filled ones stay filled.
_WHOLE_CROP = {
    "size": _HEIGHT,
    "crop_area": (0.999, 1.0),
    "crop_aspect": (_WIDTH / _HEIGHT, _WIDTH / _HEIGHT),
}
_PLAIN = {
    "flip_probability": 0.0,
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
}


@pytest.mark.parametrize("source", ["arrays", "files"])
def test_mask_comes_before_the_crop(loaded, source):
    """Half of the pixels are black in a view of all of the image."""
    limit = {} if source == "arrays" else {"memory_limit": 0}
    view = data_util.Augmentation(mask_probability=1.0, **_WHOLE_CROP, **_PLAIN)
    batches = _stream(loaded(**limit), (view,))
    assert all(("mask" in batch) == (source == "arrays") for batch in batches)
    for batch in batches:
        (images,) = views_lib.make_views(batch, (view,), 1)
        for example_id, image in zip(batch["id"], images, strict=True):
            is_black = image.numpy().max() > 0.1, image[8:].numpy().max() < 0.1
            assert is_black == (True, int(example_id) not in (3, 4))


def test_images_on_the_host_and_in_memory_give_the_same_views(loaded):
    """Fills, draws and boxes: all but the rounding of crops to bytes."""
    views = tuple(
        data_util.Augmentation(size=_HEIGHT, mask_probability=p, mask_fill=fill, **_PLAIN)
        for p, fill in ((0.5, "mean"), (1.0, "noise"))
    )
    in_memory = _stream(loaded(), views)
    on_host = _stream(loaded(memory_limit=0), views)
    assert "mask" not in on_host[0]
    for one, other in zip(in_memory, on_host, strict=True):
        np.testing.assert_array_equal(one["id"], other["id"])
        for x, y in zip(
            views_lib.make_views(one, views, 1),
            views_lib.make_views(other, views, 1),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, atol=0.5 / 255 + 1e-4)


def test_estimates_on_the_host_are_those_in_memory(loaded):
    view = data_util.Augmentation(mask_probability=1.0, **_WHOLE_CROP, **_PLAIN)
    in_memory, on_host = (
        _stream(loaded(mask_dir=None, saliency="spectral", **limit), (view,))
        for limit in ({}, {"memory_limit": 0})
    )
    (x,) = views_lib.make_views(in_memory[0], (view,), 1)
    (y,) = views_lib.make_views(on_host[0], (view,), 1)
    np.testing.assert_allclose(x, y, atol=0.5 / 255 + 1e-4)


def test_views_without_masks_leave_the_stream_as_it_is(loaded):
    view = dataclasses.replace(_VIEW, mask_probability=0.0)
    for limit in ({}, {"memory_limit": 0}):
        masked = _stream(loaded(**limit), (view,))
        without = _stream(loaded(mask_dir=None, **limit), (view,))
        assert "mask" not in masked[0]
        for one, other in zip(masked, without, strict=True):
            tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def test_masked_stream_resumes(loaded):
    for limit in ({}, {"memory_limit": 0}):
        dataset = loaded(**limit)
        _, last = _stream(dataset, (_VIEW,))
        (first,) = _stream(dataset, (_VIEW,), first_step=1, num_steps=1)
        tf.nest.map_structure(np.testing.assert_array_equal, first, last)


def test_attach_masks_to_unsuitable_data_raises_with_the_reason(loaded, folder, tmp_path):
    with pytest.raises(ValueError, match="needs masks"):
        _stream(loaded(mask_dir=None), (_VIEW,))
    with pytest.raises(ValueError, match="one of spectral, freq.*'spectra'"):
        loaded(mask_dir=None, saliency="spectra")
    with pytest.raises(ValueError, match="either read or estimated"):
        loaded(saliency="spectral")
    with pytest.raises(ValueError, match=r"no masks.*11.png or 11.png"):
        loaded(mask_dir=str(tmp_path))
