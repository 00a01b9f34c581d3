# SPDX-License-Identifier: Apache-2.0
"""Online views of this replica's images compared with all target views.

The losses of many views take sequences of tensors, one per view: `online` has the nL large views,
then the nS small ones; `target` has the nL large views in the same order. They go over pairs (a, c)
of online view a and target view c, in the order of a, then of c. An anchor of view a has target
view c of its own image as its positive, and target view c of other images as its negatives.
"""

from __future__ import annotations

from collections.abc import Sequence

from etils import epy

from contrastive.objectives import common

with epy.lazy_imports():
    import tensorflow as tf

Pair = tuple[int, int]


class Comparison:
    """Scores of the candidates of each pair of views.

    The M candidates of a row are its own image and its negatives: all B images of the global batch,
    or the own image followed by n sampled ones.

    Attributes:
        pairs: the P pairs (a, c) of views that the loss goes over.
        num_large: nL, the number of large views.
        gather: as in `simclr_loss`.
        anchors: float32 `[b, nL + nS, d]`, normalised online views.
        targets: float32 `[nL, B, d]`, normalised target views.
        scores: float32 `[b, nL + nS, nL, B]`, all anchors with all targets.
        is_own: bool `[b, 1, M]` or `[1, 1, M]`, True at the own image.
        logits: float32 `[b, P, M]`, scores of the candidates of each pair.
        log_p: float32 `[b, P, M]`, their log-softmax.
    """

    def __init__(
        self,
        online: Sequence[tf.Tensor],
        target: Sequence[tf.Tensor],
        *,
        include_same_view: bool,
        temperature: float | tf.Tensor,
        gather: common.Gather | None,
        bias: float | tf.Tensor = 0.0,
        num_negatives: int = 0,
        draws: tf.Tensor | None = None,
        labels: tf.Tensor | None = None,
    ) -> None:
        self.pairs = check_views(online, target, include_same_view)
        common.check_not_negative(num_negatives=num_negatives)
        if isinstance(temperature, (int, float)):
            common.check_positive(temperature=temperature)
        self.num_large = len(target)
        self.gather = gather or common.single_replica
        self._temperature = tf.cast(temperature, tf.float32)
        self._bias = tf.cast(bias, tf.float32)
        self._online, self._target = online, target
        candidates, offsets = zip(*map(self.gather, target), strict=True)
        self._size = candidates[0].shape[0]
        common.check_batch(self._size)
        self.anchors = common.prepare(tf.stack(online, 1), True)
        self.targets = common.prepare(tf.stack(candidates), True)
        self.scores = self.score("bad,cnd->bacn", self.anchors, self.targets)
        own = tf.range(online[0].shape[0])[:, None, None] + offsets[0]
        self.is_own = tf.equal(own, tf.range(self._size))
        self._is_dropped = None  # Images that are no negatives, [b, 1, B].
        if labels is not None:
            rows = labels[:, None, None]
            is_same = tf.equal(rows, self.gather(labels)[0]) & (rows >= 0)
            self._is_dropped = is_same & ~self.is_own
        self._columns = None  # Global indices of candidates, [b, P, M].
        if 0 < num_negatives < self._size - 1:
            others = self._sample(draws, num_negatives, offsets[0])
            own = tf.broadcast_to(own, [*others.shape[:2], 1])
            self._columns = tf.concat([own, others], 2)
            self.is_own = tf.equal(tf.range(1 + num_negatives), 0)[None, None]
        self.logits = self.choose(self.scores, self.pairs)
        self.log_p = tf.nn.log_softmax(self.logits)

    def score(self, equation: str, anchors: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
        """Computes scores by an einsum equation of normalised embeddings."""
        cosine = tf.einsum(equation, anchors, others)
        return cosine / self._temperature + self._bias

    def transposed_scores(self, first: int) -> tf.Tensor:
        """Scores target views of local images with global online views.

        The online views are those from number `first` on. Returns float32 `[b, nL, nL + nS - first,
        B]`.
        """
        views = [self.gather(z)[0] for z in self._online[first:]]
        return self.score(
            "bcd,and->bcan",
            common.prepare(tf.stack(self._target, 1), True),
            common.prepare(tf.stack(views), True),
        )

    def choose(
        self,
        scores: tf.Tensor,
        views: Sequence[Pair],
        numbers: Sequence[int] | None = None,
    ) -> tf.Tensor:
        """Selects the scores of the candidates of n pairs of views.

        Args:
            scores: float32 `[b, V, W, B]`.
            views: n pairs of indices of the two axes of views.
            numbers: n indices of `pairs`, whose candidates are selected; None for all pairs.

        Returns:
            float32 `[b, n, M]`.
        """
        batch, _, width, size = scores.shape
        flat = [v * width + w for v, w in views]
        scores = tf.reshape(scores, [batch, -1, size])
        if self._is_dropped is not None:
            scores = tf.where(self._is_dropped, common.MASKED, scores)
        if self._columns is None:
            return tf.gather(scores, flat, axis=1)
        columns = self._columns
        if numbers is not None:
            columns = tf.gather(columns, numbers, axis=1)
        columns += size * tf.constant(flat)[:, None]
        scores = tf.reshape(scores, [batch, -1])
        return tf.gather(scores, columns, axis=1, batch_dims=1)

    def contrastive(self) -> tf.Tensor:
        """Computes `sum_ac -log p_ac(i | i)`, float32 `[b]`."""
        return -tf.reduce_sum(common.select(self.log_p, self.is_own), axis=1)

    def mean(self, loss: tf.Tensor, average_pairs: bool) -> tf.Tensor:
        """Averages a sum over pairs `[b]` over rows and, if asked, pairs."""
        mean = tf.reduce_mean(loss)
        return mean / len(self.pairs) if average_pairs else mean

    def _sample(self, draws: tf.Tensor | None, count: int, offset: int | tf.Tensor) -> tf.Tensor:
        """Samples global indices of negatives, int32 `[b, P, count]`."""
        expected = [len(self.pairs), self._online[0].shape[0], count]
        if draws is None or draws.shape.as_list() != expected:
            raise ValueError(
                f"`num_negatives={count}` needs `draws` of shape {expected}. "
                f"Received: {getattr(draws, 'shape', None)}."
            )
        others = sample_negatives(draws, self._size, offset)
        # tf.transpose would log complaints of oneDNN about int32.
        return tf.stack(tf.unstack(others), 1)


def num_pairs(num_online: int, num_target: int, include_same_view: bool) -> int:
    """Counts the pairs of views that a loss goes over; see `view_pairs`."""
    return len(view_pairs(num_online, num_target, include_same_view))


def view_pairs(num_online: int, num_target: int, include_same_view: bool) -> list[Pair]:
    """Lists the pairs (a, c) of nL + nS online and nL target views, in order.

    Pairs (a, a) are among them if `include_same_view`.
    """
    return [
        (a, c) for a in range(num_online) for c in range(num_target) if include_same_view or a != c
    ]


def check_views(
    online: Sequence[tf.Tensor],
    target: Sequence[tf.Tensor],
    include_same_view: bool,
) -> list[Pair]:
    """Lists the pairs of views; raises if the views do not fit together."""
    if not 1 <= len(target) <= len(online):
        raise ValueError(
            "Each target view needs its online view, and at least one. "
            f"Received: {len(online)} online, {len(target)} target views."
        )
    shapes = [tuple(z.shape) for z in (*online, *target)]
    if len(set(shapes)) > 1:
        raise ValueError(f"All views must be of the same shape. Received: {shapes}.")
    pairs = view_pairs(len(online), len(target), include_same_view)
    if not pairs:
        raise ValueError(
            "A single view has no other view to be compared with. "
            f"Received: include_same_view={include_same_view}."
        )
    return pairs


def sample_negatives(draws: tf.Tensor, batch_size: int, offset: int | tf.Tensor) -> tf.Tensor:
    """Samples other images for each row, without replacement.

    All subsets of n of the B - 1 other images are equally likely (their order is not random),
    except for rounding: uniform numbers of 23 bits, as made by tf.random, prefer some images by a
    share of at most `B / 2^23`.

    Source: Floyd's algorithm, in Bentley, "Programming pearls: a sample of brilliance",
    Communications of the ACM 30 (9), 1987.

    Args:
        draws: float32 `[..., b, n]` in [0, 1), independent and uniform.
        batch_size: B, the global batch size.
        offset: global index of this replica's first row.

    Returns:
        int32 `[..., b, n]`, global indices, never the row's own.

    Raises:
        ValueError: if n is greater than B - 1.
    """
    count = draws.shape[-1]
    if count > batch_size - 1:
        raise ValueError(
            f"There are {batch_size - 1} other images in the batch. Received: draws of {count}."
        )
    lasts = tf.range(batch_size - 1 - count, batch_size - 1)
    candidates = common.uniform_integer(draws, lasts + 1)
    others = candidates[..., :0]
    for i in range(count):
        candidate = candidates[..., i, None]
        is_taken = tf.reduce_any(tf.equal(candidate, others), -1, keepdims=True)
        chosen = tf.where(is_taken, lasts[i], candidate)
        others = tf.concat([others, chosen], -1)
    own = tf.range(draws.shape[-2])[:, None] + offset
    return others + tf.cast(others >= own, tf.int32)
