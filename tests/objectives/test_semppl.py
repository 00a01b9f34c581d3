# SPDX-License-Identifier: Apache-2.0
"""`semppl_loss` and its pseudo-labels equal references and formulas."""

import itertools

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
    make_queue,
    make_views,
    sampled_negatives,
    unit,
    values_and_gradients,
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
def test_semppl_loss_any_options_equals_loops(
    num_large,
    num_small,
    num_negatives,
    semantic_invariance,
    sempos_negatives,
    drop,
):
    batch, k = 4, 2
    online, target = make_views(num_large, num_small, batch)
    pairs = make_pairs(len(online), len(target), same=True)
    draws = make_draws(len(pairs), batch, max(num_negatives, 1))
    negatives = all_negatives(pairs, batch)
    if num_negatives:
        negatives = sampled_negatives(pairs, batch, draws)
    rng = np.random.default_rng(2)
    positives = tf.constant(rng.normal(size=(num_large, batch, k, 4)), tf.float32)
    has_positive = tf.constant([True, False, True, True])
    labels = tf.constant([5, -1, 5, -1])  # what is unknown is not the same
    others = [0, 2, 3] if sempos_negatives == "sempos" else []
    if drop:
        for rows in negatives.values():
            rows[0] = [j for j in rows[0] if j != 2]
            rows[2] = [j for j in rows[2] if j != 0]
    kl = {"kl_form": "swap", "kl_small": "transpose", "kl_grad": "sg_p"}

    def loops(positives, *views):
        semppl = Loops(views[: len(online)], views[len(online) :], TEMPERATURE, negatives)
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
            temperature=TEMPERATURE,
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

    got = values_and_gradients(loss, positives, *online, *target)
    want = values_and_gradients(loops, positives, *online, *target)
    assert_same(got, want)
    assert got[1][0] is None


def test_semppl_loss_without_semantic_terms_equals_relic_loss():
    online, target = make_views(2, 1)
    positives = tf.ones([2, 5, 3, 4])
    shared = {
        "temperature": TEMPERATURE,
        "num_negatives": 2,
        "draws": make_draws(6, 5, 2),
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


def test_pseudo_labels_three_views_equal_numpy_reference():
    online, _ = make_views(3, 0, batch=40)
    queue, labels, ids = make_queue(3, 30, 4)
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
def test_pseudo_labels_own_and_empty_slots_equal_loops(num_views):
    batch, num_classes = 20, 3
    online, _ = make_views(num_views, 0, batch=batch)
    queue, labels, ids = make_queue(num_views, 12, num_classes)
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
            for entry, entry_label, entry_id in zip(entries, labels, ids, strict=True):
                if entry_id in (-1, own[i]):
                    continue
                similarity = unit(view)[i].numpy() @ unit(entry).numpy()
                if similarity > best:
                    best, label = similarity, entry_label
            votes[label] += 1
        ties += votes.count(max(votes)) > 1
        assert got[0][i] == votes.index(max(votes))
        np.testing.assert_allclose(got[1][i], max(votes) / num_views**2)
    assert ties > 0 or num_views != 2


def test_pseudo_labels_without_other_images_are_none():
    queue, labels, ids = make_queue(2, 3, 4)
    ids = np.array([-1, 9, -1])
    online, _ = make_views(2, 0, batch=2)

    def vote(*online):
        return objective.pseudo_labels(
            online, tf.constant(queue), tf.constant(labels), tf.constant(ids),
            tf.constant([9, 8], tf.int64), num_classes=4,
        )  # fmt: skip

    label, agreement = vote(*online)
    assert label.dtype == tf.int32
    np.testing.assert_array_equal(label, [-1, labels[1]])
    np.testing.assert_array_equal(agreement, [0.0, 1.0])
    gradients = values_and_gradients(lambda *z: vote(*z)[1], *online)[1]
    assert gradients == (None, None)
    with pytest.raises(ValueError, match=r"1 views, 2 queues"):
        vote(online[0])


def test_draw_semantic_positives_any_labels_equals_loops():
    queue, _, ids = make_queue(2, 10, 3)
    queue_labels = np.array([0, 1, 0, 2, 1, 0, 0, 1, 2, -1], np.int32)
    ids[[0, 8]] = -1
    # Of class 2 entry 3 alone is filled, and it is row 3's own image.
    labels = np.array([0, 1, 2, 2, -1, 0], np.int32)
    own = np.array([0, 1, 2, ids[3], 4, ids[5]])
    draws = make_draws(2, 6, 40)
    largest = np.nextafter(np.float32(1), np.float32(0))
    draws = tf.concat([draws, tf.zeros([2, 6, 1]), tf.fill([2, 6, 1], largest)], -1)
    positives, has_positive = objective.draw_semantic_positives(
        *map(tf.constant, (labels, queue, queue_labels, ids, own)), draws
    )
    assert positives.shape == (2, 6, 42, 4)
    np.testing.assert_array_equal(has_positive, [True, True, True, False, False, True])
    for c, i, k in itertools.product(range(2), range(6), range(42)):
        matches = [
            entry
            for entry, label, entry_id in zip(queue[c], queue_labels, ids, strict=True)
            if label == labels[i] != -1 and entry_id not in (-1, own[i])
        ]
        expected = np.zeros(4)
        if matches:
            chosen = int(draws[c, i, k].numpy() * np.float32(len(matches)))
            expected = matches[min(chosen, len(matches) - 1)]
        np.testing.assert_array_equal(positives[c, i, k], expected)


def test_draw_semantic_positives_queue_has_no_gradient():
    queue, labels, ids = map(tf.constant, make_queue(2, 6, 2))
    _, gradients = values_and_gradients(
        lambda queue: tf.reduce_sum(
            objective.draw_semantic_positives(
                tf.constant([0, 1]), queue, labels, ids,
                tf.constant([1, 2], tf.int64), make_draws(2, 2, 3),
            )[0]
        ),
        queue,
    )  # fmt: skip
    assert gradients == (None,)


def test_semppl_loss_with_votes_under_xla_equals_eager():
    batch, num_views = 8, 2
    online, target = make_views(num_views, 0, batch)
    queue, labels, ids = map(tf.constant, make_queue(num_views, 16, 3))
    own = tf.range(batch, dtype=tf.int64)
    negatives, positives = (
        make_draws(4, batch, 3),
        make_draws(num_views, batch, 3),
    )

    def step(*views):
        with tf.GradientTape() as tape:
            tape.watch(views)
            label, agreement = objective.pseudo_labels(
                views[:num_views], queue, labels, ids, own, num_classes=3
            )
            loss = objective.semppl_loss(
                views[:num_views],
                views[num_views:],
                *objective.draw_semantic_positives(label, queue, labels, ids, own, positives),
                temperature=TEMPERATURE,
                invariance_weight=5.0,
                num_negatives=3,
                draws=negatives,
            )
        return loss, label, agreement, *tape.gradient(loss, views)

    compiled = tf.function(step, jit_compile=True)(*online, *target)
    for got, want in zip(compiled, step(*online, *target), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_semppl_loss_bad_argument_raises():
    online, target = make_views(2, 0)

    def loss(positives, **changes):
        return objective.semppl_loss(
            online, target, positives, tf.fill([5], True),
            **{"temperature": TEMPERATURE, "invariance_weight": 1.0, **changes},
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
        objective.sample_negatives(make_draws(5, 5), 5, 0)
