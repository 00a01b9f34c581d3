# SPDX-License-Identifier: Apache-2.0
"""Encoders with known weights, and comparisons of features with theirs."""

import dataclasses

import numpy as np
import tensorflow as tf

import model
from contrastive import run_record
from contrastive.training import checkpoints
from contrastive.weights import loading, published
from contrastive.weights.families import torchvision
from tests.support.replica_run import architecture

SIZES = ("224", "97x65", "32")
TINY_TORCH = {
    "resnet_depth": 10,
    "width_multiplier": 0.125,
    "padding": "torch",
    "shortcuts": "needed",
}
_FIELDS = published._NOT_SHOWN | {
    "width_multiplier": 1.0,
    "stem": "imagenet",
    "sk_ratio": 0.0,
    "se_ratio": 0.0,
    "channels": 3,
}


def golden_images(size, golden):
    return (golden("relicv2.npz")[f"images_{size}"] / 255).astype("float32")


def check_embeddings(path, network, golden, sizes=SIZES):
    encoder = loading.load_encoder(str(path))
    for size in sizes:
        np.testing.assert_allclose(
            encoder(golden_images(size, golden)),
            golden("relicv2.npz")[f"{network}_{size}"],
            rtol=1e-4,
            atol=1e-4,
        )


def random_networks(**fields):
    """Networks with random weights and statistics, BatchNorm's too."""
    architecture = model.Architecture.from_record(_FIELDS | fields)
    networks = model.build_networks(architecture)
    rng = np.random.default_rng(0)
    for variable in networks.encoder.variables:
        if "bn" in variable.path:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return networks


def check_features(encoder, networks, size=32):
    # Of even sizes: there, all paddings differ.
    images = np.random.default_rng(1).random(
        (2, size, size + 4, networks.architecture.channels), np.float32
    )
    expected = model.encoder_of_images(networks)(images).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(encoder(images), expected, rtol=1e-5, atol=1e-5)


def state_dict_of(encoder):
    """The state dictionary that torchvision would save, and its classifier."""
    tensors = {torchvision.name(v.path): torchvision.layout(v.numpy()) for v in encoder.variables}
    counters = {
        name.replace("running_mean", "num_batches_tracked"): np.int64(7)
        for name in tensors
        if name.endswith("running_mean")
    }
    classes = np.zeros((10, encoder.output_shape[-1]), np.float32)
    return tensors | counters | {"fc.weight": classes, "fc.bias": classes[:, 0]}


def objective_networks(objective="simclr", **changes):
    """Returns networks of an objective with random BatchNorm variables."""
    fields = dataclasses.replace(architecture(objective), **changes)
    networks = model.build_networks(fields)
    random = np.random.default_rng(0)
    for network in networks.models().values():
        for variable in network.variables:
            if variable.path.endswith(("moving_mean", "beta")):
                variable.assign(random.normal(size=variable.shape) * 0.3)
            elif variable.path.endswith(("moving_variance", "gamma")):
                variable.assign(random.uniform(0.5, 1.5, variable.shape))
    return networks


def new_step():
    """Returns a variable for the step of training checkpoints."""
    return tf.Variable(0, dtype=tf.int64)


def save_run(networks, directory):
    """Writes the record and a checkpoint of a run with these networks."""
    run_record.write_run(
        str(directory),
        {"architecture": dataclasses.asdict(networks.architecture)},
    )
    checkpoints.TrainingCheckpoints(
        str(directory), step=new_step(), max_to_keep=1, **networks.models()
    ).save(5)
