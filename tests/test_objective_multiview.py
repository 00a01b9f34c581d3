# SPDX-License-Identifier: Apache-2.0
"""Losses of many views equal reference numbers and the papers' formulas."""

import functools
import itertools
import json

import numpy as np
import pytest
import tensorflow as tf

import objective
from tests.support import ref_losses

_T = 0.3


def _views(num_large, num_small, batch=5, dim=4, seed=0):
    """Online and target views of the same images, alike but not equal."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, dim))
    online, target = (
        [
            tf.constant(image + rng.normal(size=image.shape), tf.float32)
            for _ in range(count)
        ]
        for count in (num_large + num_small, num_large)
    )
    return online, target


def _pairs(num_online, num_target, same):
    product = itertools.product(range(num_online), range(num_target))
    return [(a, c) for a, c in product if same or a != c]


def _draws(*shape, seed=1):
    return tf.constant(np.random.default_rng(seed).random(shape), tf.float32)


def _values_and_gradients(function, *tensors):
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(*tensors)
    return value, tape.gradient(value, tensors)


def _assert_same(got, want, rtol=1e-4, atol=3e-6):
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


# The formulas, in float64 and row by row. Gradients by stop_gradient as said.


def _unit(z):
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


class _Loops:
    """ReLIC and SemPPL by their equations."""

    def __init__(self, online, target, temperature, negatives):
        self.online = [_unit(z) for z in online]
        self.target = [_unit(z) for z in target]
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
        for draw, z in enumerate(tf.unstack(_unit(positives[c][i]))):
            candidates = [
                _unit(positives[c][j][draw]) if j in others else t
                for j, t in enumerate(tf.unstack(self.target[c]))
            ]
            log_s = self.p(self.online[a], candidates, i, chosen, z)
            nll -= log_s[0]
            if teacher != a:
                log_t = self.p(self.online[teacher], candidates, i, chosen, z)
                kl += _kl(log_t, log_s, "sg_p")
        return nll / len(positives[c][i]), kl / len(positives[c][i])


def _all_negatives(pairs, batch):
    return {
        pair: [[j for j in range(batch) if j != i] for i in range(batch)]
        for pair in pairs
    }


def _floyd(draws, batch):
    """Floyd's algorithm for one row, with a set."""
    chosen = set()
    for last, draw in zip(range(batch - len(draws), batch), draws, strict=True):
        candidate = int(np.float32(draw) * np.float32(last + 1))
        chosen.add(last if candidate in chosen else candidate)
    return chosen


def _sampled_negatives(pairs, batch, draws):
    return {
        pair: [
            [j + (j >= i) for j in _floyd(row, batch - 1)]
            for i, row in enumerate(draws[index].numpy())
        ]
        for index, pair in enumerate(pairs)
    }


def test_relic_and_siglip_loss_match_reference_values_and_gradients(golden):
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
                temperature=objective.critic_temperature(
                    log_scale, case["max_tau"]
                ),
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
        value, gradients = _values_and_gradients(loss, *arguments)
        key = f"{case['id']:04d}"
        np.testing.assert_allclose(
            value, numbers[f"loss_{key}"], rtol=1e-5, err_msg=case
        )
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
        for name, gradient in zip(
            ("gx", "gxp", "gtau", "gb"), gradients, strict=True
        ):
            expected = numbers[f"{name}_{key}"]
            np.testing.assert_allclose(
                gradient,
                expected,
                rtol=1e-4,
                atol=2e-6 * max(1.0, np.abs(expected).max()),
                err_msg=(name, case),
            )


def test_critic_temperature_of_known_scales():
    assert objective.critic_temperature(tf.constant(0.0), 5.0) == 1.0
    scale = tf.constant(1.0)
    temperature, (gradient,) = _values_and_gradients(
        lambda x: objective.critic_temperature(x, 5.0), scale
    )
    np.testing.assert_allclose(temperature, np.exp(-1.0), rtol=1e-6)
    np.testing.assert_allclose(gradient, -np.exp(-1.0), rtol=1e-6)
    temperature, (gradient,) = _values_and_gradients(
        lambda x: objective.critic_temperature(x, 5.0), tf.constant(1000.0)
    )
    np.testing.assert_allclose(temperature, 0.2, rtol=1e-6)
    assert gradient == 0.0
    with pytest.raises(ValueError, match=r"Received: 0"):
        objective.critic_temperature(scale, 0)


