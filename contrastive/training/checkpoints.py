# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of training: `ckpt-STEP`, each the whole state after a step."""

import os
from typing import Any

import keras
import tensorflow as tf
from absl import logging

SAVED_MODEL_VARIABLES = os.path.join("variables", "variables")
# Errors of TensorFlow for a truncated, damaged or half-deleted checkpoint.
_DAMAGE = (tf.errors.OpError, IndexError, RuntimeError)
# Its errors for a lost device or file system, where the file may be whole.
_NO_DAMAGE = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnauthenticatedError,
    tf.errors.UnavailableError,
)


class CannotRestore(ValueError):
    """A checkpoint cannot be read, or belongs to other networks."""


class TrainingCheckpoints:
    """The checkpoints of one run directory.

    Args:
        directory: run directory; created by the first save.
        step: int64 variable, number of optimizer steps done; saved with the rest.
        max_to_keep: number of checkpoints to keep; older ones are deleted.
        saves: whether this process writes. All machines hold the same state, so only one of them
            needs to.
        **objects: Keras models and optimizers, whose variables are stored by their paths, and other
            trackable objects. All their variables must exist. None values are ignored.
    """

    def __init__(
        self,
        directory: str,
        *,
        step: tf.Variable,
        max_to_keep: int,
        saves: bool = True,
        **objects: Any,
    ) -> None:
        self.directory, self.step, self._saves = directory, step, saves
        self._checkpoint = tf.train.Checkpoint(
            step=step,
            **{k: _trackable(v) for k, v in objects.items() if v is not None},
        )
        self._manager = tf.train.CheckpointManager(self._checkpoint, directory, max_to_keep)

    @property
    def latest(self) -> str | None:
        """File prefix of the newest checkpoint, or None."""
        return self._manager.latest_checkpoint

    def save(self, step: int) -> None:
        """Writes the state after `step` steps."""
        self.step.assign(step)
        if self._saves:
            self._manager.save(checkpoint_number=step)

    def restore_latest(self) -> int:
        """Restores the newest readable checkpoint; returns its step, or 0.

        A checkpoint that is damaged, for example because the disk was full, is logged and skipped.

        Raises:
            CannotRestore: if no existing checkpoint can be read, or one belongs to other networks.
        """
        paths = self._manager.checkpoints
        for path in reversed(paths):
            try:
                status = self._checkpoint.restore(path)
                status.assert_existing_objects_matched()
                status.assert_consumed()
            except _NO_DAMAGE:
                raise
            except _DAMAGE as error:
                logging.warning(
                    "Checkpoint %s cannot be read (%s); trying the one before.",
                    path,
                    _first_line(error),
                )
            except (AssertionError, ValueError) as error:
                raise CannotRestore(
                    f"Checkpoint {path} is of another run: {_first_line(error)}"
                ) from error
            else:
                return int(self.step.numpy())
        if paths:
            raise CannotRestore(
                f"None of the {len(paths)} checkpoints in {self.directory} "
                "can be read. Remove them to start again."
            )
        return 0


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _trackable(item: Any) -> Any:
    # Keras would number the layers, so that an added layer would break all checkpoints, and would
    # save trained weights again with the optimizer.
    if isinstance(item, keras.optimizers.Optimizer):
        # The first part of a path is the optimizer's name, which is numbered.
        return {v.path.partition("/")[2]: v.value for v in item.variables}
    return by_path(item) if isinstance(item, keras.layers.Layer) else item


def by_path(network: keras.layers.Layer) -> dict[str, tf.Variable]:
    """Returns the variables of a network by their paths."""
    return {variable.path: variable.value for variable in network.variables}


def latest_checkpoint(path: str) -> str:
    """Returns the prefix of the files of the newest checkpoint.

    The path is a directory of checkpoints or of a SavedModel, or such a prefix.

    Raises:
        ValueError: if there is no checkpoint.
    """
    for prefix in (path, os.path.join(path, SAVED_MODEL_VARIABLES)):
        if tf.io.gfile.exists(f"{prefix}.index"):
            return prefix
    if latest := tf.train.latest_checkpoint(path):
        return latest
    reason = "There is neither such a directory nor such a file"
    if tf.io.gfile.isdir(path):
        reason = "The directory holds no checkpoint"
    raise ValueError(f"No checkpoint at {path!r}. {reason}.")


def checkpoint_step(path: str) -> int:
    """Reads the optimizer step at which checkpoint `path` was saved."""
    reader = tf.train.load_checkpoint(path)
    return int(reader.get_tensor("step/.ATTRIBUTES/VARIABLE_VALUE"))


def restore_networks(path: str, **networks: keras.layers.Layer) -> None:
    """Restores the networks of these names, and nothing else.

    The path is that of `latest_checkpoint`.

    Raises:
        ValueError: if there is no such checkpoint.
        CannotRestore: if a variable of `networks` is missing in the file or has another shape
            there.
    """
    prefix = latest_checkpoint(path)
    try:
        trackables = {k: _trackable(v) for k, v in networks.items()}
        # `restore` would need a save counter, which a SavedModel lacks.
        status = tf.train.Checkpoint(**trackables).read(prefix)
        status.assert_existing_objects_matched()
    except (AssertionError, ValueError) as error:
        raise CannotRestore(
            f"Checkpoint {prefix} does not fit the networks: "
            f"{_first_line(error)} Compare its run.json with the flags."
        ) from error
    status.expect_partial()  # the file also holds the optimizer, for example
    for name, network in networks.items():
        count = len(network.variables)
        logging.info("Loaded %d/%d tensors of %s.", count, count, name)
