# SPDX-License-Identifier: Apache-2.0
"""The loops: pretraining, fine-tuning, evaluation.

One compiled loop runs a step on every replica, several times a call. A step
maps a batch to its metrics and updates the networks; everything that differs
between methods is a row of `methods.METHODS`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import data_util
import lars_optimizer
import model
import objective
import resnet
from contrastive.config import methods
from contrastive.devices import devices
from contrastive.report import reporting
from contrastive.sources import saliency
from contrastive.training import schedules
from contrastive.weights.checkpoint import TrainingCheckpoints

Batch = Mapping[str, tf.Tensor]
Metrics = dict[str, tf.Tensor]
Step = Callable[[Batch], Metrics]
ViewMaker = Callable[[Batch], list[tf.Tensor]]
# What an optimizer trains.
_Group = tuple[Any, list[tf.Variable]]

# A call of the compiled loop should take about this long, so that progress
# shows and a signal is answered, yet the host is rarely in the way.
_SECONDS_A_CALL = 2.0

_CRITIC_RATE = 1e-3

# What draws of an example are for, where views are numbered from 0.
_NEGATIVES, _SEMANTIC_POSITIVES = 1 << 16, (1 << 16) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a training loop needs to know, in steps.

    Attributes:
        train_mode: "pretrain" or "finetune".
        objective: a row of `methods.METHODS`, for pretraining.
        hyperparameters: arguments of the objective's loss.
        gradient_penalty_weight: of the critic's gradient; 0: none.
        views: one augmentation a view; one view for fine-tuning.
        num_large_views: the first views; the others are small.
        target_decay: of the target network's moving average, at the start.
        copy_target_until: up to this step the target is a copy; -1: never.
        target_update_steps: steps from one update of the target to the next.
        num_semantic_positives: draws an image from SemPPL's queue.
        pseudo_label_start: steps before pseudo-labels count.
        num_classes: of the data; 0 without labels.
        labelled: bool `[num_examples]`, whose labels the objective may see;
            None: of all that have one.
        batch_size: images a step on all replicas together.
        accumulate_steps: parts in which each replica's images are embedded
            in pretraining, one after another.
        num_examples: images an epoch.
        train_steps: optimizer steps in all.
        warmup_steps: steps of linear warm-up.
        peak_learning_rate: after warm-up, already scaled by the batch size.
        learning_rate_schedule: "cosine", or "constant" after the warm-up.
        optimizer: "lars", "momentum" or "adam".
        lars_variant: "simclr" or "deepmind".
        momentum: of lars and momentum.
        weight_decay: of lars, and of the L2 loss of the other optimizers.
        fine_tune_after_block: -1 trains all, 0 freezes the stem, 4 all but
            the classifier.
        checkpoint_steps: steps between checkpoints.
        checkpoint_minutes: minutes between them; if not 0, instead of steps.
        keep_checkpoint_max: older checkpoints are deleted.
        summary_steps: steps between TensorBoard points; 0: none.
        steps_per_loop: steps a call of the compiled loop; 0: as many as take
            about two seconds.
        jit_compile: whether the step is compiled by XLA.
        jit_augmentation: whether, where the step is not, the augmentation is.
        seed: of data order and augmentation.
    """

    train_mode: str
    objective: str
    hyperparameters: Mapping[str, Any]
    gradient_penalty_weight: float
    views: tuple[data_util.Augmentation, ...]
    num_large_views: int = 2
    target_decay: float = 1.0
    copy_target_until: int = -1
    target_update_steps: int = 1
    num_semantic_positives: int = 0
    pseudo_label_start: int = 0
    num_classes: int = 0
    labelled: np.ndarray | None = None
    batch_size: int
    accumulate_steps: int = 1
    num_examples: int
    train_steps: int
    warmup_steps: int
    peak_learning_rate: float
    learning_rate_schedule: str = "cosine"
    optimizer: str
    lars_variant: str
    momentum: float
    weight_decay: float
    fine_tune_after_block: int
    checkpoint_steps: int
    checkpoint_minutes: float = 0.0
    keep_checkpoint_max: int
    summary_steps: int
    steps_per_loop: int
    jit_compile: bool
    jit_augmentation: bool
    seed: int

    def __post_init__(self) -> None:
        if self.train_mode == "pretrain":
            # The loss checks its arguments; better now than when compiled.
            views = [tf.eye(2)] * len(self.views)
            _loss(self, views, views[: self.num_large_views])


class TrainingDiverged(ArithmeticError):
    """The loss or a weight is no longer a finite number."""


