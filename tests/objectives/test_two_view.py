# SPDX-License-Identifier: Apache-2.0
"""Losses of two views equal references and their formulas."""

import json
import math

import numpy as np
import pytest
import tensorflow as tf

import objective
from tests.support.two_views import known_gather, random_views

_T = 0.7


def _rpc(z1, z2, **kwargs):
    return objective.rpc_loss(z1, z2, alpha=0.3, beta=0.02, gamma=0.4, **kwargs)


_LOSSES = {
    "simclr": objective.simclr_loss,
    "rpc": _rpc,
    "js": objective.js_loss,
    "nwj": objective.nwj_loss,
    "dv": objective.dv_loss,
    "wpc": objective.wpc_loss,
}


def _reference_loss(case, z1, z2):
    loss_type = case.get("loss_type", "nce")
    arguments = {
        "temperature": case["temperature"],
        "hidden_norm": case["hidden_norm"],
    }
    if loss_type == "chi":
        for name in ("alpha", "beta", "gamma"):
            arguments[name] = case[name]
    losses = {
        "nce": objective.simclr_loss,
        "chi": objective.rpc_loss,
        "js": objective.js_loss,
        "nwj": objective.nwj_loss,
        "dv": objective.dv_loss,
    }
    return losses[loss_type](z1, z2, **arguments)


@pytest.mark.parametrize(("name", "num_cases"), [("rpc_objective", 180), ("simclr_objective", 36)])
def test_two_view_loss_golden_cases_equal_reference(golden, name, num_cases):
    numbers = golden(f"{name}.npz")
    cases = json.loads(str(numbers["cases_json"]))
    assert len(cases) == num_cases
    for case in cases:
        hidden = tf.constant(numbers[case["hidden"]])
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            loss = _reference_loss(case, *tf.split(hidden, 2))
        gradient = tape.gradient(loss, hidden).numpy()
        expected = numbers[f"grad_{case['id']:04d}"]
        # atol: dv's two terms of order 1 may cancel to 1e-5.
        np.testing.assert_allclose(
            loss,
            numbers[f"loss_{case['id']:04d}"],
            rtol=1e-5,
            atol=1e-6,
            err_msg=case,
        )
        # Saturated softmax: float32 noise of the reference, see its README.
        softmax = case.get("loss_type", "nce") == "nce"
        noise = 1e-6 if softmax else 2e-6 * np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=noise, err_msg=case)


