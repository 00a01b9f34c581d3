# SPDX-License-Identifier: Apache-2.0
"""Forward values of several losses in float64 numpy.

The functions are written independently of `objective.py`, directly from the formulas of the papers,
and serve as references for its tests.
"""

import numpy as np


def l2(x):
    """Normalises the rows to length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def byol(q1, q2, z1, z2):
    """Returns BYOL's loss of both directions.

    Args:
        q1: predictions of the first view, `[batch, dim]`.
        q2: predictions of the second view.
        z1: target projections of the first view.
        z2: target projections of the second view.
    """

    def distance(a, b):
        return ((l2(a) - l2(b)) ** 2).sum(-1).mean()

    return distance(q1, z2) + distance(q2, z1)


def all_negs(batch):
    """Returns the indices of all other rows for each row."""
    return np.array([[j for j in range(batch) if j != i] for i in range(batch)])


def relic_pair(o_a, t_b, o_b, t_a, temperature, negatives, mode="swap"):
    """Returns the contrastive loss and the KL term from view a to view b.

    The KL term is KL(p_ab || p_ba).

    Args:
        o_a: online projections of view a, `[batch, dim]`.
        t_b: target projections of view b.
        o_b: online projections of view b.
        t_a: target projections of view a.
        temperature: softmax temperature.
        negatives: indices of the negatives of each row.
        mode: "swap" takes p_ba from `o_b` and `t_a`; "transpose" takes it from `t_b` and `o_a`.
    """
    o_a, t_b = l2(o_a), l2(t_b)
    log_p = _log_probabilities(o_a, t_b, temperature, negatives)
    if mode == "swap":
        o, t = l2(o_b), l2(t_a)
    else:
        o, t = t_b, o_a
    log_q = _log_probabilities(o, t, temperature, negatives)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    return -log_p[:, 0].mean(), kl


def vote(predictions, queues, queue_labels):
    """Returns SemPPL's pseudo-labels and the share of votes for them.

    Args:
        predictions: normalised online predictions `[batch, dim]` of each view.
        queues: normalised target projections `[capacity, dim]` of each view.
        queue_labels: labels `[capacity]` of each queue.
    """
    votes = np.stack(
        [
            labels[(p @ queue.T).argmax(1)]
            for p in predictions
            for queue, labels in zip(queues, queue_labels, strict=True)
        ],
        axis=1,
    )
    # Among classes with equally many votes, the smallest wins.
    winners = np.array([np.bincount(row).argmax() for row in votes])
    return winners, (votes == winners[:, None]).mean(1)


def _log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _log_probabilities(o, t, temperature, negatives):
    """Returns `[batch, 1 + num_negatives]`; column 0 is the positive."""
    scores = o @ t.T / temperature
    rows = np.arange(len(o))[:, None]
    return _log_softmax(np.concatenate([scores[rows, rows], scores[rows, negatives]], 1))
