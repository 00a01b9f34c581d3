# SPDX-License-Identifier: Apache-2.0
"""Tests of lars_optimizer.py. As a program: two replicas."""

import functools
import inspect
import json
import pathlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support import processes

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from lars_optimizer import LARS

NUM_STEPS = 5
NUM_VARIABLES = 5


def _assert_trajectory(inputs, expected, case_key, index, rates, *, is_scaled, **arguments):
    """Checks one variable's values and velocities after each golden step.

    The reference decides by name which variables are scaled, LARS by rank: a variable that is
    scaled there enters as a column or with the rank it has, one that is not as a vector. Which is
    the same arithmetic.
    """

    def shaped(array):
        if not is_scaled:
            return array.ravel()
        return array.reshape(-1, 1) if array.ndim < 2 else array

    variable = keras.Variable(shaped(inputs[f"init_{index}"]))
    optimizer = LARS(rates[0], **arguments)
    optimizer.build([variable])
    for step, rate in enumerate(rates):
        optimizer.learning_rate.assign(rate)
        gradient = shaped(inputs[f"grad_{step}_{index}"])
        optimizer.apply_gradients([(tf.constant(gradient), variable)])
        velocity = optimizer.variables[-1]
        for key, value in (("p", variable), ("m", velocity)):
            array = expected[f"{key}_{case_key}_{step}_{index}"]
            np.testing.assert_allclose(
                value,
                shaped(array),
                rtol=1e-5,
                atol=1e-7,
                err_msg=f"{key}, case {case_key}, step {step}, {index}",
            )


@pytest.mark.parametrize("index", range(NUM_VARIABLES))
def test_simclr_variant_follows_the_reference(golden, index):
    arrays = golden("lars_simclr.npz")
    name = str(arrays["names"][index])
    # The reference's other form, `classic_momentum=False`, is not offered.
    cases = [case for case in json.loads(str(arrays["cases_json"])) if case["classic_momentum"]]
    assert len(cases) == 16
    for case in cases:
        undecayed = case["exclude_from_weight_decay"]
        unscaled = case["exclude_from_layer_adaptation"] or undecayed
        is_decayed = not any(part in name for part in undecayed)
        _assert_trajectory(
            arrays,
            arrays,
            f"{case['id']:02d}",
            index,
            case["lr"],
            is_scaled=not any(part in name for part in unscaled),
            l2=case["weight_decay"] if is_decayed else 0.0,
            momentum=case["momentum"],
            eeta=case["eeta"],
            nesterov=case["use_nesterov"],
        )


@pytest.mark.parametrize("index", range(NUM_VARIABLES))
def test_deepmind_variant_follows_the_reference(golden, index):
    arrays = golden("lars_deepmind.npz")
    is_weight = str(arrays["paths"][index]).endswith("|w")
    for case in json.loads(str(arrays["cases_json"])):
        _assert_trajectory(
            golden("lars_simclr.npz"),  # initial values and gradients
            arrays,
            case["id"],
            index,
            case["lr"],
            is_scaled=is_weight or case["filter"] == "none",
            l2=case["weight_decay"],
            momentum=case["momentum"],
            eeta=case["eta"],
            variant="deepmind",
        )


def test_decay_and_scaling_are_for_matrices_and_kernels_only():
    images = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="conv")(images)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(images, keras.layers.Dense(2, name="dense")(x))
    variables = model.trainable_variables
    for variable in variables:
        variable.assign(tf.random.uniform(variable.shape, 0.5, 1.0))
    optimizer = LARS(0.5, l2=0.1, eeta=1e-3)
    before = {v.path: v.numpy() for v in variables}
    optimizer.apply_gradients([(tf.zeros(v.shape), v) for v in variables])
    for variable in variables:
        # The gradient is the decay alone, and its size is scaled away.
        factor = 1 - 0.5 * 1e-3 if variable.name == "kernel" else 1.0
        np.testing.assert_allclose(variable, factor * before[variable.path], rtol=1e-6)
    assert sum(v.name == "kernel" for v in variables) == 2
    assert len(variables) == 6


