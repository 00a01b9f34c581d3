# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints and resume; encoders read, also of other programs.

A run directory (`model_dir`) holds `run.json`, which says what the run is
(see `write_run`), and `ckpt-STEP` files, each the whole state of training.
What other programs publish is read by `read_published`.
"""

import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import safetensors.numpy
import tensorflow as tf
from absl import logging
from tensorflow.core.protobuf import trackable_object_graph_pb2

import model
from contrastive import storage
from contrastive.weights import published, unpickling

_RUN_FILE = "run.json"
_CARD = "export.json"
_ARCHITECTURE = "architecture"  # in the metadata of an export
_VARIABLES = os.path.join("variables", "variables")  # in a SavedModel
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# Where the variables of SimCLR's TensorFlow 2 encoder are among its objects.
# Keras adds other ways to the same variables.
_SIMCLR_ENCODER = "resnet_model"
_SIMCLR_DEPTH = 9  # objects, one in another
_SIMCLR_OBJECTS = re.compile(
    r"\d+|initial_conv_relu_max_pool|block_groups|layers|conv2d_bn_layers"
    r"|conv_relu_dropblock_layers|projection_layers|shortcut_layers|se_layer"
    r"|conv2d(_fixed_padding|_0|_1)?|batch_norm_relu(_1)?|bn|se_reduce"
    r"|se_expand|kernel|bias|gamma|beta|moving_mean|moving_variance"
)

# What TensorFlow raises for a truncated, damaged or half-deleted checkpoint.
_DAMAGE = (tf.errors.OpError, IndexError, RuntimeError)
# What it raises where devices or a file system are lost: the file may be whole.
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

    Attributes:
        directory: the run directory.
        step: int64 variable, optimizer steps done; saved with the rest.
    """

    def __init__(
        self,
        directory: str,
        *,
        max_to_keep: int,
        saves: bool = True,
        **objects: Any,
    ) -> None:
        """Prepares to save and restore.

        Args:
            directory: the run directory, made on the first save.
            max_to_keep: older checkpoints are deleted.
            saves: whether this process writes; of several machines, which all
                hold the same state, one does.
            **objects: keras models and optimizers, stored by the paths of
                their variables, and other trackable objects; all their
                variables exist. None is left out.
        """
        self.directory = directory
        self._saves = saves
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

    def save(self, step: int) -> None:
        """Writes the state after `step` steps."""
        self.step.assign(step)
        if self._saves:
            self._manager.save(checkpoint_number=step)

    def restore_latest(self) -> int:
        """Restores the newest readable checkpoint.

        A checkpoint that cannot be read, because the disk was full or the
        machine died, is reported and the one before it is taken.

        Returns:
            The step it was saved at; 0 where the directory has none.

        Raises:
            CannotRestore: if there are checkpoints and none can be read, or
                one belongs to other networks.
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
                    str(error).splitlines()[0],
                )
            except (AssertionError, ValueError) as error:
                raise CannotRestore(
                    f"Checkpoint {path} is of another run: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            else:
                return int(self.step.numpy())
        if paths:
            raise CannotRestore(
                f"None of the {len(paths)} checkpoints in {self.directory} "
                "can be read. Remove them to start again."
            )
        return 0


def _trackable(item: Any) -> Any:
    """Returns the variables of a model or an optimizer by path.

    Keras itself numbers the layers, so that any new one would break all files,
    and has an optimizer save the weights that it trains once more.
    """
    if isinstance(item, keras.optimizers.Optimizer):
        # Without its own name, which is numbered.
        return {v.path.partition("/")[2]: v.value for v in item.variables}
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


def restore_networks(path: str, **networks: keras.Model) -> None:
    """Restores the named networks, and nothing else, from a checkpoint.

    Args:
        path: a run directory (its newest checkpoint), a file prefix, or an
            exported SavedModel.
        **networks: keras models by their name in the checkpoint.

    Raises:
        ValueError: if there is no such checkpoint.
        CannotRestore: if a variable of `networks` is missing in the file or
            has another shape there.
    """
    prefix = latest_checkpoint(path)
    try:
        trackables = {k: _trackable(v) for k, v in networks.items()}
        # Not `restore`: a SavedModel counts no saves.
        status = tf.train.Checkpoint(**trackables).read(prefix)
        status.assert_existing_objects_matched()
    except (AssertionError, ValueError) as error:
        raise CannotRestore(
            f"Checkpoint {prefix} does not fit the networks: "
            f"{str(error).splitlines()[0]} Compare its run.json with the flags."
        ) from error
    # The rest of the file (optimizer, other heads) is not wanted here.
    status.expect_partial()
    for name, network in networks.items():
        count = len(network.variables)
        logging.info("Loaded %d/%d tensors of %s.", count, count, name)


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
    return path if tf.io.gfile.isdir(path) else os.path.dirname(path) or "."


def read_run(path: str) -> dict[str, Any] | None:
    """Returns the `run.json` of a run directory or checkpoint prefix.

    That of an exported SavedModel holds the architecture alone. Returns None
    where there is no such file, and for a file of weights, which may lie in
    the directory of a run that started from it.
    """
    if tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path):
        return None
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
        forget_published()
        return model.encoder_of_images(networks)
    run = read_run(path)
    if run is None and not architecture:
        raise ValueError(
            f"There is no {_RUN_FILE} beside {latest_checkpoint(path)!r}."
        )
    fields = {**(run["architecture"] if run else {}), **architecture}
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
    tensors, about = _tensors(path)
    if tensors is not None and _ARCHITECTURE in about and not target:
        fields = json.loads(about[_ARCHITECTURE])
        return _networks_of_export(tensors, model.Architecture(**fields))
    if tensors is not None:
        foreign = _identify(path, tensors, about, target)
        networks = model.build_networks(foreign.architecture)
        foreign.assign_to(networks.encoder)
        forget_published()
        return networks
    run = read_run(path)
    if run is None:
        raise ValueError(f"There is no {_RUN_FILE} at {path!r}.")
    architecture = model.Architecture(**run["architecture"])
    if target and not architecture.target_network:
        raise ValueError(f"The run at {path!r} has no target network.")
    if target:
        architecture = dataclasses.replace(architecture, num_classes=0)
    networks = model.build_networks(architecture.without_pretraining())
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


def _networks_of_export(
    tensors: published.Tensors, architecture: model.Architecture
) -> model.Networks:
    """Returns what `save_tensors` wrote.

    Raises:
        ValueError: if a tensor is missing or of another shape.
    """
    networks = model.build_networks(architecture)
    for name, network in networks.models().items():
        for path, variable in by_path(network).items():
            tensor = tensors.get(f"{name}/{path}")
            if tensor is None or tensor.shape != variable.shape:
                there = "none" if tensor is None else tensor.shape
                raise ValueError(
                    f"{name}/{path} is {variable.shape} in the networks, "
                    f"{there} in the file."
                )
            variable.assign(tensor)
    return networks


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


def forget_published() -> None:
    """Frees the memory of the published weights that were read last."""
    _read_tensors.cache_clear()


def read_published(
    path: str, *, target: bool = False, **architecture: Any
) -> published.Published | None:
    """Returns the encoder in a file of another program.

    Read are pickles of DeepMind's programs, files of torch, `.safetensors`,
    TensorFlow checkpoints and SavedModels, see `published.identify`; and this
    program's exports as `.safetensors`.

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
    tensors, about = _tensors(path)
    if tensors is None:
        return None
    return _identify(path, tensors, about, target, **architecture)


