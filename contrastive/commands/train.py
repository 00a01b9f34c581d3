# SPDX-License-Identifier: Apache-2.0
"""--mode=train and train_then_eval: pretraining and fine-tuning."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epy

from contrastive.commands import inherit, plan
from contrastive.commands.base import Command
from contrastive.config import conditions, schema
from contrastive.config.completion import complete
from contrastive.config.resolve import Resolved
from contrastive.training.config import TrainConfig, make_config

with epy.lazy_imports():
    import numpy as np
    import tensorflow as tf

    import data
    import model
    from contrastive.commands import (
        datasets,
        networks,
        record,
        session as session_lib,
        sweep,
    )
    from contrastive.devices import strategies
    from contrastive.evaluation import features
    from contrastive.report import content, events
    from contrastive.training import loop, optimizers, state as state_lib, views
    from contrastive.weights import loading

_IMAGES_IN_GRID = 16

_GROUPS = (
    *schema.STEP_GROUPS,
    schema.DryRun,
    schema.RunDirectory,
    schema.Length,
    schema.Checkpointing,
    schema.EvaluationData,
    schema.EvaluationSteps,
    schema.Sweep,
    schema.Devices,
    schema.Topology,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A training run whose data are open.

    Attributes:
        session: its devices and the completed values of the flags.
        train_data: the training split.
        eval_data: the split to evaluate on; None: it is opened if needed.
        labelled_ids: ids of the images whose labels may be used; None: all.
    """

    session: session_lib.Session
    train_data: data.Dataset
    eval_data: data.Dataset | None = None
    labelled_ids: np.ndarray | None = None

    @property
    def resolved(self) -> Resolved:
        """The values of the flags."""
        return self.session.resolved

    @functools.cached_property
    def architecture(self) -> model.Architecture:
        """The architecture of the networks."""
        return networks.make_architecture(self.resolved, self.train_data.num_classes)

    def config(self, **values: Any) -> TrainConfig:
        """Returns the configuration of the loop, with other values of flags."""
        resolved = self.resolved.replace("sweep", **values)
        uses_accelerator = strategies.has_gpu() or resolved["use_tpu"]
        return make_config(
            resolved,
            self.train_data,
            self.session.num_replicas,
            jit_compile=resolved["jit_compile"],
            # Compiled by XLA, convolutions are slower on a CPU, chains of pointwise operations
            # several times faster.
            jit_augmentation=not uses_accelerator,
        )

    def opened_eval_data(self) -> data.Dataset:
        """Returns the split to evaluate on."""
        return self.eval_data or datasets.open_eval_data(self.resolved)


def prepare(resolved: Resolved) -> Callable[[], None]:
    """Prepares a training; returns the work."""
    if resolved["dry_run"]:
        return plan.prepare(resolved)
    if resolved["checkpoint"]:
        inherit.check_checkpoint(resolved["checkpoint"])
    run = open_run(session_lib.open_session(resolved))
    session_lib.log_flags(run.resolved)
    if conditions.sweeps(run.resolved.values):
        return sweep.prepare(run)
    work, _ = prepare_training(run)
    return work


def open_run(session: session_lib.Session) -> TrainingRun:
    """Opens the training data of a session and completes its values."""
    resolved = session.resolved
    train_data = datasets.open_training_data(resolved)
    resolved = complete(resolved, train_data)
    return TrainingRun(
        session=session.with_resolved(resolved),
        train_data=train_data,
        labelled_ids=datasets.choose_labelled_ids(resolved, train_data),
    )


