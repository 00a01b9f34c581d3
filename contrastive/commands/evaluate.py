# SPDX-License-Identifier: Apache-2.0
"""--mode=eval: evaluates each new checkpoint of a run until it is trained."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epy

from contrastive import run_record
from contrastive.commands import inherit
from contrastive.commands.base import Command
from contrastive.config import schema
from contrastive.config.fields import Values, fields_of
from contrastive.config.resolve import Resolved

with epy.lazy_imports():
    import tensorflow as tf

    import data
    import model
    from contrastive.commands import datasets, session as session_lib
    from contrastive.training import checkpoints

_SECONDS_BETWEEN_POLLS = 5
# Files of a run that its trainer writes again and again.
_SIGNS_OF_LIFE = ("run.json", "checkpoint", "events.*")


class TrainerIsGone(Exception):
    """The run that is followed shows no sign of life."""


def inherits(given: Values) -> dict[str, Any]:
    """Waits for the run and returns the values that evaluation takes over.

    Raises:
        ValueError: if no directory is given, or it is a file.
        TrainerIsGone: if the run does not start within the timeout.
    """
    directory = given.get("model_dir")
    if not directory:
        raise ValueError("--mode=eval needs --model_dir.")
    default = fields_of(schema.Following)["eval_timeout_minutes"].default
    run = _wait_for_run(directory, given.get("eval_timeout_minutes", default))
    return inherit.recorded(run, "data")


def _wait_for_run(directory: str, timeout_minutes: float) -> dict[str, Any]:
    """Waits until a trainer has written its `run.json`; returns it."""
    if run_record.is_file(directory):
        raise ValueError(
            f"--model_dir={directory} is a file; --mode=eval needs the directory of a run."
        )
    run = run_record.read_run(directory)
    if run is None:
        logging.info(
            "Waiting for a trainer to write run.json in %s (--eval_timeout_minutes=%g) ...",
            directory,
            timeout_minutes,
        )
    started = time.monotonic()
    while run is None:
        waited = (time.monotonic() - started) / 60
        if timeout_minutes and waited > timeout_minutes:
            raise TrainerIsGone(
                f"No trainer wrote run.json in {directory} within "
                f"{timeout_minutes:g} minutes (--eval_timeout_minutes)."
            )
        time.sleep(_SECONDS_BETWEEN_POLLS)
        run = run_record.read_run(directory)
    return run


def prepare(resolved: Resolved) -> Callable[[], None]:
    """Prepares the evaluation of each checkpoint of a run to its last."""
    directory = resolved["model_dir"]
    run = run_record.read_run(directory)
    if run is None:
        raise TrainerIsGone(f"The run.json of {directory} is gone.")
    session = session_lib.open_session(resolved)
    session_lib.log_flags(session.resolved)
    architecture = model.Architecture.from_record(run["architecture"])
    eval_data = datasets.open_eval_data(resolved)
    session_lib.check_classes(architecture, resolved["train_split"], eval_data)
    with session.strategy.scope():
        networks = model.build_networks(architecture)
    follower = _Follower(session, networks, eval_data, run)
    return follower.follow


class _Follower:
    """Evaluates the checkpoints of a run as they appear."""

    def __init__(
        self,
        session: session_lib.Session,
        networks: model.Networks,
        eval_data: data.Dataset,
        run: dict[str, Any],
    ) -> None:
        self._session = session
        self._networks = networks
        self._eval_data = eval_data
        self._train_mode = run["flags"]["train_mode"]
        self._directory = session.resolved["model_dir"]
        self._timeout_minutes = session.resolved["eval_timeout_minutes"]
        self._evaluated: list[str] = []

    def follow(self) -> None:
        """Evaluates until the last checkpoint of the run."""
        logging.info(
            "Waiting for checkpoints in %s (--eval_timeout_minutes=%g) ...",
            self._directory,
            self._timeout_minutes,
        )
        for path in tf.train.checkpoints_iterator(
            self._directory,
            min_interval_secs=_SECONDS_BETWEEN_POLLS,
            timeout=_SECONDS_BETWEEN_POLLS,
            timeout_fn=self._wait,
        ):
            step = self._restore(path)
            if step is None:
                logging.info("%s is gone already; waiting for the next.", path)
                continue
            self._evaluated.append(path)
            session_lib.evaluate(
                self._session,
                self._networks,
                self._eval_data,
                step,
                self._train_mode,
            )
            if step >= self._train_steps():
                return

    def _restore(self, path: str) -> int | None:
        """Restores a checkpoint; returns its step, None if it was deleted."""
        try:
            checkpoints.restore_networks(path, **self._networks.models())
            return checkpoints.checkpoint_step(path)
        except (tf.errors.NotFoundError, ValueError):
            if tf.io.gfile.exists(f"{path}.index"):
                raise
            return None

    def _train_steps(self) -> int:
        # Read again each time: the run may have been prolonged.
        run = run_record.read_run(self._directory)
        if run is None:
            raise TrainerIsGone(f"The run.json of {self._directory} is gone.")
        return run["train_steps"]

    def _wait(self) -> bool:
        """Checks the run while there is no new checkpoint."""
        self._train_steps()  # raises if the run was deleted
        latest = tf.train.latest_checkpoint(self._directory)
        if latest in (None, *self._evaluated):
            check_trainer_lives(self._directory, self._timeout_minutes)
        return False  # there may be more checkpoints


def check_trainer_lives(directory: str, timeout_minutes: float) -> None:
    """Raises TrainerIsGone if a run's files are older than the timeout."""
    written = [
        tf.io.gfile.stat(path).mtime_nsec / 1e9
        for pattern in _SIGNS_OF_LIFE
        for path in tf.io.gfile.glob(os.path.join(directory, pattern))
    ]
    minutes = (time.time() - max(written, default=0.0)) / 60
    if timeout_minutes and minutes > timeout_minutes:
        raise TrainerIsGone(
            f"The trainer of {directory} is gone: it wrote there last "
            f"{minutes:,.0f} minutes ago, which is longer than "
            f"--eval_timeout_minutes={timeout_minutes:g}. Start training again "
            "with its command, then this evaluation."
        )


EVAL = Command(
    help="Follow --model_dir beside its trainer and evaluate each new "
    "checkpoint until training is done.",
    groups=(
        *schema.FORWARD_GROUPS,
        schema.RunDirectory,
        schema.TrainingData,
        schema.EvaluationData,
        schema.Following,
    ),
    prepare=prepare,
    inherits=inherits,
)