def _identify(
    path: str,
    tensors: published.Tensors,
    about: dict[str, str],
    target: bool,
    **architecture: Any,
) -> published.Published:
    """Returns the encoder among the tensors of a file."""
    try:
        if _ARCHITECTURE in about:
            if target:
                raise ValueError("An export has no target network.")
            fields = json.loads(about[_ARCHITECTURE]) | architecture
            return published.of_export(tensors, **fields)
        fields = _of_card(path) | architecture
        return published.identify(tensors, target=target, **fields)
    except (TypeError, ValueError) as error:  # TypeError: an unknown field
        raise ValueError(f"{path}: {error}") from error


def _of_card(path: str) -> dict[str, Any]:
    """Returns what the card beside an export says of its normalisation."""
    card = os.path.join(run_directory(path), _CARD)
    if not tf.io.gfile.exists(card):
        return {}
    with tf.io.gfile.GFile(card) as file:
        fields = json.load(file)["architecture"]
    return {name: fields[name] for name in ("image_mean", "image_std")}


def _tensors(
    path: str,
) -> tuple[published.Tensors | None, dict[str, str]]:
    """Returns the tensors of another program's file and what it says of them.

    None instead of tensors where the file is of a run of this program.
    """
    if tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path):
        return _read_tensors(path, _stamp(path))
    saved_model = os.path.join(path, _VARIABLES)
    if tf.io.gfile.exists(f"{saved_model}.index"):
        return _read_tensors(saved_model, _stamp(f"{saved_model}.index"))
    if tf.io.gfile.isdir(path) and read_run(path) is not None:
        return None, {}
    try:
        prefix = latest_checkpoint(path)
        return _read_tensors(prefix, _stamp(f"{prefix}.index"))
    except ValueError:
        return None, {}  # the reader of own runs says what is the matter


