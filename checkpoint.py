# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints and resume; encoders read back from run directories.

A run directory (`model_dir`) holds `run.json`, which says what the run is
(see `write_run`), and `ckpt-STEP` files, each the whole state of training.
"""

import dataclasses
import json
import os
from typing import Any

import keras
import safetensors.numpy
import tensorflow as tf
from absl import logging

import model

_RUN_FILE = "run.json"
_SAVED_MODEL_VARIABLES = "variables/variables"
_TENSORS = ".safetensors"
_ARCHITECTURE = "architecture"  # in the metadata of a file of tensors

# What TensorFlow raises for a truncated, damaged or half-deleted checkpoint.
_DAMAGE = (tf.errors.OpError, IndexError, RuntimeError)


class TrainingCheckpoints:
    """The checkpoints of one run directory.

    Attributes:
        directory: the run directory.
        step: int64 variable, optimizer steps done; saved with the rest.
    """

    def __init__(
        self, directory: str, *, max_to_keep: int, **objects: Any
    ) -> None:
        """Prepares to save and restore.

        Args:
            directory: the run directory, made on the first save.
            max_to_keep: older checkpoints are deleted.
            **objects: keras models, stored by the paths of their variables,
                and other trackable objects; all their variables exist.
                None is left out.
        """
        self.directory = directory
        self.step = tf.Variable(0, dtype=tf.int64, name="step")
        self._checkpoint = tf.train.Checkpoint(
            step=self.step,
            **{
                name: _trackable(item)
                for name, item in objects.items()
                if item is not None
            },
        )
        self._manager = tf.train.CheckpointManager(
            self._checkpoint, directory, max_to_keep
        )

    @property
    def latest(self) -> str | None:
        """The newest checkpoint's file prefix; None where there is none."""
        return self._manager.latest_checkpoint

    def save(self, step: int) -> str:
        """Writes the state after `step` steps; returns the file prefix."""
        self.step.assign(step)
        return self._manager.save(checkpoint_number=step)

    def restore_latest(self) -> int:
        """Restores the newest readable checkpoint.

        A checkpoint that cannot be read, because the disk was full or the
        machine died, is reported and the one before it is taken.

        Returns:
            The step it was saved at; 0 where the directory has none.

        Raises:
            ValueError: if there are checkpoints and none can be read, or one
                belongs to other networks.
        """
        paths = self._manager.checkpoints
        for path in reversed(paths):
            try:
                status = self._checkpoint.restore(path)
                status.assert_existing_objects_matched()
                status.assert_consumed()
            except _DAMAGE as error:
                logging.warning(
                    "Checkpoint %s cannot be read (%s); trying the one before.",
                    path,
                    str(error).splitlines()[0],
                )
            except (AssertionError, ValueError) as error:
                raise ValueError(
                    f"Checkpoint {path} is of another run: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            else:
                return int(self.step)
        if paths:
            raise ValueError(
                f"None of the {len(paths)} checkpoints in {self.directory} "
                "can be read. Remove them to start again."
            )
        return 0


def _trackable(item: Any) -> Any:
    """Returns a model's variables by path: names that outlive its layers.

    Keras itself numbers the layers, so that any new one would break all files.
    """
    return by_path(item) if isinstance(item, keras.layers.Layer) else item


def by_path(network: keras.layers.Layer) -> dict[str, tf.Variable]:
    """Returns a network's variables by names that outlive its layers."""
    return {variable.path: variable.value for variable in network.variables}


def latest_checkpoint(path: str) -> str:
    """Returns the checkpoint prefix that a directory or prefix names.

    Raises:
        ValueError: if there is none.
    """
    for prefix in (path, os.path.join(path, _SAVED_MODEL_VARIABLES)):
        if tf.io.gfile.exists(f"{prefix}.index"):
            return prefix
    latest = tf.train.latest_checkpoint(path)
    if latest is None:
        what = (
            "The directory holds no checkpoint"
            if tf.io.gfile.isdir(path)
            else "There is neither such a directory nor such a file"
        )
        raise ValueError(f"No checkpoint at {path!r}. {what}.")
    return latest


def checkpoint_step(path: str) -> int:
    """Returns the optimizer step at which checkpoint `path` was saved."""
    reader = tf.train.load_checkpoint(path)
    return int(reader.get_tensor("step/.ATTRIBUTES/VARIABLE_VALUE"))


def restore_networks(path: str, **networks: keras.Model) -> str:
    """Restores the named networks, and nothing else, from a checkpoint.

    Args:
        path: a run directory (its newest checkpoint) or a file prefix.
        **networks: keras models by their name in the checkpoint.

    Returns:
        The prefix that was read.

    Raises:
        ValueError: if a variable of `networks` is missing in the file or has
            another shape there.
    """
    prefix = latest_checkpoint(path)
    try:
        trackables = {k: _trackable(v) for k, v in networks.items()}
        status = tf.train.Checkpoint(**trackables).restore(prefix)
        status.assert_existing_objects_matched()
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"Checkpoint {prefix} does not fit the networks: "
            f"{str(error).splitlines()[0]} Compare its run.json with the flags."
        ) from error
    # The rest of the file (optimizer, other heads) is not wanted here.
    status.expect_partial()
    for name, network in networks.items():
        count = len(network.variables)
        logging.info("Loaded %d/%d tensors of %s.", count, count, name)
    return prefix


