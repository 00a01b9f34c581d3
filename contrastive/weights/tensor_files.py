# SPDX-License-Identifier: Apache-2.0
"""Reading of named tensors from the files of any program."""

import functools
import heapq
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import safetensors
import tensorflow as tf
from tensorflow.core.protobuf.trackable_object_graph_pb2 import (
    TrackableObjectGraph,
)

from contrastive import run_record, storage
from contrastive.training import checkpoints
from contrastive.weights import unpickling

_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# The encoder of SimCLR's TensorFlow 2 code, and the objects in it that lead to its variables.
_SIMCLR_ENCODER = "resnet_model"
_SIMCLR_OBJECTS = re.compile(
    r"\d+|initial_conv_relu_max_pool|block_groups|layers|conv2d_bn_layers"
    r"|conv_relu_dropblock_layers|projection_layers|shortcut_layers|se_layer"
    r"|conv2d(_fixed_padding|_0|_1)?|batch_norm_relu(_1)?|bn|se_reduce"
    r"|se_expand|kernel|bias|gamma|beta|moving_mean|moving_variance"
)


class TensorFile(NamedTuple):
    """Arrays by name, with "/" between nested names; texts of .safetensors."""

    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = {}


def read(path: str) -> TensorFile | None:
    """Reads the tensors in a file; the last file that was read is cached.

    The path may also be the prefix or the directory of a TensorFlow checkpoint or SavedModel.
    Returns None for a run of this program, a `.keras` file, and if there is no checkpoint.

    Raises:
        ValueError: if the file cannot be read.
    """
    if run_record.is_file(path):
        return _read(path, _stamp(path))
    prefix = os.path.join(path, checkpoints.SAVED_MODEL_VARIABLES)
    if not tf.io.gfile.exists(f"{prefix}.index"):
        if tf.io.gfile.isdir(path) and run_record.read_run(path) is not None:
            return None
        try:
            prefix = checkpoints.latest_checkpoint(path)
        except ValueError:
            return None  # the reader of runs explains what is missing
    return _read(prefix, _stamp(f"{prefix}.index"))


def forget() -> None:
    """Frees the memory of the file that was read last."""
    _read.cache_clear()


def _stamp(path: str) -> tuple[int, int]:
    status = tf.io.gfile.stat(path)
    return status.length, status.mtime_nsec


# Published weights are read for their architecture and again for their values, from the cache
# unless the stamp, which is the file's, has changed.
@functools.lru_cache(maxsize=1)
def _read(path: str, stamp: tuple[int, int]) -> TensorFile | None:
    if tf.io.gfile.exists(f"{path}.index"):
        return _read_checkpoint(path)
    if storage.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, os.path.basename(path))
            tf.io.gfile.copy(path, copy)
            return _read.__wrapped__(copy, stamp)
    if path.endswith(".keras"):
        return None
    with open(path, "rb") as file:
        head = file.read(9)
    for pattern, reader in _READERS.items():
        if re.match(pattern, head):
            return reader(path)
    raise ValueError(
        f"{path} is neither a pickle (protocol 2 or later), nor a file of "
        "torch.save, nor .safetensors."
    )


def _read_safetensors(path: str) -> TensorFile:
    try:
        with safetensors.safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return TensorFile(tensors, file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"Cannot read {path}: {error}") from error


# Patterns of the first 9 bytes of a file, and functions that read the file.
_READERS: dict[bytes, Callable[[str], TensorFile]] = {
    # First, because 8 bytes of the header's length may look like a pickle.
    rb"(?s).{5}\0\0\0\{": _read_safetensors,
    rb"PK": lambda path: TensorFile(unpickling.read_torch(path)),
    rb"\x80": lambda path: TensorFile(unpickling.read_pickle(path)),
}


def _read_checkpoint(prefix: str) -> TensorFile | None:
    """Reads a checkpoint of SimCLR or RPC; returns None for any other."""
    reader = tf.train.load_checkpoint(prefix)
    keys = {name: name for name in reader.get_variable_to_shape_map()}
    if _OBJECT_GRAPH in keys:  # of TensorFlow 2
        keys = dict(_simclr_variables(reader.get_tensor(_OBJECT_GRAPH)))
    if not keys:
        return None
    return TensorFile({k: reader.get_tensor(v) for k, v in keys.items()})


def _simclr_variables(serialized: bytes) -> Iterator[tuple[str, str]]:
    """Yields the place and the key of each variable of a SimCLR encoder."""
    # The keys in a SavedModel come from a list of all variables, so only the graph of objects shows
    # the place of a variable. A variable below the encoder that is not in an object of SimCLR has
    # its key as its place.
    nodes = TrackableObjectGraph.FromString(serialized).nodes
    for encoder in {
        child.node_id
        for node in nodes
        for child in node.children
        if child.local_name == _SIMCLR_ENCODER
    }:
        seen = set()
        # SimCLR's objects come first: Keras adds other ways to the same ones.
        waiting = [(False, encoder, _SIMCLR_ENCODER)]
        while waiting:
            is_other, index, place = heapq.heappop(waiting)
            if index in seen:
                continue
            seen.add(index)
            for attribute in nodes[index].attributes:
                key = attribute.checkpoint_key
                yield f"{_SIMCLR_ENCODER}/{key}" if is_other else place, key
            for child in nodes[index].children:
                name = child.local_name
                other = is_other or not _SIMCLR_OBJECTS.fullmatch(name)
                item = (other, child.node_id, f"{place}/{name}")
                heapq.heappush(waiting, item)
