# SPDX-License-Identifier: Apache-2.0
"""`relic_loss` and `siglip_loss` equal references and their formulas."""

import itertools
import json

import numpy as np
import pytest
import tensorflow as tf

import objective
from tests.support import ref_losses
from tests.support.many_views import (
    TEMPERATURE,
    Loops,
    all_negatives,
    assert_same,
    make_draws,
    make_pairs,
    make_views,
    sampled_negatives,
    unit,
    values_and_gradients,
)


def test_relic_and_siglip_loss_golden_cases_equal_reference(golden):
    numbers = golden("relic_loss.npz")
    cases = json.loads(str(numbers["cases_json"]))
    assert len(cases) == 72
    for case in cases:

        def loss(x, x_prime, log_scale, bias, case=case, **weights):
            function = objective.relic_loss
            if case["use_siglip"]:
                function = objective.siglip_loss
            return function(
                [x],
                [x_prime],
                temperature=objective.critic_temperature(log_scale, case["max_tau"]),
                bias=bias,
                kl_form="transpose_reversed",
                include_same_view=True,
                **{"alpha": case["alpha"], **weights},
            )

        arguments = [
            tf.constant(value, tf.float32)
            for value in (
                numbers[case["x"]],
                numbers[case["x_prime"]],
                case["tau"],
                case["b"],
            )
        ]
        value, gradients = values_and_gradients(loss, *arguments)
        key = f"{case['id']:04d}"
        np.testing.assert_allclose(value, numbers[f"loss_{key}"], rtol=1e-5, err_msg=case)
        # atol: differences of logarithms of order 1 in float32.
        np.testing.assert_allclose(
            loss(*arguments, alpha=1.0, contrastive_weight=0.0),
            numbers[f"inv_{key}"],
            rtol=1e-4,
            atol=1e-6,
            err_msg=case,
        )
        if case["clamped"]:
            assert gradients[2] == 0.0
        for name, gradient in zip(("gx", "gxp", "gtau", "gb"), gradients, strict=True):
            expected = numbers[f"{name}_{key}"]
            np.testing.assert_allclose(
                gradient,
                expected,
                rtol=1e-4,
                atol=2e-6 * max(1.0, np.abs(expected).max()),
                err_msg=(name, case),
            )


def test_critic_temperature_known_scales_equal_clamped_inverse():
    assert objective.critic_temperature(tf.constant(0.0), 5.0) == 1.0
    scale = tf.constant(1.0)
    temperature, (gradient,) = values_and_gradients(
        lambda x: objective.critic_temperature(x, 5.0), scale
    )
    np.testing.assert_allclose(temperature, np.exp(-1.0), rtol=1e-6)
    np.testing.assert_allclose(gradient, -np.exp(-1.0), rtol=1e-6)
    temperature, (gradient,) = values_and_gradients(
        lambda x: objective.critic_temperature(x, 5.0), tf.constant(1000.0)
    )
    np.testing.assert_allclose(temperature, 0.2, rtol=1e-6)
    assert gradient == 0.0
    with pytest.raises(ValueError, match=r"Received: 0"):
        objective.critic_temperature(scale, 0)


def test_relic_loss_sines_equal_known_values():
    """Numbers derived independently for sines, see golden values of RPC."""

    def sines(s):
        i, d = np.meshgrid(np.arange(4), np.arange(8), indexing="ij")
        return tf.constant(np.sin(s + 7 * i + d * (1 + 0.05 * s)), tf.float32)

    online = [sines(1.0), sines(1.1)]
    target = [sines(1.2), sines(1.3)]

    def loss(nll, alpha, **kwargs):
        return objective.relic_loss(
            online, target, temperature=0.2, contrastive_weight=nll,
            alpha=alpha, **kwargs,
        )  # fmt: skip

    nll = 0.582164446 + 0.371297888
    kl = 0.096981601 + 0.095172706
    np.testing.assert_allclose(loss(1.0, 0.0), nll, rtol=1e-5)
    np.testing.assert_allclose(loss(0.0, 1.0), kl, rtol=1e-5)
    np.testing.assert_allclose(loss(0.5, 3.0), 0.5 * nll + 3 * kl, rtol=1e-5)
    np.testing.assert_allclose(
        loss(0.5, 3.0, average_pairs=True),
        (0.5 * nll + 3 * kl) / 2,
        rtol=1e-5,
    )


