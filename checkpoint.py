# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints and resume; encoders read, also of other programs.

A run directory (`model_dir`) holds `run.json`, which says what the run is
(see `write_run`), and `ckpt-STEP` files, each the whole state of training.
What other programs publish is read by `read_published`.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import keras
import safetensors
import safetensors.numpy
import tensorflow as tf
from absl import logging
from tensorflow.core.protobuf import trackable_object_graph_pb2

import model
import published
import unpickling

_RUN_FILE = "run.json"
_TENSORS = ".safetensors"
_ARCHITECTURE = "architecture"  # in the metadata of our files of tensors
_VARIABLES = os.path.join("variables", "variables")  # in a SavedModel
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# Where the variables of SimCLR's TensorFlow 2 encoder are among its objects.
# Keras adds other ways to the same variables.
_SIMCLR_ENCODER = "resnet_model"
_SIMCLR_OBJECTS = re.compile(
    r"\d+|initial_conv_relu_max_pool|block_groups|layers|conv2d_bn_layers"
    r"|conv_relu_dropblock_layers|projection_layers|shortcut_layers|se_layer"
    r"|conv2d(_fixed_padding|_0|_1)?|batch_norm_relu(_1)?|bn|se_reduce"
    r"|se_expand|kernel|bias|gamma|beta|moving_mean|moving_variance"
)

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

    A SavedModel's directory names that of its variables.

    Raises:
        ValueError: if there is none.
    """
    for prefix in (path, os.path.join(path, _VARIABLES)):
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
        path: a run directory (its newest checkpoint), a file prefix, or one of
            the exports `saved_model` and `networks.safetensors`.
        **networks: keras models by their name in the checkpoint.

    Returns:
        The prefix or file that was read.

    Raises:
        ValueError: if a variable of `networks` is missing in the file or has
            another shape there.
    """
    if _exported_architecture(path):
        _restore_tensors(path, networks)
        return path
    prefix = latest_checkpoint(path)
    try:
        trackables = {k: _trackable(v) for k, v in networks.items()}
        # Not `restore`: a SavedModel counts no saves.
        status = tf.train.Checkpoint(**trackables).read(prefix)
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

    Of an export, it is no more than the architecture. Returns None where there
    is no such file.
    """
    exported = _exported_architecture(path)
    if exported:
        return {"architecture": exported}
    file_name = os.path.join(run_directory(path), _RUN_FILE)
    if not tf.io.gfile.exists(file_name):
        return None
    with tf.io.gfile.GFile(file_name) as file:
        return json.load(file)


def load_encoder(
    path: str, *, target: bool = False, **architecture: Any
) -> keras.Model:
    """Returns a trained encoder, of this program or another.

    Args:
        path: a run directory or a checkpoint prefix in one, one of the exports
            `saved_model`, `networks.safetensors` and `encoder.keras`, or what
            `read_published` reads.
        target: whether the moving average of the encoder is meant.
        **architecture: fields of `model.Architecture` that replace those in
            the directory's `run.json`, or those found in another program's
            file; all of them for a checkpoint without `run.json`.

    Returns:
        keras.Model from float32 images `[n, h, w, c]` in [0, 1] to float32
        features `[n, d]`; the normalisation of the run is inside.

    Raises:
        ValueError: if there is no checkpoint, or it does not fit.
    """
    if path.endswith(".keras"):
        return keras.saving.load_model(path)
    foreign = read_published(path, target=target, **architecture)
    if foreign:
        networks = model.build_networks(foreign.architecture)
        foreign.assign_to(networks.encoder)
        return model.encoder_of_images(networks)
    run = read_run(path) or {"architecture": {}}
    fields = {**run["architecture"], **architecture}
    networks = model.build_networks(
        model.Architecture(**fields).without_pretraining()
    )
    name = "target_encoder" if target else "encoder"
    restore_networks(path, **{name: networks.encoder})
    return model.encoder_of_images(networks)


def load_networks(path: str, *, target: bool = False) -> model.Networks:
    """Returns an encoder and its heads, without what only pretraining uses.

    Args:
        path: as of `load_encoder`, but for `encoder.keras`. Of other programs'
            files the encoder alone is read.
        target: whether the moving averages are meant. The classifier, which
            was trained on the others' features, is left out.

    Raises:
        ValueError: if there is nothing to read, or it does not fit.
    """
    foreign = read_published(path, target=target)
    if foreign:
        networks = model.build_networks(foreign.architecture)
        foreign.assign_to(networks.encoder)
        return networks
    run = read_run(path)
    if run is None:
        raise ValueError(f"There is no {_RUN_FILE} at {path!r}.")
    architecture = model.Architecture(**run["architecture"])
    if target and not architecture.target_network:
        raise ValueError(f"The run at {path!r} has no target network.")
    networks = model.build_networks(architecture.without_pretraining())
    if target:
        networks = dataclasses.replace(networks, classifier=None)
    prefix = "target_" if target else ""
    parts = networks.models()
    restore_networks(path, **{prefix + name: parts[name] for name in parts})
    return networks


def save_tensors(networks: model.Networks, path: str) -> None:
    """Writes networks, bit for bit, into a local `.safetensors` file."""
    tensors = {
        f"{name}/{variable}": value.numpy()
        for name, network in networks.models().items()
        for variable, value in by_path(network).items()
    }
    architecture = json.dumps(dataclasses.asdict(networks.architecture))
    safetensors.numpy.save_file(tensors, path, {_ARCHITECTURE: architecture})


def _exported_architecture(path: str) -> dict[str, Any] | None:
    """Returns what a file of `save_tensors` says of itself; else None."""
    if not path.endswith(_TENSORS) or not tf.io.gfile.exists(path):
        return None
    try:
        with safetensors.safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(_ARCHITECTURE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    return json.loads(text) if text else None


def _restore_tensors(path: str, networks: dict[str, keras.Model]) -> None:
    """Restores networks by name from a file of `save_tensors`."""
    tensors = safetensors.numpy.load_file(path)
    for name, network in networks.items():
        for variable, value in by_path(network).items():
            tensor = tensors.get(f"{name}/{variable}")
            if tensor is None or tensor.shape != value.shape:
                there = "none" if tensor is None else tensor.shape
                raise ValueError(
                    f"{path} does not fit the networks: {name}/{variable} is "
                    f"{value.shape} here, {there} there."
                )
            value.assign(tensor)


def restore_pretrained(
    path: str, networks: model.Networks, *, target: bool = False
) -> None:
    """Gives networks the encoder, and the projection if there, of a file.

    Args:
        path: as `load_encoder`'s.
        networks: whose variables are replaced.
        target: whether the moving averages are meant.

    Raises:
        ValueError: if there is no checkpoint, or it does not fit.
    """
    foreign = read_published(path, target=target)
    if not foreign:
        name = "target_" if target else ""
        restore_networks(
            path,
            **{
                f"{name}encoder": networks.encoder,
                f"{name}projection": networks.projection,
            },
        )
        return
    if networks.architecture.ft_proj_selector:
        raise ValueError(
            f"Of {path}, the encoder alone is read: there is no projection "
            "head for --ft_proj_selector to choose from."
        )
    foreign.assign_to(networks.encoder)


def read_published(
    path: str, *, target: bool = False, **architecture: Any
) -> published.Published | None:
    """Returns the encoder in a file of another program.

    Read are pickles of DeepMind's programs, files of torch, `.safetensors`,
    TensorFlow checkpoints and SavedModels; see `published.identify`.

    Args:
        path: a file, a TensorFlow checkpoint's prefix or directory, or a
            SavedModel's directory.
        target: whether the moving average of the encoder is meant.
        **architecture: fields of `model.Architecture` that replace those found.

    Returns:
        What was found; None if `path` is of a run of this program.

    Raises:
        ValueError: if the file cannot be read, or holds no encoder that is
            known.
    """
    tensors = _tensors(path)
    if tensors is None:
        return None
    try:
        found = published.identify(tensors, target=target, **architecture)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    logging.info(
        "%s: %s, ResNet-%d, %d tensors. Not read, as they are of other "
        "networks: %s.",
        path,
        found.source,
        found.architecture.resnet_depth,
        len(found.weights),
        f"{len(found.unread)}, such as {found.unread[0]}"
        if found.unread
        else "none",
    )
    return found


def _tensors(path: str) -> published.Tensors | None:
    """Returns the tensors of another program's file, by name; or None."""
    if path.endswith(".keras") or _exported_architecture(path):
        return None
    if tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path):
        return _tensors_of_file(path)
    saved_model = os.path.join(path, _VARIABLES)
    if tf.io.gfile.exists(f"{saved_model}.index"):
        return _tensors_of_checkpoint(saved_model)
    if read_run(path) is not None:
        return None
    try:
        return _tensors_of_checkpoint(latest_checkpoint(path))
    except ValueError:
        return None  # and the reader of own runs says what is the matter