def test_simclr_loss_on_two_replicas_equals_reference(golden):
    """Per-replica losses, and the gradient that passes through the gather."""
    numbers = golden("simclr_objective.npz")
    hidden = [tf.constant(numbers[f"mirrored_hidden_{r}"]) for r in (0, 1)]
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        views = [tf.split(h, 2) for h in hidden]
        losses = [
            objective.simclr_loss(*views[r], temperature=0.1, gather=known_gather(views, r))
            for r in (0, 1)
        ]
        total = tf.add_n(losses)
    for r, gradient in enumerate(tape.gradient(total, hidden)):
        np.testing.assert_allclose(losses[r], numbers[f"mirrored_loss_{r}"], rtol=1e-5)
        np.testing.assert_allclose(gradient, numbers[f"mirrored_grad_{r}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["simclr", "rpc", "js", "nwj", "wpc"])
def test_two_view_loss_on_four_replicas_equals_one(name):
    z1, z2 = map(tf.constant, random_views(8, 5))
    loss = _LOSSES[name]
    with tf.GradientTape() as tape:
        tape.watch([z1, z2])
        alone = loss(z1, z2, temperature=_T)
    expected = tape.gradient(alone, [z1, z2])
    with tf.GradientTape() as tape:
        tape.watch([z1, z2])
        views = list(zip(tf.split(z1, 4), tf.split(z2, 4), strict=True))
        shared = [loss(*views[r], temperature=_T, gather=known_gather(views, r)) for r in range(4)]
        mean = tf.add_n(shared) / 4
    np.testing.assert_allclose(mean, alone, rtol=1e-5)
    for got, want in zip(tape.gradient(mean, [z1, z2]), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def _loop_scores(z1, z2, hidden_norm):
    """Positives and negatives of every anchor, by the definition."""
    if hidden_norm:
        z1, z2 = (z / np.linalg.norm(z, axis=1)[:, None] for z in (z1, z2))
    batch = len(z1)
    directions = []
    for anchors, other in ((z1, z2), (z2, z1)):
        rows = []
        for i in range(batch):
            positive = anchors[i] @ other[i] / _T
            negatives = []
            for j in range(batch):
                if j != i:
                    negatives.append(anchors[i] @ other[j] / _T)
                    negatives.append(anchors[i] @ anchors[j] / _T)
            rows.append((positive, np.array(negatives)))
        directions.append(rows)
    return directions


def _softplus(x):
    return np.log1p(np.exp(x))


def _loop_loss(name, rows):
    """One direction of the loss, as the papers and reference code put it."""
    batch = len(rows)
    if name == "simclr":
        terms = [-math.log(np.exp(p) / (np.exp(p) + np.exp(n).sum())) for p, n in rows]
        return 2 * sum(terms) / batch  # directions are summed, not averaged
    if name == "rpc":
        joint = sum(p - 0.5 * 0.02 * p**2 for p, _ in rows) / batch
        products = np.concatenate([n for _, n in rows])
        return -(joint - np.mean(0.3 * products + 0.5 * 0.4 * products**2))
    if name == "wpc":
        joint = sum(p for p, _ in rows) / batch
        return -(joint - np.mean(np.concatenate([n for _, n in rows])))
    entries = batch * (2 * batch - 1)
    if name == "js":
        joint = sum(-_softplus(-p) for p, _ in rows) / batch
        total = sum(_softplus(n).sum() + np.log(2) for _, n in rows)
        return -(joint - total / entries)
    if name == "nwj":
        joint = sum(p for p, _ in rows) / batch
        total = sum(np.exp(n - 1).sum() + np.exp(-1) for _, n in rows)
        return -(joint - total / entries)
    joint = sum(p for p, _ in rows) / batch  # dv
    total = sum(np.exp(n).sum() + 1 for _, n in rows)
    return -(joint - math.log(total / entries))


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("hidden_norm", [True, False])
@pytest.mark.parametrize(("batch", "dim"), [(2, 3), (7, 4)])
def test_two_view_loss_equals_loops(name, hidden_norm, batch, dim):
    z1, z2 = random_views(batch, dim, seed=batch)
    got = _LOSSES[name](
        tf.constant(z1), tf.constant(z2), temperature=_T,
        hidden_norm=hidden_norm,
    )  # fmt: skip
    directions = _loop_scores(z1, z2, hidden_norm)
    expected = np.mean([_loop_loss(name, rows) for rows in directions])
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_rpc_and_simclr_loss_sines_equal_known_values():
    """Numbers derived independently for sines, see golden values of RPC."""

    def sines(s):
        i, d = np.meshgrid(np.arange(4), np.arange(8), indexing="ij")
        return tf.constant(np.sin(s + 7 * i + d * (1 + 0.05 * s)), tf.float32)

    z1, z2 = sines(1.0), sines(1.1)
    np.testing.assert_allclose(
        objective.rpc_loss(z1, z2, temperature=1.0, alpha=0.3, beta=0.01, gamma=0.1),
        -3.253526739,
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        objective.rpc_loss(z1, z2, temperature=128.0, alpha=0.0, beta=0.001, gamma=1.0),
        -0.030640172,
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        objective.simclr_loss(z1, z2, temperature=0.1), 0.497213376, rtol=1e-5
    )


@pytest.mark.parametrize("name", _LOSSES)
def test_two_view_loss_bfloat16_is_computed_in_float32(name):
    z1, z2 = random_views(4, 3)
    z1, z2 = (tf.cast(z, tf.bfloat16) for z in (z1, z2))
    loss = _LOSSES[name](z1, z2, temperature=_T)
    assert loss.dtype == tf.float32
    exact = _LOSSES[name](tf.cast(z1, tf.float32), tf.cast(z2, tf.float32), temperature=_T)
    np.testing.assert_array_equal(loss, exact)


@pytest.mark.parametrize("name", _LOSSES)
def test_two_view_loss_bad_argument_raises(name):
    z1, z2 = map(tf.constant, random_views(4, 3))
    with pytest.raises(ValueError, match=r"Received: 0"):
        _LOSSES[name](z1, z2, temperature=0)
    with pytest.raises(ValueError, match=r"at least 2 images"):
        _LOSSES[name](z1[:1], z2[:1], temperature=_T)