@pytest.mark.parametrize("mode", ["swap", "transpose"])
@pytest.mark.parametrize("num_negatives", [0, 3])
def test_relic_loss_two_views_equals_numpy_reference(mode, num_negatives):
    online, target = make_views(2, 0, batch=6)
    draws = make_draws(2, 6, 3)
    if num_negatives:
        negatives = objective.sample_negatives(draws, 6, 0).numpy()
    else:
        negatives = [ref_losses.all_negs(6)] * 2
    o, t = ([z.numpy().astype(float) for z in views] for views in (online, target))
    terms = [
        ref_losses.relic_pair(o[a], t[c], o[c], t[a], TEMPERATURE, negatives[a], mode)
        for a, c in ((0, 1), (1, 0))
    ]
    got = objective.relic_loss(
        online, target, temperature=TEMPERATURE, alpha=1.5, kl_form=mode,
        num_negatives=num_negatives, draws=draws,
    )  # fmt: skip
    expected = sum(nll + 1.5 * kl for nll, kl in terms)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def _check_relic(num_large, num_small, num_negatives, same, **kl):
    batch = 4
    online, target = make_views(num_large, num_small, batch)
    pairs = make_pairs(len(online), len(target), same)
    assert len(pairs) == objective.num_pairs(len(online), len(target), same)
    draws = make_draws(len(pairs), batch, max(num_negatives, 1))
    negatives = all_negatives(pairs, batch)
    if num_negatives:
        negatives = sampled_negatives(pairs, batch, draws)

    def loops(temperature, *views):
        relic = Loops(views[: len(online)], views[len(online) :], temperature, negatives)
        loss = 0.0
        for (a, c), i in itertools.product(pairs, range(batch)):
            nll, divergence = relic.pair(a, c, i, **kl)
            loss += (0.7 * nll + 1.9 * divergence) / batch
        return loss

    def loss(temperature, *views):
        return objective.relic_loss(
            views[: len(online)],
            views[len(online) :],
            temperature=temperature,
            alpha=1.9,
            contrastive_weight=0.7,
            include_same_view=same,
            num_negatives=num_negatives,
            draws=draws,
            **kl,
        )

    arguments = (tf.constant(TEMPERATURE), *online, *target)
    assert_same(
        values_and_gradients(loss, *arguments),
        values_and_gradients(loops, *arguments),
    )


@pytest.mark.parametrize(
    ("kl_form", "kl_small"),
    [
        ("swap", "transpose"),
        ("swap", "shared_target"),
        ("swap", "off"),
        ("transpose", "transpose"),
        ("transpose", "off"),
        ("transpose_reversed", "shared_target"),  # is for "swap" alone
        ("transpose_reversed", "off"),
    ],
)
@pytest.mark.parametrize("kl_grad", ["sg_p", "entropy_only", "none"])
@pytest.mark.parametrize(("same", "num_negatives"), [(False, 0), (True, 2)])
def test_relic_loss_any_kl_equals_loops(kl_form, kl_grad, kl_small, same, num_negatives):
    _check_relic(
        2, 1, num_negatives, same,
        kl_form=kl_form, kl_grad=kl_grad, kl_small=kl_small,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("num_large", "num_small", "same", "num_negatives"),
    [(3, 2, False, 2), (1, 2, False, 0), (1, 1, True, 1), (2, 0, True, 0)],
)
def test_relic_loss_any_views_equals_loops(num_large, num_small, same, num_negatives):
    _check_relic(
        num_large, num_small, num_negatives, same,
        kl_form="swap", kl_grad="sg_p", kl_small="shared_target",
    )  # fmt: skip


def test_siglip_loss_three_views_equals_loops():
    online, target = make_views(2, 1)
    pairs = make_pairs(3, 2, same=True)
    negatives = all_negatives(pairs, 5)

    def loops(temperature, bias, *views):
        relic = Loops(views[:3], views[3:], temperature, negatives)
        temperature, bias = (tf.cast(x, tf.float64) for x in (temperature, bias))
        loss = 0.0
        for (a, c), i, j in itertools.product(pairs, range(5), range(5)):
            sign = 1.0 if i == j else -1.0
            score = tf.tensordot(relic.online[a][i], relic.target[c][j], 1)
            score = score / temperature + bias
            loss += 0.7 * tf.math.log(1 + tf.exp(-sign * score)) / 5
        for (a, c), i in itertools.product(pairs, range(5)):
            kl = relic.pair(a, c, i, "transpose_reversed", "transpose", "none")
            loss += 1.9 * kl[1] / 5
        return loss / len(pairs)

    def loss(temperature, bias, *views):
        return objective.siglip_loss(
            views[:3], views[3:], temperature=temperature, bias=bias,
            alpha=1.9, contrastive_weight=0.7, include_same_view=True,
            average_pairs=True,
        )  # fmt: skip

    arguments = (tf.constant(TEMPERATURE), tf.constant(-2.0), *online, *target)
    assert_same(
        values_and_gradients(loss, *arguments),
        values_and_gradients(loops, *arguments),
    )