def _tensors_of_file(path: str) -> published.Tensors:
    """Returns the tensors of a file; its first bytes say what it is."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):
        return unpickling.read_torch(path)
    if head.startswith(b"\x80"):
        return unpickling.read_pickle(path)
    if head.endswith(b"{"):  # after eight bytes of its length
        try:
            return safetensors.numpy.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"Cannot read {path}: {error}") from error
    raise ValueError(
        f"{path} is neither a pickle (protocol 2 or later), nor a file of "
        "torch.save, nor .safetensors."
    )


def _tensors_of_checkpoint(prefix: str) -> published.Tensors | None:
    """Returns the tensors of SimCLR's or RPC's checkpoint; else None."""
    reader = tf.train.load_checkpoint(prefix)
    names = reader.get_variable_to_shape_map()
    if _OBJECT_GRAPH not in names:
        return {name: reader.get_tensor(name) for name in names}
    keys = dict(_simclr_variables(reader.get_tensor(_OBJECT_GRAPH)))
    if not keys:
        return None
    return {name: reader.get_tensor(key) for name, key in keys.items()}


def _simclr_variables(serialized: bytes) -> Iterator[tuple[str, str]]:
    """Yields place and key of each variable of a SimCLR encoder.

    In a SavedModel keys are named after a list of all variables, so that only
    the graph of objects says which is which.

    Raises:
        ValueError: if the encoder has a variable that the walk does not find.
    """
    nodes = trackable_object_graph_pb2.TrackableObjectGraph.FromString(
        serialized
    ).nodes

    def walk(index: int, place: str) -> Iterator[tuple[str, str]]:
        for attribute in nodes[index].attributes:
            yield place, attribute.checkpoint_key
        for child in nodes[index].children:
            if _SIMCLR_OBJECTS.fullmatch(child.local_name):
                yield from walk(child.node_id, f"{place}/{child.local_name}")

    encoders = {
        child.node_id
        for node in nodes
        for child in node.children
        if child.local_name == _SIMCLR_ENCODER
    }
    for encoder in encoders:
        yield from walk(encoder, _SIMCLR_ENCODER)