def write_run(directory: str, run: dict[str, Any]) -> None:
    """Writes what a run is: flags in force, architecture, versions."""
    tf.io.gfile.makedirs(directory)
    path = os.path.join(directory, _RUN_FILE)
    # Readers, such as a second process that evaluates, never see half a file.
    with tf.io.gfile.GFile(path + ".tmp", "w") as file:
        json.dump(run, file, indent=2, sort_keys=True)
    tf.io.gfile.rename(path + ".tmp", path, overwrite=True)


def run_directory(path: str) -> str:
    """Returns the run directory that a checkpoint's path names or is in."""
    return path if tf.io.gfile.isdir(path) else os.path.dirname(path)


def read_run(path: str) -> dict[str, Any] | None:
    """Returns the `run.json` of a run directory or checkpoint prefix.

    Returns None where there is no such file.
    """
    file_name = os.path.join(run_directory(path), _RUN_FILE)
    if not tf.io.gfile.exists(file_name):
        return None
    with tf.io.gfile.GFile(file_name) as file:
        return json.load(file)


def load_encoder(
    path: str, *, target: bool = False, **architecture: Any
) -> keras.Model:
    """Returns the trained encoder of a run of this program, or of an export.

    Args:
        path: a run directory, a checkpoint prefix in one, or one of the
            exports `saved_model`, `networks.safetensors`, `encoder.keras`.
        target: whether the moving average of the encoder is meant.
        **architecture: fields of `model.Architecture` that replace those in
            the directory's `run.json`; all of them where it has none.

    Returns:
        keras.Model from float32 images `[n, h, w, c]` in [0, 1] to float32
        features `[n, d]`; the normalisation of the run is inside.

    Raises:
        ValueError: if there is no checkpoint, or it does not fit.
    """
    if path.endswith(".keras"):
        return keras.saving.load_model(path)
    if path.endswith(_TENSORS):
        return model.encoder_of_images(load_networks(path))
    run = read_run(path) or {"architecture": {}}
    fields = {**run["architecture"], **architecture}
    networks = model.build_networks(
        model.Architecture(**fields).without_pretraining()
    )
    name = "target_encoder" if target else "encoder"
    restore_networks(path, **{name: networks.encoder})
    return model.encoder_of_images(networks)


def load_networks(path: str, *, target: bool = False) -> model.Networks:
    """Returns a run's encoder and heads, without what only pretraining uses.

    Args:
        path: as of `load_encoder`, without `encoder.keras`.
        target: whether the moving averages are meant. The classifier, which
            was trained on the others, is left out.

    Raises:
        ValueError: if there is nothing to read, or it does not fit.
    """
    if path.endswith(_TENSORS):
        return _networks_of_tensors(path)
    run = read_run(path)
    if run is None:
        raise ValueError(f"There is no {_RUN_FILE} at {path!r}.")
    architecture = model.Architecture(**run["architecture"])
    if target and not architecture.target_network:
        raise ValueError(f"The run at {path!r} has no target network.")
    networks = model.build_networks(architecture.without_pretraining())
    if target:
        networks = dataclasses.replace(networks, classifier=None)
    of_target = "target_" if target else ""
    parts = networks.models()
    restore_networks(path, **{of_target + k: v for k, v in parts.items()})
    return networks


def save_tensors(networks: model.Networks, path: str) -> None:
    """Writes networks, bit for bit, into a local `.safetensors` file."""
    safetensors.numpy.save_file(
        {
            f"{name}/{path}": variable.numpy()
            for name, network in networks.models().items()
            for path, variable in by_path(network).items()
        },
        path,
        {_ARCHITECTURE: json.dumps(dataclasses.asdict(networks.architecture))},
    )


def _networks_of_tensors(path: str) -> model.Networks:
    """Returns what `save_tensors` wrote.

    Raises:
        ValueError: if the file is another's, or damaged.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"Cannot read {path!r}: {error}") from error
    if _ARCHITECTURE not in metadata:
        raise ValueError(f"{path!r} is not an export of this program.")
    networks = model.build_networks(
        model.Architecture(**json.loads(metadata[_ARCHITECTURE]))
    )
    for name, network in networks.models().items():
        for variable_path, variable in by_path(network).items():
            key = f"{name}/{variable_path}"
            if key not in tensors:
                raise ValueError(f"{path!r} has no tensor {key}.")
            variable.assign(tensors.pop(key))
    if tensors:
        raise ValueError(f"{path!r} has tensors of no use: {sorted(tensors)}.")
    return networks
