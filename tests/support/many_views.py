# SPDX-License-Identifier: Apache-2.0
"""Inputs of the losses of many views, and their formulas written as loops.

The formulas are in float64 and row by row; gradients stop where the docstrings of the losses say
so.
"""

import itertools

import numpy as np
import tensorflow as tf

TEMPERATURE = 0.3


def make_views(num_large, num_small, batch=5, dim=4, seed=0):
    """Online and target views of the same images, alike but not equal."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, dim))
    online, target = (
        [tf.constant(image + rng.normal(size=image.shape), tf.float32) for _ in range(count)]
        for count in (num_large + num_small, num_large)
    )
    return online, target


def make_pairs(num_online, num_target, same):
    product = itertools.product(range(num_online), range(num_target))
    return [(a, c) for a, c in product if same or a != c]


def make_draws(*shape, seed=1):
    return tf.constant(np.random.default_rng(seed).random(shape), tf.float32)


def make_queue(num_views, capacity, num_classes, dim=4, seed=4):
    rng = np.random.default_rng(seed)
    queue = rng.normal(size=(num_views, capacity, dim)).astype(np.float32)
    labels = rng.integers(num_classes, size=capacity).astype(np.int32)
    ids = np.arange(100, 100 + capacity)
    return queue, labels, ids


def values_and_gradients(function, *tensors):
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(*tensors)
    return value, tape.gradient(value, tensors)


def assert_same(got, want, rtol=1e-4, atol=3e-6):
    """Compares losses and gradients, where None is no gradient."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=2e-6)
    assert len(got[1]) == len(want[1])
    for mine, expected in zip(got[1], want[1], strict=True):
        if expected is None:
            assert mine is None or not np.any(mine)
            continue
        scale = max(1.0, float(np.abs(expected).max()))
        mine = np.zeros(expected.shape) if mine is None else mine
        np.testing.assert_allclose(mine, expected, rtol=rtol, atol=atol * scale)


def unit(z):
    z = tf.cast(z, tf.float64)
    return z / tf.norm(z, axis=-1, keepdims=True)


def _row(anchor, candidates, temperature):
    """Log-probabilities of candidates, the positive first."""
    scores = tf.linalg.matvec(tf.stack(candidates), anchor)
    scores /= tf.cast(temperature, tf.float64)
    return scores - tf.reduce_logsumexp(scores)


def _kl(log_p, log_q, gradient):
    if gradient == "none":
        return tf.reduce_sum(tf.exp(log_p) * (log_p - log_q))
    teacher = tf.stop_gradient(log_p)
    if gradient == "sg_p":
        return tf.reduce_sum(tf.exp(teacher) * (teacher - log_q))
    entropy = tf.stop_gradient(tf.reduce_sum(tf.exp(log_p) * log_p))
    return entropy - tf.reduce_sum(tf.exp(log_p) * log_q)


class Loops:
    """ReLIC and SemPPL by their equations."""

    def __init__(self, online, target, temperature, negatives):
        self.online = [unit(z) for z in online]
        self.target = [unit(z) for z in target]
        self.temperature = temperature
        self.negatives = negatives  # (pair, i) -> list of images

    def p(self, o, t, i, chosen, positive=None):
        """Row i of `o` against the given rows of `t`."""
        positive = t[i] if positive is None else positive
        return _row(o[i], [positive, *(t[j] for j in chosen)], self.temperature)

    def pair(self, a, c, i, kl_form, kl_small, kl_grad):
        """Returns NLL and KL of one pair and row."""
        num_large = len(self.target)
        chosen = self.negatives[a, c][i]
        log_p = self.p(self.online[a], self.target[c], i, chosen)
        if a >= num_large and kl_small == "off":
            return -log_p[0], 0.0
        if a >= num_large and kl_form == "swap":
            kl_form = kl_small
        if kl_form == "shared_target":
            k = (c + 1) % num_large
            teacher = self.p(self.online[k], self.target[c], i, chosen)
            return -log_p[0], _kl(teacher, log_p, kl_grad)
        if kl_form == "swap":
            swapped = self.p(self.online[c], self.target[a], i, chosen)
            return -log_p[0], _kl(log_p, swapped, kl_grad)
        column = self.p(self.target[c], self.online[a], i, chosen)
        if kl_form == "transpose":
            return -log_p[0], _kl(log_p, column, kl_grad)
        return -log_p[0], _kl(column, log_p, kl_grad)

    def semantic(self, a, c, i, positives, others):
        """Returns NLL and KL of one pair and row with semantic positives.

        `others` are the images whose positives stand for their targets.
        """
        nll = kl = 0.0
        teacher = (a + 1) % len(self.target)
        chosen = self.negatives[a, c][i]
        for draw, z in enumerate(tf.unstack(unit(positives[c][i]))):
            candidates = [
                unit(positives[c][j][draw]) if j in others else t
                for j, t in enumerate(tf.unstack(self.target[c]))
            ]
            log_s = self.p(self.online[a], candidates, i, chosen, z)
            nll -= log_s[0]
            if teacher != a:
                log_t = self.p(self.online[teacher], candidates, i, chosen, z)
                kl += _kl(log_t, log_s, "sg_p")
        return nll / len(positives[c][i]), kl / len(positives[c][i])


def all_negatives(pairs, batch):
    return {pair: [[j for j in range(batch) if j != i] for i in range(batch)] for pair in pairs}


def _floyd(draws, batch):
    """Floyd's algorithm for one row, with a set."""
    chosen = set()
    for last, draw in zip(range(batch - len(draws), batch), draws, strict=True):
        candidate = int(np.float32(draw) * np.float32(last + 1))
        chosen.add(last if candidate in chosen else candidate)
    return chosen


def sampled_negatives(pairs, batch, draws):
    return {
        pair: [
            [j + (j >= i) for j in _floyd(row, batch - 1)]
            for i, row in enumerate(draws[index].numpy())
        ]
        for index, pair in enumerate(pairs)
    }