class Interrupted(Exception):
    """A signal has ended the run; the state has been saved.

    Attributes:
        signal_number: the signal, which another machine may have received.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class HostsDisagree(ValueError):
    """The machines that train together are not in the same state."""


class NoLabelledImage(ValueError):
    """None of the images of an evaluation has a label."""


class Optimizers(NamedTuple):
    """One each for the networks, the linear classifier and the critic.

    The classifier has its own so that LARS's rules (decay and trust ratio by
    rank) need no exception by name: SimCLR trains its head without either. A
    trained temperature and bias have Adam: they are scalars, for which a
    learning rate that grows with the batch would be too high.
    """

    networks: keras.optimizers.Optimizer
    classifier: keras.optimizers.Optimizer
    critic: keras.optimizers.Optimizer | None


def learning_rate_schedule(config: TrainConfig) -> schedules.WarmupCosine:
    """Returns the learning rate as a function of the step, from 0."""
    return schedules.WarmupCosine(
        config.peak_learning_rate,
        config.warmup_steps,
        # Training may end within the warm-up, as in a trial of a few steps.
        max(config.train_steps, config.warmup_steps),
        decay=config.learning_rate_schedule == "cosine",
    )


def build_optimizers(
    config: TrainConfig, networks: model.Networks
) -> Optimizers:
    """Returns the optimizers with all their variables, to be made in scope."""
    schedule = learning_rate_schedule(config)

    def sgd(nesterov: bool) -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(
            schedule, momentum=config.momentum, nesterov=nesterov
        )

    optimizers = {
        "lars": lambda: (
            lars_optimizer.LARS(
                schedule,
                momentum=config.momentum,
                l2=config.weight_decay,
                variant=config.lars_variant,
            ),
            sgd(nesterov=False),
        ),
        "momentum": lambda: (sgd(nesterov=True), sgd(nesterov=True)),
        "adam": lambda: (
            keras.optimizers.Adam(schedule),
            keras.optimizers.Adam(schedule),
        ),
    }
    if config.optimizer not in optimizers:
        raise ValueError(
            f"`optimizer` must be one of {', '.join(optimizers)}. "
            f"Received: {config.optimizer!r}."
        )
    critic = None
    if networks.critic:
        critic = keras.optimizers.Adam(_CRITIC_RATE)
        critic.build(_critic_variables(networks))
    made = Optimizers(*optimizers[config.optimizer](), critic)
    made.networks.build(_network_variables(config, networks))
    made.classifier.build(_classifier_variables(networks))
    return made


def trained_variables(
    config: TrainConfig, networks: model.Networks
) -> tuple[list[tf.Variable], list[tf.Variable], list[tf.Variable]]:
    """Returns the variables of each of `Optimizers`."""
    return (
        _network_variables(config, networks),
        _classifier_variables(networks),
        _critic_variables(networks),
    )


def build_step(
    config: TrainConfig,
    networks: model.Networks,
    optimizers: Optimizers,
    make_views: ViewMaker | None = None,
) -> Step:
    """Returns the step of `config.train_mode`, to be run on every replica.

    Args:
        config: the run.
        networks: made in the strategy's scope.
        optimizers: of `build_optimizers`.
        make_views: from a batch to its views; None: by augmentation.
    """
    make_views = make_views or _view_maker(config)
    if config.train_mode == "finetune":
        return _finetune_step(config, networks, optimizers, make_views)
    return _pretrain_step(config, networks, optimizers, make_views)


def _pretrain_step(
    config: TrainConfig,
    networks: model.Networks,
    optimizers: Optimizers,
    make_views: ViewMaker,
) -> Step:
    critic = _critic_arguments(config)
    variables = _network_variables(config, networks)
    classifier_variables = _classifier_variables(networks)

    def embed(batch: Batch, with_target: bool) -> _Embedded:
        return _embed(config, networks, make_views(batch), with_target)

    def losses(
        batch: Batch, embedded: _Embedded, gather: objective.Gather
    ) -> tuple[tf.Tensor, Metrics]:
        """Returns what is minimised, and the metrics."""
        online, target, features, penalty = embedded
        metrics: Metrics = {}
        if config.gradient_penalty_weight:
            unweighted = penalty / config.gradient_penalty_weight
            metrics["gradient_penalty"] = unweighted
        more: dict[str, Any] = {}
        if networks.critic:
            more["bias"] = tf.identity(networks.critic.bias)
            more["temperature"] = objective.critic_temperature(
                networks.critic.log_scale, networks.critic.max_scale
            )
            metrics |= more
        if networks.queue:
            semantic, measured = _semantic_positives(
                config,
                networks.queue,
                batch,
                online,
                target,
                gather,
                tf.cast(optimizers.networks.iterations, tf.int64),
            )
            more |= semantic
            metrics |= measured
        metrics["contrastive_loss"] = _loss(
            config, online, target, batch=batch, gather=gather, **more
        )
        loss = penalty + metrics["contrastive_loss"]
        if config.optimizer != "lars":
            loss += _decay_loss(config, variables)
        metrics |= {"loss": loss} | objective.contrastive_metrics(
            # The second view where there is one; the first is the anchor.
            online[0],
            target[:2][-1],
            gather=gather,
            **critic | {k: v for k, v in more.items() if k in critic},
        )
        if networks.classifier:
            labels = tf.tile(batch["label"], [config.num_large_views])
            probe = _classification(
                networks.classifier(tf.stop_gradient(features)), labels, gather
            )
            metrics |= {f"probe_{k}": v for k, v in probe.items()}
            loss += probe["loss"] + _decay_loss(config, classifier_variables)
        return loss, metrics

    groups = _groups(
        (optimizers.networks, variables),
        (optimizers.classifier, classifier_variables),
        (optimizers.critic, _critic_variables(networks)),
    )

    def step(batch: Batch) -> Metrics:
        gradients, metrics = _gradients(
            config,
            networks.has_target,
            batch,
            embed,
            losses,
            [group for _, group in groups],
        )
        done = tf.identity(optimizers.networks.iterations)
        _apply_gradients(gradients, groups)
        if networks.has_target:
            metrics["target_decay"] = schedules.ema_decay(
                done,
                config.train_steps,
                config.target_decay,
                copy_until=config.copy_target_until,
                every=config.target_update_steps,
            )
            networks.update_target(metrics["target_decay"])
        return metrics

    return step


def _gradients(
    config: TrainConfig,
    has_target: bool,
    batch: Batch,
    embed: Callable[[Batch, bool], "_Embedded"],
    losses: Callable[..., tuple[tf.Tensor, Metrics]],
    groups: list[list[tf.Variable]],
) -> tuple[list[list[tf.Tensor]], Metrics]:
    """Returns gradients of the loss by group, and the metrics.

    With `accumulate_steps`, K, the rows are embedded in K parts, each of whose
    activations are forgotten. The loss of all embeddings gives gradients with
    respect to these; a second pass over the parts takes them on to the
    weights. This is the gradient of the loss of the whole batch, but that
    BatchNorm's statistics are those of each part.

    Source: Gao et al., arXiv:2101.06983 (GradCache).
    """
    count = config.accumulate_steps
    if count == 1:
        with tf.GradientTape() as tape:
            embedded = embed(batch, has_target)
            loss, metrics = losses(batch, embedded, _Gather())
            share = _replica_share(loss)
        return tape.gradient(share, groups), metrics
    parts: list[_Embedded] = []
    for index in range(count):
        rows = _rows(batch, index, count, after=parts)
        parts.append(embed(rows, has_target))
    whole = _joined(parts)
    with tf.GradientTape() as tape:
        tape.watch(whole.online)
        if not has_target:
            whole = whole._replace(target=whole.online[: len(whole.target)])
        loss, metrics = losses(batch, whole, _Gather())
        share = _replica_share(loss)
    gradients, of_online = tape.gradient(share, (groups, whole.online))
    for index in range(count):
        rows = _rows(batch, index, count, after=gradients)
        with resnet.hold_statistics(), tf.GradientTape() as tape:
            online, _, _, penalty = embed(rows, False)
            share = _replica_share(penalty / count) + tf.add_n(
                [
                    tf.reduce_sum(z * gradient)
                    for z, gradient in zip(
                        online, _rows(of_online, index, count), strict=True
                    )
                ]
            )
        more = tape.gradient(share, groups)
        gradients = tf.nest.map_structure(_sum, gradients, more)
    return gradients, metrics


def _rows(batch: Any, index: int, count: int, after: Any = ()) -> Any:
    """Returns every `count`-th row of all tensors, from `index` on.

    These are the same images however many replicas there are. Not before
    `after` has been computed: parts in parallel would all be in memory.
    """
    done = [x for x in tf.nest.flatten(after) if x is not None]
    with tf.control_dependencies(done):
        return tf.nest.map_structure(
            lambda x: tf.identity(x[index::count]), batch
        )


def _sum(x: tf.Tensor | None, y: tf.Tensor | None) -> tf.Tensor | None:
    """Returns the sum of gradients; None is that of what has no influence."""
    if x is None or y is None:
        return y if x is None else x
    return x + y


class _Embedded(NamedTuple):
    """What the networks make of a batch.

    Attributes:
        online: embeddings, `[b, d]` a view.
        target: embeddings, `[b, d]` a large view.
        features: the classifier's input, of all large views.
        penalty: weighted, of the critic's gradient; a scalar.
    """

    online: list[tf.Tensor]
    target: list[tf.Tensor]
    features: tf.Tensor
    penalty: tf.Tensor


def _joined(parts: list[_Embedded]) -> _Embedded:
    """Returns what the networks make of all rows; see `_rows`."""

    def joined(views: Iterable[list[tf.Tensor]]) -> list[tf.Tensor]:
        return [
            tf.reshape(tf.stack(view, 1), [-1, view[0].shape[-1]])
            for view in zip(*views, strict=True)
        ]

    num_large = len(parts[0].target)
    return _Embedded(
        joined(part.online for part in parts),
        joined(part.target for part in parts),
        tf.concat(
            joined(tf.split(part.features, num_large) for part in parts), 0
        ),
        tf.add_n([part.penalty for part in parts]) / len(parts),
    )


def _critic_arguments(config: TrainConfig) -> dict[str, Any]:
    """Returns how embeddings are scored, by default by their cosine."""
    return {
        "temperature": config.hyperparameters.get("temperature", 1.0),
        "hidden_norm": config.hyperparameters.get("hidden_norm", True),
    }


def _embed(
    config: TrainConfig,
    networks: model.Networks,
    views: list[tf.Tensor],
    with_target: bool,
) -> _Embedded:
    """Returns embeddings of views, and the penalty where there is one."""
    if not config.gradient_penalty_weight:
        return _forward(networks, config.num_large_views, views, with_target)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(views)
        embedded = _forward(
            networks, config.num_large_views, views, with_target
        )
        scores = objective.positive_scores(
            *embedded.online, **_critic_arguments(config)
        )
    penalty = objective.gradient_penalty(*tape.gradient(scores, views))
    return embedded._replace(penalty=config.gradient_penalty_weight * penalty)


def _forward(
    networks: model.Networks,
    num_large: int,
    views: list[tf.Tensor],
    with_target: bool,
) -> _Embedded:
    """Returns embeddings of views; without the target's, online ones instead.

    One forward pass a size, so that BatchNorm sees those views together.
    """
    large, small = tf.concat(views[:num_large], 0), views[num_large:]
    embedding, layers = networks.embeddings(large)
    online = target = tf.split(embedding, num_large)
    if with_target:
        target = tf.split(networks.target_embeddings(large), num_large)
    if small:
        embedding, _ = networks.embeddings(tf.concat(small, 0))
        online = online + tf.split(embedding, len(small))
    features = layers[networks.architecture.ft_proj_selector]
    return _Embedded(online, target, features, tf.zeros([]))


def _loss(
    config: TrainConfig,
    online: list[tf.Tensor],
    target: list[tf.Tensor],
    *,
    batch: Batch | None = None,
    gather: objective.Gather | None = None,
    **more: Any,
) -> tf.Tensor:
    """Returns the method's loss, with what it needs beyond embeddings.

    Without a batch, of no consequence: so that the loss checks its arguments.
    """
    method = methods.METHODS[config.objective]
    arguments = {**config.hyperparameters, **more}
    if not method.multi_view:
        return method.loss(*online, gather=gather, **arguments)
    count = arguments.get("num_negatives", 0)
    if batch and 0 < count < config.batch_size - 1:
        pairs = objective.num_pairs(
            len(online), len(target), arguments["include_same_view"]
        )
        arguments["draws"] = _draws(config, batch, _NEGATIVES, pairs, count)
    if method.loss is objective.semppl_loss and not batch:
        rows, dim = online[0].shape
        arguments["semantic_positives"] = tf.zeros([len(target), rows, 1, dim])
        arguments["has_positive"] = tf.zeros([rows], tf.bool)
        arguments["labels"] = tf.zeros([rows], tf.int32)
    return method.loss(online, target, gather=gather, **arguments)


def _draws(
    config: TrainConfig, batch: Batch, use: int, groups: int, count: int
) -> tf.Tensor:
    """Returns float32 `[groups, b, count]` in [0, 1), keyed by the example."""
    keys = data_util.example_keys(config.seed, batch["epoch"], batch["id"], use)
    numbers = tf.reshape(tf.range(groups * count), [groups, 1, count])
    return data_util.uniform(keys[:, tf.newaxis], numbers)


def _semantic_positives(
    config: TrainConfig,
    queue: model.LabelledQueue,
    batch: Batch,
    online: list[tf.Tensor],
    target: list[tf.Tensor],
    gather: objective.Gather,
    step: tf.Tensor,
) -> tuple[dict[str, tf.Tensor], Metrics]:
    """Enters the labelled rows in the queue, then lets it vote on the others.

    `step` is the number of steps done.

    Returns:
        `semppl_loss`'s arguments, and metrics of the global batch.
    """
    labels, ids = batch["label"], batch["id"]
    labelled = labels >= 0
    if config.labelled is not None:
        labelled &= tf.gather(tf.constant(config.labelled), ids)
    entries = queue.push(
        tf.stack([tf.math.l2_normalize(gather(t)[0], -1) for t in target]),
        gather(tf.where(labelled, labels, -1))[0],
        gather(ids)[0],
    )
    votes, agreement = objective.pseudo_labels(
        online[: len(target)], *entries, ids, num_classes=config.num_classes
    )
    heeds_votes = step >= config.pseudo_label_start
    known = tf.where(labelled, labels, tf.where(heeds_votes, votes, -1))
    positives, has_positive = objective.draw_semantic_positives(
        known,
        *entries,
        ids,
        _draws(
            config,
            batch,
            _SEMANTIC_POSITIVES,
            len(target),
            config.num_semantic_positives,
        ),
    )
    voted = ~labelled & (votes >= 0)
    judged = voted & (labels >= 0)
    # Counts of the global batch: means of replicas' shares would be others.
    counts = gather(
        tf.stack(
            [
                tf.cast(column, tf.float32)
                for column in (
                    ~labelled,
                    voted,
                    tf.where(voted, agreement, 0.0),
                    judged,
                    judged & (votes == labels),
                )
            ],
            axis=1,
        )
    )[0]
    unlabelled, votes_cast, agreed, votes_judged, right = tf.unstack(
        tf.reduce_sum(counts, axis=0)
    )
    return (
        {
            "semantic_positives": positives,
            "has_positive": has_positive,
            "labels": known,
        },
        {
            "pseudo_label_accuracy": tf.math.divide_no_nan(right, votes_judged),
            "vote_share": tf.math.divide_no_nan(votes_cast, unlabelled),
            "vote_agreement": tf.math.divide_no_nan(agreed, votes_cast),
            "queue_fill": tf.reduce_mean(tf.cast(entries[-1] >= 0, tf.float32)),
            "semantic_positive_share": tf.reduce_mean(
                tf.cast(has_positive, tf.float32)
            ),
        },
    )


def _finetune_step(
    config: TrainConfig,
    networks: model.Networks,
    optimizers: Optimizers,
    make_views: ViewMaker,
) -> Step:
    variables = _network_variables(config, networks)
    classifier_variables = _classifier_variables(networks)
    groups = _groups(
        (optimizers.networks, variables),
        (optimizers.classifier, classifier_variables),
    )
    decayed = classifier_variables
    if config.optimizer != "lars":  # which decays what it trains by itself
        decayed = variables + classifier_variables

    def step(batch: Batch) -> Metrics:
        (images,) = make_views(batch)
        with tf.GradientTape() as tape:
            metrics = _classification(
                networks.logits(images, training=True),
                batch["label"],
                _Gather(),
            )
            loss = metrics["loss"] + _decay_loss(config, decayed)
            share = _replica_share(loss)
        gradients = tape.gradient(share, [group for _, group in groups])
        _apply_gradients(gradients, groups)
        return metrics | {"loss": loss}

    return step


def make_views(
    batch: Batch,
    augmentations: tuple[data_util.Augmentation, ...],
    seed: int,
    augment: Callable[..., tf.Tensor] = data_util.augment,
) -> list[tf.Tensor]:
    """Returns one augmented view of every image an augmentation.

    Args:
        batch: of `data.train_stream`: `id` int64 `[b]`, `epoch` int32 `[b]`,
            and `image` uint8 `[b, h, w, c]`, or, where the host has cropped
            already, `crops`, uint8 `[b, views, s, s, c]` or one `[b, s, s, c]`
            a view; with images, `mask`, uint8 `[b, h, w]`, if an augmentation
            has a `mask_probability`.
        augmentations: one a view.
        seed: of all draws.
        augment: `data_util.augment`, possibly compiled.

    Returns:
        List of float32 `[b, size, size, c]` in [0, 1].
    """
    views = []
    for index, augmentation in enumerate(augmentations):
        keys = data_util.example_keys(seed, batch["epoch"], batch["id"], index)
        if "image" in batch:
            images = batch["image"]
            if augmentation.mask_probability:
                images = saliency.remove_background(
                    images, batch["mask"], keys, augmentation
                )
        else:
            crops = batch["crops"]
            same_size = not isinstance(crops, tuple)
            images = crops[:, index] if same_size else crops[index]
            augmentation = dataclasses.replace(augmentation, crop=False)
        views.append(augment(images, keys, augmentation))
    return views


def _view_maker(config: TrainConfig) -> ViewMaker:
    """Returns `make_views` of this run, compiled if that is asked for."""
    augment = data_util.augment
    if config.jit_augmentation and not config.jit_compile:
        augment = tf.function(augment, jit_compile=True)
    return lambda batch: make_views(batch, config.views, config.seed, augment)


class _Gather:
    """The `gather` of the objectives, by the replica context.

    A tensor is gathered once however many objectives and metrics ask for it.
    The gradient of a gathered row flows back to the replica that owns it.
    """

    def __init__(self) -> None:
        self._context = tf.distribute.get_replica_context()
        self._gathered: dict[Any, tf.Tensor] = {}

    def __call__(self, z: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        num_replicas = self._context.num_replicas_in_sync
        if num_replicas == 1:
            return z, 0
        if z.ref() not in self._gathered:
            rows = self._context.all_gather(z, axis=0)
            rows.set_shape([num_replicas * z.shape[0], *z.shape[1:]])
            self._gathered[z.ref()] = rows
        replica = tf.cast(self._context.replica_id_in_sync_group, tf.int32)
        return self._gathered[z.ref()], replica * z.shape[0]


def _replica_share(*losses: tf.Tensor) -> tf.Tensor:
    """Returns this replica's part of the global mean loss.

    Keras sums gradients over replicas: this is the one place that divides.
    """
    context = tf.distribute.get_replica_context()
    return tf.add_n(losses) / context.num_replicas_in_sync


def _groups(*groups: _Group) -> list[_Group]:
    """Returns the groups that are not empty."""
    return [(optimizer, group) for optimizer, group in groups if group]


def _apply_gradients(
    gradients: list[list[tf.Tensor]], groups: list[_Group]
) -> None:
    """Lets every optimizer update its variables."""
    for (optimizer, group), gradient in zip(groups, gradients, strict=True):
        optimizer.apply_gradients(zip(gradient, group, strict=True))


def _network_variables(
    config: TrainConfig, networks: model.Networks
) -> list[tf.Variable]:
    models: list[keras.layers.Layer | None]
    if config.train_mode == "pretrain":
        models = [
            networks.encoder,
            networks.projection,
            networks.prediction,
        ]
    else:
        models = [networks.encoder, networks.projection_to_classifier]
    return [v for m in models if m for v in m.trainable_variables]


def _classifier_variables(networks: model.Networks) -> list[tf.Variable]:
    classifier = networks.classifier
    return classifier.trainable_variables if classifier else []


def _critic_variables(networks: model.Networks) -> list[tf.Variable]:
    return networks.critic.trainable_variables if networks.critic else []


def _decay_loss(config: TrainConfig, variables: list[tf.Variable]) -> tf.Tensor:
    """Returns the L2 loss of kernels; BatchNorm and biases are spared."""
    kernels = [v for v in variables if len(v.shape) > 1]
    if not config.weight_decay or not kernels:
        return tf.zeros([])
    return config.weight_decay * tf.add_n([tf.nn.l2_loss(v) for v in kernels])


def _classification(
    logits: tf.Tensor, labels: tf.Tensor, gather: objective.Gather
) -> Metrics:
    """Returns the mean cross-entropy and top-1/top-5 accuracy.

    Rows without a label (-1) take no part.
    """
    weight = tf.cast(labels >= 0, tf.float32)
    loss = weight * tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.maximum(labels, 0), logits
    )
    # A mean over replicas of each one's own share would depend on how labelled
    # rows are spread over them; of the loss, it is the mean over all rows.
    labelled = tf.reduce_mean(gather(tf.reduce_sum(weight)[tf.newaxis])[0])
    labelled = tf.maximum(labelled, 1e-6)
    return {"loss": tf.reduce_mean(loss)} | {
        f"top_{k}_accuracy": tf.reduce_sum(weight * _in_top(k, logits, labels))
        / labelled
        for k in (1, 5)
    }


def _in_top(k: int, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Returns float32 `[b]`, 1 where the label is among the k best."""
    k = min(k, logits.shape[-1])
    return tf.cast(
        tf.math.in_top_k(tf.maximum(labels, 0), logits, k), tf.float32
    )