def test_values_of_the_specification():
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


def test_byol_loss_equals_numpy_reference():
    online, target = _views(2, 0)
    np.testing.assert_allclose(
        objective.byol_loss(online, target),
        ref_losses.byol(*(z.numpy().astype(float) for z in (*online, *target))),
        rtol=1e-5,
    )


@pytest.mark.parametrize("mode", ["swap", "transpose"])
@pytest.mark.parametrize("num_negatives", [0, 3])
def test_relic_loss_equals_numpy_reference(mode, num_negatives):
    online, target = _views(2, 0, batch=6)
    draws = _draws(2, 6, 3)
    if num_negatives:
        negatives = objective.sample_negatives(draws, 6, 0).numpy()
    else:
        negatives = [ref_losses.all_negs(6)] * 2
    o, t = (
        [z.numpy().astype(float) for z in views] for views in (online, target)
    )
    terms = [
        ref_losses.relic_pair(o[a], t[c], o[c], t[a], _T, negatives[a], mode)
        for a, c in ((0, 1), (1, 0))
    ]
    got = objective.relic_loss(
        online, target, temperature=_T, alpha=1.5, kl_form=mode,
        num_negatives=num_negatives, draws=draws,
    )  # fmt: skip
    expected = sum(nll + 1.5 * kl for nll, kl in terms)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_large", "num_small"), [(2, 0), (1, 1), (2, 2), (3, 1)]
)
def test_byol_equals_loops_over_the_formula(num_large, num_small):
    online, target = _views(num_large, num_small)

    def loops(*views):
        o, t = views[: len(online)], views[len(online) :]
        loss = 0.0
        for a, c in _pairs(len(o), len(t), same=False):
            for i in range(5):
                target_row = tf.stop_gradient(_unit(t[c])[i])
                loss += tf.reduce_sum((_unit(o[a])[i] - target_row) ** 2) / 5
        return loss

    def loss(*views):
        return objective.byol_loss(views[: len(online)], views[len(online) :])

    got = _values_and_gradients(loss, *online, *target)
    _assert_same(got, _values_and_gradients(loops, *online, *target))
    assert got[1][len(online) :] == (None,) * num_large


