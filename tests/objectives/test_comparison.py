# SPDX-License-Identifier: Apache-2.0
"""Pairs, sampled negatives and replicas of the losses of many views."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf

import objective
from tests.support.many_views import (
    TEMPERATURE,
    assert_same,
    make_draws,
    make_views,
    values_and_gradients,
)


def test_num_pairs_of_views_equals_known_counts():
    assert objective.num_pairs(2, 2, False) == 2
    assert objective.num_pairs(2, 2, True) == 4
    assert objective.num_pairs(6, 4, True) == 24
    assert objective.num_pairs(6, 4, False) == 20


@pytest.mark.parametrize(("batch", "n"), [(2, 1), (5, 4), (9, 3), (64, 10)])
def test_sample_negatives_any_batch_returns_distinct_others(batch, n):
    draws = make_draws(3, 4, 8 if batch > 8 else 2, n)
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


def test_sample_negatives_many_draws_are_uniform_over_subsets():
    repeats, batch, n = 4000, 5, 2
    draws = make_draws(repeats, batch, n, seed=3)
    indices = objective.sample_negatives(draws, batch, 0).numpy()
    for own in range(batch):
        others = [j for j in range(batch) if j != own]
        subsets = list(itertools.combinations(others, n))
        counts = dict.fromkeys(subsets, 0)
        for row in indices[:, own]:
            counts[tuple(sorted(row.tolist()))] += 1
        expected = repeats / len(subsets)
        chi = sum((count - expected) ** 2 / expected for count in counts.values())
        # The 0.1 percent quantile of 5 degrees of freedom.
        assert chi < 20.5


@pytest.mark.parametrize("batch", [3, 4, 513, 4096, 5001, 100_000])
def test_sample_negatives_extreme_draws_are_valid(batch):
    """A product of a float32 number below 1 and n does not round up to n."""
    largest = np.nextafter(np.float32(1), np.float32(0))
    draws = tf.constant([[0.0], [largest]])
    indices = objective.sample_negatives(draws, batch, 0)
    np.testing.assert_array_equal(indices, [[1], [batch - 1]])


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
    draws = make_draws(6, batch, 3)
    positives = make_draws(2, batch, 2, 4, seed=7) - 0.5
    has_positive = tf.constant(np.arange(batch) % 4 == 0)
    labels = tf.range(batch) % 3 - 1

    def relic(o, t, gather, rows):
        return objective.relic_loss(
            o, t, gather=gather, temperature=TEMPERATURE, alpha=1.0,
            include_same_view=True, num_negatives=3, draws=draws[:, rows],
        )  # fmt: skip

    def relic_transpose(o, t, gather, _):
        return objective.relic_loss(
            o,
            t,
            gather=gather,
            temperature=TEMPERATURE,
            alpha=1.0,
            kl_form="transpose",
        )

    def siglip(o, t, gather, _):
        return objective.siglip_loss(
            o, t, gather=gather, temperature=TEMPERATURE, bias=-1.0, alpha=1.0
        )

    def semppl(o, t, gather, rows):
        return objective.semppl_loss(
            o, t, positives[:, rows], has_positive[rows], gather=gather,
            temperature=TEMPERATURE, invariance_weight=5.0, num_negatives=3,
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
            temperature=TEMPERATURE, invariance_weight=5.0, labels=labels[rows],
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
def test_many_view_loss_on_two_replicas_equals_one(name):
    batch = 8
    online, target = make_views(2, 1, batch)
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

    assert_same(
        values_and_gradients(shared, *online, *target),
        values_and_gradients(alone, *online, *target),
    )


@pytest.mark.parametrize("name", ["byol", "relic", "siglip", "semppl"])
def test_many_view_loss_bfloat16_is_computed_in_float32(name):
    online, target = ([tf.cast(z, tf.bfloat16) for z in views] for views in make_views(2, 1, 8))
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


@pytest.mark.parametrize("name", ["byol", "relic_transpose", "siglip"])
def test_many_view_loss_views_that_do_not_fit_raise(name):
    online, target = make_views(2, 0)
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