class CompiledLoop:
    """Runs a step on every replica, several times a call.

    Attributes:
        names: names of the metrics, after the first call.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, step: Step, jit_compile: bool
    ) -> None:
        self.names: list[str] = []

        @tf.autograph.experimental.do_not_convert
        def replica_step(batch: Batch) -> tf.Tensor:
            metrics = step(batch)
            self.names[:] = metrics
            return tf.stack([tf.cast(v, tf.float32) for v in metrics.values()])

        if jit_compile:
            replica_step = tf.function(
                replica_step, jit_compile=True, reduce_retracing=True
            )

        @tf.function
        def loop(iterator: Iterator[Batch], num_steps: tf.Tensor) -> tf.Tensor:
            history = tf.TensorArray(tf.float32, size=num_steps)
            for i in tf.range(num_steps):
                metrics = strategy.run(replica_step, (next(iterator),))
                history = history.write(
                    i, strategy.reduce("MEAN", metrics, axis=None)
                )
            return history.stack()

        self._loop = loop

    def __call__(self, iterator: Iterator[Batch], num_steps: int) -> np.ndarray:
        """Runs `num_steps` steps.

        Returns:
            float32 `[num_steps, metrics]`, means over replicas.
        """
        return self._loop(iterator, tf.constant(num_steps)).numpy()


def train(
    config: TrainConfig,
    networks: model.Networks,
    optimizers: Optimizers,
    make_stream: Callable[[int], tf.data.Dataset],
    strategy: tf.distribute.Strategy,
    checkpoints: TrainingCheckpoints,
    reporter: "reporting.Reporter",
    received_signal: Callable[[], int] = lambda: 0,
) -> None:
    """Trains from the newest checkpoint to `config.train_steps`.

    Args:
        config: the run.
        networks: made in the strategy's scope.
        optimizers: of `build_optimizers`, made in the strategy's scope.
        make_stream: from the first step to a (distributed) dataset of batches.
        strategy: where the step runs.
        checkpoints: of `networks` and `optimizers`; restored, and so is the
            step to go on from.
        reporter: shows and records what happens.
        received_signal: returns the number of the signal that asks this
            machine to save and stop; 0 if there was none.

    Raises:
        TrainingDiverged: at the first loss or weight that is not finite; the
            newest checkpoint is from before.
        Interrupted: after saving, if any of the machines received a signal.
        HostsDisagree: if they do not find the same checkpoint.
    """
    step = int(checkpoints.step.numpy())
    hosts = _Hosts(strategy)
    steps = hosts.numbers(step)
    if len(set(steps)) > 1:
        raise HostsDisagree(
            f"The machines go on from different steps, {sorted(set(steps))}: "
            "--model_dir must be one directory that all of them see."
        )
    with contextlib.closing(reporter):
        reporter.start(step)
        if step >= config.train_steps:
            logging.info(
                "Already trained: step %d of %d.", step, config.train_steps
            )
            return
        iterator = iter(make_stream(step))
        loop = CompiledLoop(
            strategy,
            build_step(config, networks, optimizers),
            config.jit_compile,
        )
        logging.info("Compiling the step (up to some minutes on a TPU) ...")
        pace = _Pace(config.steps_per_loop)
        saved = time.monotonic()
        while step < config.train_steps:
            # Machines differ in speed and clocks; one alone may be told to
            # stop.
            num_steps = min(hosts.numbers(pace.num_steps))
            num_steps = min(num_steps, _steps_to_save(config, step))
            started = time.monotonic()
            history = loop(iterator, num_steps)
            pace.update(num_steps, time.monotonic() - started)
            step += num_steps
            # Before the check: what led to a divergence is recorded, too.
            reporter.progress(step, loop.names, history, pace.seconds_a_step)
            _check_finite(loop.names, history, step - num_steps)
            is_due = _is_due(config, step, time.monotonic() - saved)
            signal_number = max(hosts.numbers(received_signal()))
            if signal_number or any(hosts.numbers(is_due)):
                try:
                    _check_finite_weights(networks, step)
                except TrainingDiverged:
                    reporter.show_last(step, loop.names, history[-1])
                    raise
                checkpoints.save(step)
                reporter.flush()
                saved = time.monotonic()
            if signal_number and step < config.train_steps:
                raise Interrupted(
                    f"Saved at step {step} of {config.train_steps}.",
                    signal_number,
                )


class _Hosts:
    """The machines that run this program together; mostly this one alone."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        @tf.function
        def gathered(number: tf.Tensor) -> tf.Tensor:
            values = strategy.run(lambda: number[tf.newaxis])
            return strategy.gather(values, axis=0)

        self._gathered = gathered
        self._are_several = devices.runs_on_several_hosts(strategy)

    def numbers(self, own: int) -> list[int]:
        """Returns a number as each machine has it; they wait for each other.

        To be called at the same points of the program on all of them.
        """
        if not self._are_several:
            return [own]
        return self._gathered(tf.constant(own, tf.int64)).numpy().tolist()