def _stamp(path: str) -> tuple[int, int]:
    """Returns the length and the modification time, in ns, of a file."""
    facts = tf.io.gfile.stat(path)
    return facts.length, facts.mtime_nsec


# Weights are read for their architecture first, then for their values.
@functools.lru_cache(maxsize=1)
def _read_tensors(
    path: str, stamp: tuple[int, int]
) -> tuple[published.Tensors | None, dict[str, str]]:
    """Reads a file, or a checkpoint by its prefix; see `_tensors`.

    Args:
        path: of the file, or prefix of the checkpoint.
        stamp: of `_stamp`; part of the key of the cache.
    """
    if tf.io.gfile.exists(f"{path}.index"):
        return _tensors_of_checkpoint(path), {}
    if storage.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, os.path.basename(path))
            tf.io.gfile.copy(path, copy)
            return _read_tensors.__wrapped__(copy, stamp)
    if path.endswith(".keras"):
        return None, {}
    with open(path, "rb") as file:
        head = file.read(9)
    # Eight bytes of the header's length, which may start as a pickle does.
    if head.endswith(b"\0\0\0{"):
        try:
            with safetensors.safe_open(path, "np") as file:
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
                return tensors, file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise ValueError(f"Cannot read {path}: {error}") from error
    if head.startswith(b"PK"):
        return unpickling.read_torch(path), {}
    if head.startswith(b"\x80"):
        return unpickling.read_pickle(path), {}
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
    the graph of objects says which is which. What is below the encoder but is
    no object that SimCLR has comes by its key.
    """
    nodes = trackable_object_graph_pb2.TrackableObjectGraph.FromString(
        serialized
    ).nodes

    def walk(index: int, place: str) -> Iterator[tuple[str, str]]:
        for attribute in nodes[index].attributes:
            yield place, attribute.checkpoint_key
        for child in nodes[index].children:
            is_known = _SIMCLR_OBJECTS.fullmatch(child.local_name)
            if is_known and place.count("/") < _SIMCLR_DEPTH:
                yield from walk(child.node_id, f"{place}/{child.local_name}")

    for encoder in {
        child.node_id
        for node in nodes
        for child in node.children
        if child.local_name == _SIMCLR_ENCODER
    }:
        places = dict(walk(encoder, _SIMCLR_ENCODER))
        yield from places.items()
        below, waiting = {encoder}, [encoder]
        while waiting:
            children = {c.node_id for c in nodes[waiting.pop()].children}
            waiting += children - below
            below |= children
        keys = {a.checkpoint_key for i in below for a in nodes[i].attributes}
        for key in keys - set(places.values()):
            yield f"{_SIMCLR_ENCODER}/{key}", key


def load_classifier(path: str) -> tuple[keras.Model, tuple[str, ...]]:
    """Returns the classifier of a run of this program, with its encoder.

    Args:
        path: as `load_networks`'s.

    Returns:
        keras.Model from float32 images `[n, h, w, c]` in [0, 1] to float32
        probabilities `[n, num_classes]`; the normalisation of the run is
        inside. The names of the classes.

    Raises:
        ValueError: if there is nothing to read, or no classifier in it.
    """
    networks = load_networks(path)
    num_classes = networks.architecture.num_classes
    if not num_classes:
        raise ValueError(
            f"There is no classifier in {path!r}: fine-tune an encoder first, "
            "--train_mode=finetune."
        )
    images = keras.Input((None, None, networks.architecture.channels))
    logits = networks.logits(images, training=False)
    names = (read_run(path) or {}).get("class_names")
    return (
        keras.Model(images, keras.ops.softmax(logits)),
        tuple(names or map(str, range(num_classes))),
    )
