# SPDX-License-Identifier: Apache-2.0
"""Tests of `networks.py`: from flags to the architecture and its weights."""

import numpy as np
import tensorflow as tf

import model
from contrastive.commands import networks, session, train
from contrastive.config.completion import complete
from contrastive.objectives.base import Training
from contrastive.objectives.state import TrainedTemperature
from tests.support import command_lines, program

_TRAINING = Training(
    batch_size=512,
    num_examples=5000,
    num_classes=10,
    labelled=None,
    num_large_views=4,
    embedding_dim=8,
)


def _completed_large(*words):
    """Resolves a command line and completes it for images of 64 pixels."""
    return complete(program.resolve(*words), command_lines.Facts())


def _completed(*words):
    """Resolves a command line and completes it for images of 32 pixels."""
    facts = command_lines.Facts(image_size=(32, 32))
    return complete(program.resolve(*words), facts)


def test_architecture_of_relic_without_target_equals_the_paper():
    resolved = _completed_large("--objective=relic", "--target_network=false")
    assert resolved["proj_hidden_dim"] == (4096, 2048, 1024, 512)
    assert resolved["proj_out_dim"] == 128
    assert resolved["temperature"] == 0.1
    assert not resolved["predictor"]
    architecture = networks.make_architecture(resolved, 10)
    assert not architecture.target_network
    assert not architecture.predictor


def test_objective_state_has_a_temperature_where_it_is_trained():
    cases = {"simclr": False, "byol": False, "relicv2": True, "semppl": True}
    for objective, expected in cases.items():
        resolved = _completed(f"--objective={objective}", "--learnable_temperature")
        state = resolved.objective().build_state(_TRAINING)
        trained = getattr(state, "temperature", state)
        assert isinstance(trained, TrainedTemperature) == expected


def test_architecture_of_two_views_has_neither_target_nor_predictor():
    resolved = _completed("--target_network", "--predictor")
    architecture = networks.make_architecture(resolved, 10)
    assert not architecture.target_network
    assert not architecture.predictor


def test_objective_state_has_a_queue_only_with_semppl():
    for objective in ("semppl", "relicv2"):
        resolved = _completed(f"--objective={objective}", "--queue_size=600")
        state = resolved.objective().build_state(_TRAINING)
        if objective == "semppl":
            assert state.queue.embeddings.shape == (4, 600, 8)
        else:
            assert state is None


def test_build_networks_on_tpu_equals_weights_of_cpu(monkeypatch):
    """Its random numbers are others; here, ones stand for them."""

    def weights():
        resolved = program.resolve(
            "--dataset=photo_patches",
            "--resnet_depth=10",
            "--width_multiplier=0.125",
            "--objective=byol",
        )
        run = train.open_run(session.open_session(resolved))
        built = networks.build_networks(run.resolved, run.architecture, run.session.strategy)
        return {name: part.get_weights() for name, part in built.models().items()}

    expected, build = weights(), model.build_networks

    def build_on(*args, **more):
        networks = build(*args, **more)
        if tf.distribute.in_cross_replica_context():  # in the strategy's scope
            for part in networks.models().values():
                part.set_weights([np.ones_like(x) for x in part.get_weights()])
        return networks

    monkeypatch.setattr(model, "build_networks", build_on)
    strategy = tf.distribute.OneDeviceStrategy
    monkeypatch.setattr(tf.distribute, "TPUStrategy", strategy)
    found = weights()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for one, other in zip(found[name], values, strict=True):
            np.testing.assert_array_equal(one, other)