def _steps_to_save(config: TrainConfig, step: int) -> int:
    """Returns the number of steps from `step` to the next checkpoint."""
    to_end = config.train_steps - step
    if config.checkpoint_minutes:  # it is due when it is due
        return to_end
    to_checkpoint = config.checkpoint_steps - step % config.checkpoint_steps
    return min(to_checkpoint, to_end)


def _is_due(config: TrainConfig, step: int, seconds: float) -> bool:
    """Whether to save after `step`, so many seconds after the last time."""
    if config.checkpoint_minutes and seconds >= 60 * config.checkpoint_minutes:
        return True
    return _steps_to_save(config, step - 1) == 1


class _Pace:
    """How many steps a call should run, from how long they took.

    The first call, which compiles, and the second, which warms up, do not
    count.
    """

    def __init__(self, fixed: int) -> None:
        self._fixed = fixed
        self._calls = 0
        self.num_steps = fixed or 1
        self.seconds_a_step: float | None = None

    def update(self, num_steps: int, seconds: float) -> None:
        self._calls += 1
        if self._calls <= 2:
            return
        self.seconds_a_step = seconds / num_steps
        if not self._fixed:
            self.num_steps = max(1, int(_SECONDS_A_CALL / self.seconds_a_step))


def _check_finite(names: list[str], history: np.ndarray, step: int) -> None:
    """Raises TrainingDiverged for the first metric that is not finite."""
    bad = np.argwhere(~np.isfinite(history))
    if not len(bad):
        return
    row, column = bad[0]
    loss = names.index("loss")
    before = ", ".join(f"{value:.4g}" for value in history[:row, loss][-5:])
    raise TrainingDiverged(
        f"{names[column]} is {history[row, column]} at step {step + row + 1}. "
        f"Losses before: {before or 'none in this call'}. Likely causes: a "
        "learning rate too high or a warm-up too short for this batch size; "
        "a temperature too low; for rpc and nwj, which are unbounded in the "
        "scores, too small a gamma. The newest checkpoint is from before."
    )