def _check_relic(num_large, num_small, num_negatives, same, **kl):
    batch = 4
    online, target = _views(num_large, num_small, batch)
    pairs = _pairs(len(online), len(target), same)
    assert len(pairs) == objective.num_pairs(len(online), len(target), same)
    draws = _draws(len(pairs), batch, max(num_negatives, 1))
    negatives = _all_negatives(pairs, batch)
    if num_negatives:
        negatives = _sampled_negatives(pairs, batch, draws)

    def loops(temperature, *views):
        relic = _Loops(
            views[: len(online)], views[len(online) :], temperature, negatives
        )
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

    arguments = (tf.constant(_T), *online, *target)
    _assert_same(
        _values_and_gradients(loss, *arguments),
        _values_and_gradients(loops, *arguments),
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
def test_relic_equals_loops_over_the_formula(
    kl_form, kl_grad, kl_small, same, num_negatives
):
    _check_relic(
        2, 1, num_negatives, same,
        kl_form=kl_form, kl_grad=kl_grad, kl_small=kl_small,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("num_large", "num_small", "same", "num_negatives"),
    [(3, 2, False, 2), (1, 2, False, 0), (1, 1, True, 1), (2, 0, True, 0)],
)
def test_relic_of_other_numbers_of_views_equals_loops(
    num_large, num_small, same, num_negatives
):
    _check_relic(
        num_large, num_small, num_negatives, same,
        kl_form="swap", kl_grad="sg_p", kl_small="shared_target",
    )  # fmt: skip


def test_siglip_equals_loops_over_the_formula():
    online, target = _views(2, 1)
    pairs = _pairs(3, 2, same=True)
    negatives = _all_negatives(pairs, 5)

    def loops(temperature, bias, *views):
        relic = _Loops(views[:3], views[3:], temperature, negatives)
        temperature, bias = (
            tf.cast(x, tf.float64) for x in (temperature, bias)
        )
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

    arguments = (tf.constant(_T), tf.constant(-2.0), *online, *target)
    _assert_same(
        _values_and_gradients(loss, *arguments),
        _values_and_gradients(loops, *arguments),
    )


@pytest.mark.parametrize(
    ("num_large", "num_small", "num_negatives"),
    [(2, 1, 0), (2, 1, 2), (3, 1, 2), (1, 1, 0)],
)
@pytest.mark.parametrize(
    ("semantic_invariance", "sempos_negatives", "drop"),
    [
        (True, "targets", False),
        (False, "targets", False),
        (True, "sempos", False),
        (True, "targets", True),
        (True, "sempos", True),
    ],
)
def test_semppl_equals_loops_over_the_formula(
    num_large,
    num_small,
    num_negatives,
    semantic_invariance,
    sempos_negatives,
    drop,
):
    batch, k = 4, 2
    online, target = _views(num_large, num_small, batch)
    pairs = _pairs(len(online), len(target), same=True)
    draws = _draws(len(pairs), batch, max(num_negatives, 1))
    negatives = _all_negatives(pairs, batch)
    if num_negatives:
        negatives = _sampled_negatives(pairs, batch, draws)
    rng = np.random.default_rng(2)
    positives = tf.constant(
        rng.normal(size=(num_large, batch, k, 4)), tf.float32
    )
    has_positive = tf.constant([True, False, True, True])
    labels = tf.constant([5, -1, 5, -1])  # what is unknown is not the same
    others = [0, 2, 3] if sempos_negatives == "sempos" else []
    if drop:
        for rows in negatives.values():
            rows[0] = [j for j in rows[0] if j != 2]
            rows[2] = [j for j in rows[2] if j != 0]
    kl = {"kl_form": "swap", "kl_small": "transpose", "kl_grad": "sg_p"}

    def loops(positives, *views):
        semppl = _Loops(
            views[: len(online)], views[len(online) :], _T, negatives
        )
        positives = tf.stop_gradient(positives)
        loss = 0.0
        for (a, c), i in itertools.product(pairs, range(batch)):
            nll, divergence = semppl.pair(a, c, i, **kl)
            if has_positive[i]:
                more = semppl.semantic(a, c, i, positives, others)
                nll += 0.2 * more[0]
                divergence += more[1] if semantic_invariance else 0.0
            loss += (0.3 * nll + 5 * divergence) / batch
        return loss / len(pairs)

    def loss(positives, *views):
        return objective.semppl_loss(
            views[: len(online)],
            views[len(online) :],
            positives,
            has_positive,
            temperature=_T,
            invariance_weight=5.0,
            semantic_weight=0.2,
            semantic_invariance=semantic_invariance,
            sempos_negatives=sempos_negatives,
            drop_same_label_negatives=drop,
            labels=labels,
            num_negatives=num_negatives,
            draws=draws,
            contrastive_weight=0.3,
            **kl,
        )

    got = _values_and_gradients(loss, positives, *online, *target)
    want = _values_and_gradients(loops, positives, *online, *target)
    _assert_same(got, want)
    assert got[1][0] is None


def test_semppl_without_semantic_terms_is_relic():
    online, target = _views(2, 1)
    positives = tf.ones([2, 5, 3, 4])
    shared = {
        "temperature": _T,
        "num_negatives": 2,
        "draws": _draws(6, 5, 2),
        "contrastive_weight": 0.3,
    }
    relic = objective.relic_loss(
        online, target, alpha=5.0, kl_grad="sg_p", include_same_view=True,
        average_pairs=True, **shared,
    )  # fmt: skip

    def semppl(has_positive, **kwargs):
        return objective.semppl_loss(
            online, target, positives, tf.fill([5], has_positive),
            invariance_weight=5.0, **shared, **kwargs,
        )  # fmt: skip

    np.testing.assert_array_equal(semppl(False), relic)
    off = {"semantic_weight": 0.0, "semantic_invariance": False}
    np.testing.assert_array_equal(semppl(True, **off), relic)
    assert abs(semppl(True) - relic) > 0.01


def test_relic_with_all_negatives_is_cross_entropy_both_ways():
    online, target = _views(2, 0)
    expected = 0.0
    for a, c in ((0, 1), (1, 0)):
        scores = tf.matmul(_unit(online[a]), _unit(target[c]), transpose_b=True)
        expected += tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(
                tf.range(5), scores / _T
            )
        )
    for num_negatives in (0, 4, 100):
        got = objective.relic_loss(
            online, target, temperature=_T, alpha=0.0, average_pairs=True,
            num_negatives=num_negatives,
        )  # fmt: skip
        np.testing.assert_allclose(got, expected / 2, rtol=1e-5)