def test_nesterov_looks_ahead_in_the_deepmind_variant_too():
    variable = keras.Variable([1.0, 2.0])
    optimizer = LARS(0.1, nesterov=True, variant="deepmind")
    optimizer.build([variable])
    expected, velocity = np.array([1.0, 2.0]), np.zeros(2)
    for gradient in ([0.5, -1.0], [1.0, 3.0]):
        optimizer.apply_gradients([(tf.constant(gradient), variable)])
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * (0.9 * velocity + gradient)
        np.testing.assert_allclose(variable, expected, rtol=1e-6)


@pytest.mark.parametrize("variant", ["simclr", "deepmind"])
def test_a_learning_rate_schedule_is_followed_in_a_graph(variant):
    rates = [0.5, 0.1, 0.02]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], rates)
    gradient = tf.ones((3, 2))
    results = []
    for learning_rate in (schedule, rates[0]):
        variable = keras.Variable(np.full((3, 2), 2.0, "float32"))
        optimizer = LARS(learning_rate, l2=0.1, variant=variant)
        optimizer.build([variable])
        pairs = [(gradient, variable)]
        step = tf.function(functools.partial(optimizer.apply_gradients, pairs))
        for rate in rates:
            if learning_rate is not schedule:
                optimizer.learning_rate.assign(rate)
            step()
        results.append(variable.numpy())
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_config_has_every_argument():
    arguments = {
        "learning_rate": 0.25,
        "momentum": 0.5,
        "l2": 0.1,
        "eeta": 0.01,
        "nesterov": True,
        "variant": "deepmind",
        "name": "other",
    }
    assert set(arguments) == set(inspect.signature(LARS).parameters)
    config = LARS(**arguments).get_config()
    assert config == arguments
    assert LARS.from_config(config).get_config() == arguments


def test_a_schedule_comes_back_from_the_config():
    schedule = keras.optimizers.schedules.CosineDecay(0.5, 10)
    config = keras.saving.serialize_keras_object(LARS(schedule))
    optimizer = keras.saving.deserialize_keras_object(config)
    np.testing.assert_allclose(optimizer.learning_rate, 0.5)


def test_velocities_are_part_of_a_checkpoint(tmp_path):
    def trained(steps):
        variable = keras.Variable(np.ones((2, 2), "float32"))
        optimizer = LARS(0.1)
        optimizer.build([variable])
        for _ in range(steps):
            optimizer.apply_gradients([(tf.eye(2), variable)])
        return optimizer

    path = tf.train.Checkpoint(optimizer=trained(3)).save(tmp_path / "model")
    restored = trained(0)
    status = tf.train.Checkpoint(optimizer=restored).restore(path)
    status.assert_consumed()
    expected = trained(3)
    for variable, other in zip(restored.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(variable, other)
    assert np.any(restored.variables[-1].numpy() != 0)


@pytest.mark.parametrize(
    "arguments",
    [{"variant": "google"}, {"momentum": 1.0}, {"l2": -0.1}, {"eeta": 0.0}],
)
def test_arguments_out_of_range_are_refused(arguments):
    (value,) = arguments.values()
    with pytest.raises(ValueError, match=f"Received.*{value}"):
        LARS(0.1, **arguments)


def _trained(strategy, num_steps=3):
    """Returns weights after steps on gradients that sum up over replicas."""
    with strategy.scope():
        variables = [
            keras.Variable(np.full(shape, 2.0, "float32")) for shape in ((3, 3, 2, 4), (5, 2), (4,))
        ]
        optimizer = LARS(0.5, l2=0.01)
        optimizer.build(variables)

    def replica_step():
        context = tf.distribute.get_replica_context()
        share = 1.0 / context.num_replicas_in_sync
        gradients = [
            share * tf.reshape(tf.range(float(np.prod(v.shape))), v.shape) for v in variables
        ]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    step = tf.function(lambda: strategy.run(replica_step))
    for _ in range(num_steps):
        step()
    return [
        [value.numpy() for value in strategy.experimental_local_results(v.value)] for v in variables
    ]


def test_two_replicas_take_the_steps_of_one(tmp_path):
    path = tmp_path / "weights.npz"
    processes.run(__file__, path)
    single = _trained(tf.distribute.get_strategy())
    with np.load(path) as arrays:
        for expected, name in zip(single, arrays.files, strict=True):
            assert len(arrays[name]) == 2
            for replica in arrays[name]:
                np.testing.assert_allclose(replica, expected[0], rtol=1e-6)


if __name__ == "__main__":
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
    two_replicas = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    np.savez(sys.argv[1], *_trained(two_replicas))