def _check_finite_weights(networks: model.Networks, step: int) -> None:
    """Raises TrainingDiverged rather than let a ruined state be saved."""
    variables = [v for m in networks.models().values() for v in m.variables]
    for variable in variables:
        if not np.isfinite(variable.numpy()).all():
            raise TrainingDiverged(
                f"{variable.path} is not finite after step {step}. The newest "
                "checkpoint is from before. Lower the learning rate or "
                "lengthen the warm-up."
            )


def evaluate(
    networks: model.Networks,
    stream: tf.data.Dataset,
    image_size: int,
    strategy: tf.distribute.Strategy,
    crop_proportion: float | None,
) -> tuple[dict[str, float], np.ndarray]:
    """Measures top-1/top-5 accuracy and cross-entropy of the classifier.

    Args:
        networks: with a classifier.
        stream: of `data.eval_stream`, possibly distributed.
        image_size: side of the images the encoder sees, pixels.
        strategy: where the step runs.
        crop_proportion: central share kept of in-memory images; None: all.

    Returns:
        `top_1_accuracy`, `top_5_accuracy` in [0, 1], `loss` in nats and
        `num_examples`, those with a label; and, int64 `[num_examples, 3]`,
        each one's id, its label and the class that was predicted.

    Raises:
        NoLabelledImage: if no image has a label.
    """

    def replica_step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        images = data_util.eval_images(
            batch["image"], image_size, crop_proportion=crop_proportion
        )
        logits = networks.logits(images, training=False)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.maximum(batch["label"], 0), logits
        )
        # Padding, and what cannot be decoded, has weight 0.
        is_labelled = tf.cast(batch["label"] >= 0, tf.float32)
        weight = batch["weight"] * is_labelled
        columns = [
            _in_top(1, logits, batch["label"]),
            _in_top(5, logits, batch["label"]),
            loss,
            tf.ones_like(loss),
        ]
        totals = tf.linalg.matvec(tf.stack(columns), weight)
        known_id = tf.where(weight > 0, batch["id"], -1)
        rows = [known_id, batch["label"], tf.argmax(logits, -1)]
        return totals, tf.stack([tf.cast(x, tf.int64) for x in rows], 1)

    @tf.function
    def run(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        totals, rows = strategy.run(replica_step, (batch,))
        return (
            strategy.reduce("SUM", totals, axis=None),
            strategy.gather(rows, axis=0),
        )

    totals, rows = np.zeros(4), []
    for batch in stream:
        batch_totals, batch_rows = run(batch)
        totals += batch_totals.numpy()
        rows.append(batch_rows.numpy())
    top_1, top_5, loss, count = totals
    if not count:
        raise NoLabelledImage("There is no labelled image to evaluate on.")
    measured = {
        "top_1_accuracy": top_1 / count,
        "top_5_accuracy": top_5 / count,
        "loss": loss / count,
        "num_examples": int(count),
    }
    predictions = np.concatenate(rows)
    return measured, predictions[predictions[:, 0] >= 0]


def freeze(config: TrainConfig, networks: model.Networks) -> None:
    """Freezes what `fine_tune_after_block` says, statistics included.

    To be called before the optimizers are built.
    """
    resnet.freeze(networks.encoder, config.fine_tune_after_block)
    if config.fine_tune_after_block == 4:
        networks.projection_to_classifier.trainable = False