def test_sampling_all_but_one_negative_is_near_using_all():
    """Averaged over draws, a sample of 3 of 4 drops each negative equally."""
    online, target = _views(2, 0)
    pairs = _pairs(2, 2, same=False)
    got = np.mean(
        [
            objective.relic_loss(
                online, target, temperature=_T, alpha=0.0, num_negatives=3,
                draws=_draws(2, 5, 3, seed=seed),
            )
            for seed in range(300)
        ]
    )  # fmt: skip
    expected = []
    for dropped in range(4):
        negatives = {
            pair: [row[:dropped] + row[dropped + 1 :] for row in rows]
            for pair, rows in _all_negatives(pairs, 5).items()
        }
        relic = _Loops(online, target, _T, negatives)
        expected.append(
            sum(
                relic.pair(a, c, i, "swap", "off", "none")[0] / 5
                for (a, c), i in itertools.product(pairs, range(5))
            )
        )
    np.testing.assert_allclose(got, np.mean(expected), rtol=0.01)


def test_kl_without_teacher_gradient_leaves_the_teacher_alone():
    """Small view 1 is taught by large view 0, whose target both share."""
    online, target = _views(1, 1)

    def gradients(kl_grad):
        return _values_and_gradients(
            lambda *online: objective.relic_loss(
                online, target, temperature=_T, alpha=1.0, kl_grad=kl_grad,
                kl_small="shared_target", contrastive_weight=0.0,
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


def test_pairs_are_counted():
    assert objective.num_pairs(2, 2, False) == 2
    assert objective.num_pairs(2, 2, True) == 4
    assert objective.num_pairs(6, 4, True) == 24
    assert objective.num_pairs(6, 4, False) == 20


@pytest.mark.parametrize(("batch", "n"), [(2, 1), (5, 4), (9, 3), (64, 10)])
def test_negatives_are_other_images_without_repetition(batch, n):
    draws = _draws(3, 4, 8 if batch > 8 else 2, n)
    rows = draws.shape[2]
    offset = tf.constant(batch - rows)
    indices = objective.sample_negatives(draws, batch, offset).numpy()
    assert indices.dtype == np.int32
    assert indices.shape == (3, 4, rows, n)
    assert indices.min() >= 0
    assert indices.max() < batch
    own = np.arange(batch - rows, batch)[:, None]
    assert not np.any(indices == own)
    ordered = np.sort(indices, axis=-1)
    assert not np.any(ordered[..., 1:] == ordered[..., :-1])


def test_subsets_of_negatives_are_equally_likely():
    repeats, batch, n = 4000, 5, 2
    draws = _draws(repeats, batch, n, seed=3)
    indices = objective.sample_negatives(draws, batch, 0).numpy()
    for own in range(batch):
        others = [j for j in range(batch) if j != own]
        subsets = list(itertools.combinations(others, n))
        counts = dict.fromkeys(subsets, 0)
        for row in indices[:, own]:
            counts[tuple(sorted(row.tolist()))] += 1
        expected = repeats / len(subsets)
        chi = sum(
            (count - expected) ** 2 / expected for count in counts.values()
        )
        # The 0.1 percent quantile of 5 degrees of freedom.
        assert chi < 20.5


@pytest.mark.parametrize("batch", [3, 4, 513, 4096, 5001, 100_000])
def test_negatives_of_extreme_draws_are_valid(batch):
    """A product of a float32 number below 1 and n does not round up to n."""
    largest = np.nextafter(np.float32(1), np.float32(0))
    draws = tf.constant([[0.0], [largest]])
    indices = objective.sample_negatives(draws, batch, 0)
    np.testing.assert_array_equal(indices, [[1], [batch - 1]])


def _queue(num_views, capacity, num_classes, dim=4, seed=4):
    rng = np.random.default_rng(seed)
    queue = rng.normal(size=(num_views, capacity, dim)).astype(np.float32)
    labels = rng.integers(num_classes, size=capacity).astype(np.int32)
    ids = np.arange(100, 100 + capacity)
    return queue, labels, ids


def test_pseudo_labels_equal_numpy_reference():
    online, _ = _views(3, 0, batch=40)
    queue, labels, ids = _queue(3, 30, 4)
    got = objective.pseudo_labels(
        online, tf.constant(queue), tf.constant(labels), tf.constant(ids),
        tf.range(40, dtype=tf.int64), num_classes=4,
    )  # fmt: skip
    expected = ref_losses.vote(
        [ref_losses.l2(z.numpy()) for z in online],
        [ref_losses.l2(entries) for entries in queue],
        [labels] * 3,
    )
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_vote_equals_loops_without_own_and_empty_entries(num_views):
    batch, num_classes = 20, 3
    online, _ = _views(num_views, 0, batch=batch)
    queue, labels, ids = _queue(num_views, 12, num_classes)
    ids[::3] = -1
    own = np.where(np.arange(batch) % 2, np.arange(100, 100 + batch), 7)
    got = objective.pseudo_labels(
        online, tf.constant(queue), tf.constant(labels), tf.constant(ids),
        tf.constant(own), num_classes=num_classes,
    )  # fmt: skip
    ties = 0
    for i in range(batch):
        votes = [0] * num_classes
        for view, entries in itertools.product(online, queue):
            best, label = -2.0, None
            for entry, entry_label, entry_id in zip(
                entries, labels, ids, strict=True
            ):
                if entry_id in (-1, own[i]):
                    continue
                similarity = _unit(view)[i].numpy() @ _unit(entry).numpy()
                if similarity > best:
                    best, label = similarity, entry_label
            votes[label] += 1
        ties += votes.count(max(votes)) > 1
        assert got[0][i] == votes.index(max(votes))
        np.testing.assert_allclose(got[1][i], max(votes) / num_views**2)
    assert ties > 0 or num_views != 2


def test_no_vote_without_other_images():
    queue, labels, ids = _queue(2, 3, 4)
    ids = np.array([-1, 9, -1])
    online, _ = _views(2, 0, batch=2)

    def vote(*online):
        return objective.pseudo_labels(
            online, tf.constant(queue), tf.constant(labels), tf.constant(ids),
            tf.constant([9, 8], tf.int64), num_classes=4,
        )  # fmt: skip

    label, agreement = vote(*online)
    assert label.dtype == tf.int32
    np.testing.assert_array_equal(label, [-1, labels[1]])
    np.testing.assert_array_equal(agreement, [0.0, 1.0])
    gradients = _values_and_gradients(lambda *z: vote(*z)[1], *online)[1]
    assert gradients == (None, None)
    with pytest.raises(ValueError, match=r"1 views, 2 queues"):
        vote(online[0])


def test_draws_of_semantic_positives_equal_loops():
    queue, _, ids = _queue(2, 10, 3)
    queue_labels = np.array([0, 1, 0, 2, 1, 0, 0, 1, 2, -1], np.int32)
    ids[[0, 8]] = -1
    # Of class 2 entry 3 alone is filled, and it is row 3's own image.
    labels = np.array([0, 1, 2, 2, -1, 0], np.int32)
    own = np.array([0, 1, 2, ids[3], 4, ids[5]])
    draws = _draws(2, 6, 40)
    largest = np.nextafter(np.float32(1), np.float32(0))
    draws = tf.concat(
        [draws, tf.zeros([2, 6, 1]), tf.fill([2, 6, 1], largest)], -1
    )
    positives, has_positive = objective.draw_semantic_positives(
        *map(tf.constant, (labels, queue, queue_labels, ids, own)), draws
    )
    assert positives.shape == (2, 6, 42, 4)
    np.testing.assert_array_equal(
        has_positive, [True, True, True, False, False, True]
    )
    for c, i, k in itertools.product(range(2), range(6), range(42)):
        matches = [
            entry
            for entry, label, entry_id in zip(
                queue[c], queue_labels, ids, strict=True
            )
            if label == labels[i] != -1 and entry_id not in (-1, own[i])
        ]
        expected = np.zeros(4)
        if matches:
            chosen = int(draws[c, i, k].numpy() * np.float32(len(matches)))
            expected = matches[min(chosen, len(matches) - 1)]
        np.testing.assert_array_equal(positives[c, i, k], expected)


def test_draws_of_semantic_positives_pass_no_gradient():
    queue, labels, ids = map(tf.constant, _queue(2, 6, 2))
    _, gradients = _values_and_gradients(
        lambda queue: tf.reduce_sum(
            objective.draw_semantic_positives(
                tf.constant([0, 1]), queue, labels, ids,
                tf.constant([1, 2], tf.int64), _draws(2, 2, 3),
            )[0]
        ),
        queue,
    )  # fmt: skip
    assert gradients == (None,)


def _replica_gather(global_views, replica, rows):
    """The `gather` of a replica that holds the given rows of known views."""

    def gather(z, known=()):
        matching = [
            view
            for view in (*global_views, *known)
            if np.array_equal(view[rows * replica : rows * (replica + 1)], z)
        ]
        assert len(matching) == 1
        return matching[0], tf.constant(replica * rows)

    return gather


def _losses(batch):
    """Losses with draws and labels given for the rows `start` to `stop`."""
    draws = _draws(6, batch, 3)
    positives = _draws(2, batch, 2, 4, seed=7) - 0.5
    has_positive = tf.constant(np.arange(batch) % 4 == 0)
    labels = tf.range(batch) % 3 - 1

    def relic(o, t, gather, rows):
        return objective.relic_loss(
            o, t, gather=gather, temperature=_T, alpha=1.0,
            include_same_view=True, num_negatives=3, draws=draws[:, rows],
        )  # fmt: skip

    def relic_transpose(o, t, gather, _):
        return objective.relic_loss(
            o, t, gather=gather, temperature=_T, alpha=1.0, kl_form="transpose"
        )

    def siglip(o, t, gather, _):
        return objective.siglip_loss(
            o, t, gather=gather, temperature=_T, bias=-1.0, alpha=1.0
        )

    def semppl(o, t, gather, rows):
        return objective.semppl_loss(
            o, t, positives[:, rows], has_positive[rows], gather=gather,
            temperature=_T, invariance_weight=5.0, num_negatives=3,
            draws=draws[:, rows],
        )  # fmt: skip

    def semppl_options(o, t, gather, rows):
        known = [
            labels,
            tf.cast(has_positive, tf.float32),
            # As the loss gathers them.
            tf.math.l2_normalize(tf.stack(tf.unstack(positives), 1), -1),
        ]
        gather = gather and functools.partial(gather, known=known)
        return objective.semppl_loss(
            o, t, positives[:, rows], has_positive[rows], gather=gather,
            temperature=_T, invariance_weight=5.0, labels=labels[rows],
            sempos_negatives="sempos", drop_same_label_negatives=True,
        )  # fmt: skip

    def byol(o, t, gather, _):
        return objective.byol_loss(o, t, gather=gather)

    return {
        "byol": byol,
        "relic": relic,
        "relic_transpose": relic_transpose,
        "siglip": siglip,
        "semppl": semppl,
        "semppl_options": semppl_options,
    }


@pytest.mark.parametrize(
    "name",
    [
        "byol",
        "relic",
        "relic_transpose",
        "siglip",
        "semppl",
        "semppl_options",
    ],
)
def test_replicas_average_to_the_global_loss_and_gradient(name):
    batch = 8
    online, target = _views(2, 1, batch)
    loss = _losses(batch)[name]

    def alone(*views):
        return loss(views[:3], views[3:], None, slice(None))

    def shared(*views):
        total = 0.0
        for replica in range(2):
            rows = slice(4 * replica, 4 * (replica + 1))
            local = [z[rows] for z in views]
            gather = _replica_gather(views, replica, 4)
            total += loss(local[:3], local[3:], gather, rows) / 2
        return total

    _assert_same(
        _values_and_gradients(shared, *online, *target),
        _values_and_gradients(alone, *online, *target),
    )


def test_xla_compiles_semppl_with_votes_and_draws():
    batch, num_views = 8, 2
    online, target = _views(num_views, 0, batch)
    queue, labels, ids = map(tf.constant, _queue(num_views, 16, 3))
    own = tf.range(batch, dtype=tf.int64)
    negatives, positives = _draws(4, batch, 3), _draws(num_views, batch, 3)

    def step(*views):
        with tf.GradientTape() as tape:
            tape.watch(views)
            label, agreement = objective.pseudo_labels(
                views[:num_views], queue, labels, ids, own, num_classes=3
            )
            loss = objective.semppl_loss(
                views[:num_views],
                views[num_views:],
                *objective.draw_semantic_positives(
                    label, queue, labels, ids, own, positives
                ),
                temperature=_T,
                invariance_weight=5.0,
                num_negatives=3,
                draws=negatives,
            )
        return loss, label, agreement, *tape.gradient(loss, views)

    compiled = tf.function(step, jit_compile=True)(*online, *target)
    for got, want in zip(compiled, step(*online, *target), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["byol", "relic", "siglip", "semppl"])
def test_half_precision_inputs_are_computed_in_float32(name):
    online, target = (
        [tf.cast(z, tf.bfloat16) for z in views] for views in _views(2, 1, 8)
    )
    loss = _losses(8)[name]
    got = loss(online, target, None, slice(None))
    assert got.dtype == tf.float32
    exact = loss(
        [tf.cast(z, tf.float32) for z in online],
        [tf.cast(z, tf.float32) for z in target],
        None,
        slice(None),
    )
    np.testing.assert_array_equal(got, exact)


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
def test_bad_arguments_of_relic_are_refused(changes, message):
    online, target = _views(2, 0)
    arguments = {"temperature": _T, "alpha": 1.0, **changes}
    with pytest.raises(ValueError, match=message):
        objective.relic_loss(online, target, **arguments)


@pytest.mark.parametrize("name", ["byol", "relic_transpose", "siglip"])
def test_views_that_do_not_fit_are_refused(name):
    online, target = _views(2, 0)
    loss = _losses(8)[name]
    for bad, message in (
        ((online[:1], target), r"1 online, 2 target views"),
        ((online, []), r"2 online, 0 target views"),
        ((online[:1], target[:1]), r"A single view"),
        (([online[0], online[1][:3]], target), r"the same shape.*\(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*bad, None, slice(None))
    if name != "byol":
        with pytest.raises(ValueError, match=r"at least 2 images"):
            loss([z[:1] for z in online], [z[:1] for z in target], None, None)


def test_bad_arguments_of_semppl_are_refused():
    online, target = _views(2, 0)

    def loss(positives, **changes):
        return objective.semppl_loss(
            online, target, positives, tf.fill([5], True),
            **{"temperature": _T, "invariance_weight": 1.0, **changes},
        )  # fmt: skip

    good = tf.ones([2, 5, 3, 4])
    loss(good)
    with pytest.raises(ValueError, match=r"\[2, 5, k, 4\]. Received: \[1, 5"):
        loss(good[:1])
    with pytest.raises(ValueError, match=r"`semantic_weight` must not"):
        loss(good, semantic_weight=-1.0)
    with pytest.raises(ValueError, match=r"`invariance_weight` must not"):
        loss(good, invariance_weight=-1.0)
    with pytest.raises(ValueError, match=r"`sempos_negatives` must be one of"):
        loss(good, sempos_negatives="views")
    with pytest.raises(ValueError, match=r"negatives` needs `labels`"):
        loss(good, drop_same_label_negatives=True)
    with pytest.raises(ValueError, match=r"There are 4 other images"):
        objective.sample_negatives(_draws(5, 5), 5, 0)
