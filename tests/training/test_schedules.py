# SPDX-License-Identifier: Apache-2.0
"""Schedules of the learning rate and of the EMA decay."""

import inspect
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from contrastive.training import config, schedules


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (1, 0.2), (5, 1.0), (10, 2.0)]
    + [(20, 1 + math.cos(math.pi / 4)), (30, 1.0), (50, 0.0), (60, 0.0)],
)
def test_warmup_cosine_at_each_step_equals_its_formula(step, expected):
    schedule = schedules.WarmupCosine(2.0, warmup_steps=10, total_steps=50)
    rate = schedule(step)
    assert rate.dtype == tf.float32
    np.testing.assert_allclose(rate, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("total_steps", [0, 5])
def test_warmup_cosine_without_decay_steps_ends_at_the_peak(total_steps):
    schedule = schedules.WarmupCosine(3.0, total_steps, total_steps)
    np.testing.assert_allclose(schedule(total_steps), 3.0)
    assert np.isfinite(schedule(100))


def test_warmup_cosine_without_warmup_starts_at_the_peak():
    schedule = schedules.WarmupCosine(2.0, warmup_steps=0, total_steps=4)
    np.testing.assert_allclose(
        [schedule(step) for step in range(5)],
        [1 + math.cos(math.pi * step / 4) for step in range(5)],
        atol=1e-6,
    )


def test_schedules_of_graph_tensors_equal_those_of_numbers():
    schedule = schedules.WarmupCosine(2.0, warmup_steps=10, total_steps=50)

    @tf.function
    def compiled(step):
        return schedule(step), schedules.ema_decay(step, 50, 0.99)

    for step in (3, 10, 33):
        rate, decay = compiled(tf.constant(step, tf.int64))
        np.testing.assert_allclose(rate, schedule(step), rtol=1e-6)
        np.testing.assert_allclose(decay, schedules.ema_decay(step, 50, 0.99), rtol=1e-6)


def test_warmup_cosine_of_deepminds_arguments_equals_its_numbers(golden):
    arrays = golden("lars_deepmind.npz")
    peak = config.scaled_learning_rate(0.3, 4096)
    schedule = schedules.WarmupCosine(peak, warmup_steps=100, total_steps=1000)
    np.testing.assert_allclose(
        [schedule(step) for step in arrays["sched_steps"]],
        arrays["sched_lr_b4096_base0.3_total1000_warm100"],
        rtol=1e-5,
        atol=1e-6,
    )


def test_ema_decay_of_deepminds_arguments_equals_its_numbers(golden):
    arrays = golden("lars_deepmind.npz")
    np.testing.assert_allclose(
        [schedules.ema_decay(step, 1000, 0.996) for step in arrays["sched_steps"]],
        arrays["sched_ema_base0.996_max1000"],
        rtol=1e-7,
        atol=1e-7,
    )


def test_ema_decay_after_the_last_step_is_one():
    np.testing.assert_allclose(schedules.ema_decay(0, 10, 0.9), 0.9)
    np.testing.assert_allclose(schedules.ema_decay(5, 10, 0.9), 0.95)
    assert schedules.ema_decay(10, 10, 0.9) == 1
    assert schedules.ema_decay(15, 10, 0.9) == 1


def test_ema_decay_with_copies_and_pauses_is_0_and_1():
    decays = [
        float(schedules.ema_decay(step, 100, 0.9, copy_until=2, every=3)) for step in range(7)
    ]
    assert decays[:3] == [0, 0, 0]
    assert decays[4:6] == [1, 1]
    for step in (3, 6):
        assert decays[step] == schedules.ema_decay(step, 100, 0.9)


def test_warmup_cosine_without_decay_keeps_the_peak():
    schedule = schedules.WarmupCosine(2.0, 10, 50, decay=False)
    rates = [float(schedule(step)) for step in (0, 5, 10, 49, 50, 1000)]
    assert rates == [0, 1, 2, 2, 2, 2]


def test_warmup_cosine_config_has_every_argument():
    schedule = schedules.WarmupCosine(2.0, warmup_steps=10, total_steps=50)
    fields = schedule.get_config()
    assert set(fields) == set(inspect.signature(schedules.WarmupCosine).parameters)
    serialized = keras.saving.serialize_keras_object(schedule)
    copy = keras.saving.deserialize_keras_object(serialized)
    assert copy.get_config() == fields


@pytest.mark.parametrize(("warmup", "total"), [(-1, 10), (11, 10)])
def test_warmup_cosine_steps_out_of_range_raise(warmup, total):
    with pytest.raises(ValueError, match=f"warmup_steps={warmup}, total_s"):
        schedules.WarmupCosine(1.0, warmup, total)