def prepare_training(
    run: TrainingRun, *, is_trial: bool = False
) -> tuple[Callable[[], None], state_lib.TrainState]:
    """Prepares one training; returns the work and the state that it trains.

    Args:
        run: the run.
        is_trial: whether it is a trial of a sweep, which is followed by others; a signal stops them
            as well.
    """
    resolved, session = run.resolved, run.session
    config, architecture = run.config(), run.architecture
    evaluates = resolved["mode"] == "train_then_eval"
    eval_data = None
    if evaluates:
        eval_data = run.opened_eval_data()
        session_lib.check_classes(architecture, run.train_data.split, eval_data)
    state = create_state(run, config)
    checkpoints = state.manager(
        resolved["model_dir"],
        max_to_keep=config.keep_checkpoint_max,
        saves=session.is_chief,
    )
    content_of_record = record.make_record(session, architecture, run.train_data, config)
    # Before anything is written over: this may find that they do not fit.
    checkpoints.restore_latest()
    record.write_record(session, content_of_record, run.labelled_ids)
    if resolved["checkpoint"] and not checkpoints.latest:
        loading.restore_pretrained(
            resolved["checkpoint"],
            state.networks,
            target=resolved["evaluate_target"],
        )
        state.networks.reset_target()
    make_stream = stream_maker(run, config)
    # Before any compute: this checks all arguments.
    make_stream(num_replicas=session.num_replicas)
    reporter = _reporter(run, config, make_stream)

    def work() -> None:
        with Signals() as signals:
            loop.train(
                config,
                state,
                lambda step: session.distributed(functools.partial(make_stream, first_step=step)),
                session.strategy,
                checkpoints,
                reporter,
                lambda: signals.received,
            )
        if signals.received and (evaluates or is_trial):
            raise loop.Interrupted("Trained, not evaluated.", signals.received)
        if eval_data is not None:
            measured, predictions = session_lib.evaluate(
                session,
                state.networks,
                eval_data,
                config.train_steps,
                config.train_mode,
            )
            _report(run, state.networks, eval_data, measured, predictions)

    return work, state


def create_state(run: TrainingRun, config: TrainConfig) -> state_lib.TrainState:
    """Returns the state at the start of a training, with fresh weights."""
    built = networks.build_networks(run.resolved, run.architecture, run.session.strategy)
    with run.session.strategy.scope():
        return state_lib.TrainState.create(
            config,
            built,
            labelled=datasets.labelled_mask(run.labelled_ids, run.train_data.num_examples),
        )


def stream_maker(run: TrainingRun, config: TrainConfig) -> Callable[..., tf.data.Dataset]:
    """Returns `data.train_stream` with the arguments of a run."""
    labelled_per_batch = round(run.resolved["labelled_batch_share"] * config.batch_size)
    return functools.partial(
        data.train_stream,
        run.train_data,
        batch_size=config.batch_size,
        seed=config.seed,
        views=config.views,
        labelled_ids=run.labelled_ids if labelled_per_batch else None,
        labelled_per_batch=labelled_per_batch,
    )


def _reporter(
    run: TrainingRun,
    config: TrainConfig,
    make_stream: Callable[..., tf.data.Dataset],
) -> events.Reporter:
    return events.Reporter(
        run.resolved["model_dir"],
        train_steps=config.train_steps,
        batch_size=config.batch_size,
        num_examples=config.num_examples,
        summary_steps=config.summary_steps if run.session.is_chief else 0,
        learning_rate=optimizers.learning_rate_schedule(config),
        preview=lambda step: _sample_views(make_stream, config, step),
    )


def _sample_views(
    make_stream: Callable[..., tf.data.Dataset], config: TrainConfig, step: int
) -> list[np.ndarray]:
    """Returns the views of the first images of a step's batch."""
    batch = next(iter(make_stream(first_step=step, num_steps=1)))
    made = views.make_views(batch, config.views, config.seed)
    return [view[:_IMAGES_IN_GRID].numpy() for view in made]


def _report(
    run: TrainingRun,
    trained: model.Networks,
    eval_data: data.Dataset,
    measured: dict[str, float],
    predictions: np.ndarray,
) -> None:
    """Writes the report of a trained classifier."""
    resolved, session = run.resolved, run.session
    with session.strategy.scope():
        encoder = model.encoder_of_images(trained)
    ids, labels, _ = predictions.T
    outputs = features.compute_outputs(
        encoder,
        data.subset(eval_data, ids[content.choose(labels)]),
        resolved["image_size"],
        **session.forward_options(),
    )
    if session.is_chief:
        content.write_classifier_report(
            session.subject(eval_data, resolved["model_dir"]),
            measured,
            predictions,
            outputs,
        )


class Signals:
    """Records a request to stop, which the loop answers between calls.

    Attributes:
        received: number of the signal that was received; 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Signals:
        self._before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.received:  # the second time is meant
            signal.default_int_handler(number, None)
        self.received = number
        logging.warning("Signal %d: saving after this call ...", number)


TRAIN = Command(
    help="Pretrain an encoder, or fine-tune a classifier on it.",
    groups=_GROUPS,
    prepare=prepare,
    inherits=inherit.from_checkpoint,
)
TRAIN_THEN_EVAL = dataclasses.replace(
    TRAIN, help="Train, then evaluate the classifier and write a report."
)