def test_relic_loss_all_negatives_equals_cross_entropy():
    online, target = make_views(2, 0)
    expected = 0.0
    for a, c in ((0, 1), (1, 0)):
        scores = tf.matmul(unit(online[a]), unit(target[c]), transpose_b=True)
        expected += tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(5), scores / TEMPERATURE)
        )
    for num_negatives in (0, 4, 100):
        got = objective.relic_loss(
            online, target, temperature=TEMPERATURE, alpha=0.0,
            average_pairs=True, num_negatives=num_negatives,
        )  # fmt: skip
        np.testing.assert_allclose(got, expected / 2, rtol=1e-5)


def test_relic_loss_sampled_negatives_averages_over_subsets():
    """Averaged over draws, a sample of 3 of 4 drops each negative equally."""
    online, target = make_views(2, 0)
    pairs = make_pairs(2, 2, same=False)
    got = np.mean(
        [
            objective.relic_loss(
                online, target, temperature=TEMPERATURE, alpha=0.0,
                num_negatives=3, draws=make_draws(2, 5, 3, seed=seed),
            )
            for seed in range(300)
        ]
    )  # fmt: skip
    expected = []
    for dropped in range(4):
        negatives = {
            pair: [row[:dropped] + row[dropped + 1 :] for row in rows]
            for pair, rows in all_negatives(pairs, 5).items()
        }
        relic = Loops(online, target, TEMPERATURE, negatives)
        expected.append(
            sum(
                relic.pair(a, c, i, "swap", "off", "none")[0] / 5
                for (a, c), i in itertools.product(pairs, range(5))
            )
        )
    np.testing.assert_allclose(got, np.mean(expected), rtol=0.01)


def test_relic_loss_kl_grad_sg_p_gives_teacher_no_gradient():
    """Small view 1 is taught by large view 0, whose target both share."""
    online, target = make_views(1, 1)

    def gradients(kl_grad):
        return values_and_gradients(
            lambda *online: objective.relic_loss(
                online, target, temperature=TEMPERATURE, alpha=1.0,
                kl_grad=kl_grad, kl_small="shared_target",
                contrastive_weight=0.0,
            ),
            *online,
        )[1]  # fmt: skip

    for kl_grad, is_taught in (
        ("sg_p", False),
        ("entropy_only", True),
        ("none", True),
    ):
        teacher, pupil = gradients(kl_grad)
        assert np.any(pupil)
        assert (teacher is not None and np.any(teacher)) == is_taught


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, r"`temperature` must be positive. Received: 0"),
        ({"alpha": -1.0}, r"`alpha` must not be negative. Received: -1"),
        ({"contrastive_weight": -1.0}, r"`contrastive_weight` must not be"),
        ({"num_negatives": -1}, r"`num_negatives` must not be negative"),
        ({"num_negatives": 2}, r"shape \[2, 5, 2\]. Received: None"),
        (
            {"num_negatives": 2, "draws": tf.zeros([2, 4, 2])},
            r"shape \[2, 5, 2\]. Received: \(2, 4, 2\)",
        ),
        ({"kl_grad": "all"}, r"`kl_grad` must be one of .* Received: 'all'"),
        ({"kl_form": "off"}, r"`kl_form` must be one of .* Received: 'off'"),
        ({"kl_small": "swap"}, r"`kl_small` must be one of .*: 'swap'"),
    ],
)
def test_relic_loss_bad_argument_raises(changes, message):
    online, target = make_views(2, 0)
    arguments = {"temperature": TEMPERATURE, "alpha": 1.0, **changes}
    with pytest.raises(ValueError, match=message):
        objective.relic_loss(online, target, **arguments)
