# SPDX-License-Identifier: Apache-2.0
"""Reading of encoders and classifiers, of this program or of others."""

import dataclasses
import json
import os
from typing import Any

import keras
import safetensors.numpy
import tensorflow as tf

import model
from contrastive import run_record
from contrastive.training.checkpoints import latest_checkpoint, restore_networks
from contrastive.weights import published, tensor_files

CARD = "export.json"
_ARCHITECTURE = "architecture"  # metadata of an export in `.safetensors`


def load_encoder(path: str, *, target: bool = False, **architecture: Any) -> keras.Model:
    """Loads a trained encoder, of this program or another.

    Args:
        path: a run directory or a checkpoint prefix in one; an exported `saved_model`,
            `networks.safetensors` or `encoder.keras`; or a file that `read_published` reads.
        target: whether to load the moving average of the encoder.
        **architecture: fields of `model.Architecture` that replace those in the directory's
            `run.json` or those inferred from another program's file. A checkpoint without
            `run.json` needs all of them.

    Returns:
        keras.Model from float32 images `[N, H, W, C]` in [0, 1] to float32 features `[N, D]`; the
        normalisation of images is inside.

    Raises:
        ValueError: if there is no checkpoint, or it does not fit.
    """
    if path.endswith(".keras"):
        return keras.saving.load_model(path)
    if found := read_published(path, target=target, **architecture):
        return model.encoder_of_images(_build(found))
    run = run_record.read_run(path)
    if run is None and not architecture:
        raise ValueError(f"There is no {run_record.RUN_FILE} beside {latest_checkpoint(path)!r}.")
    fields = model.Architecture.from_record(run["architecture"] if run else {}, **architecture)
    networks = model.build_networks(fields.without_pretraining())
    name = "target_encoder" if target else "encoder"
    restore_networks(path, **{name: networks.encoder})
    return model.encoder_of_images(networks)


def load_classifier(path: str) -> tuple[keras.Model, tuple[str, ...]]:
    """Loads a trained classifier with its encoder; `path` as `load_networks`.

    Returns:
        keras.Model from float32 images `[N, H, W, C]` in [0, 1] to float32 probabilities `[N,
        num_classes]`, and the names of the classes. The normalisation of images is inside the
        model.

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
    names = (run_record.read_run(path) or {}).get("class_names")
    return (
        keras.Model(images, keras.ops.softmax(logits)),
        tuple(names or map(str, range(num_classes))),
    )


def load_networks(path: str, *, target: bool = False) -> model.Networks:
    """Loads an encoder and its heads, without the parts of pretraining.

    Args:
        path: as the argument of `load_encoder`, except `encoder.keras`. Only the encoder is read
            from files of other programs.
        target: whether to load the moving averages. The classifier is left out then, because it was
            trained on the online features.

    Raises:
        ValueError: if there is nothing to read, or it does not fit.
    """
    file = tensor_files.read(path)
    if file and _ARCHITECTURE in file.metadata and not target:
        return _networks_of_export(file)
    if found := read_published(path, target=target):
        return _build(found)
    run = run_record.read_run(path)
    if run is None:
        raise ValueError(f"There is no {run_record.RUN_FILE} at {path!r}.")
    architecture = model.Architecture.from_record(run["architecture"])
    if target and not architecture.target_network:
        raise ValueError(f"The run at {path!r} has no target network.")
    if target:
        architecture = dataclasses.replace(architecture, num_classes=0)
    networks = model.build_networks(architecture.without_pretraining())
    _restore(path, networks.models(), target)
    return networks


def restore_pretrained(path: str, networks: model.Networks, *, target: bool = False) -> None:
    """Restores the encoder, and the projection head if the file has one.

    The arguments `path` and `target` are those of `load_networks`.

    Raises:
        ValueError: if there is no checkpoint, or it does not fit.
    """
    found = read_published(path, target=target)
    if not found:
        names = ("encoder", "projection")
        _restore(path, {n: getattr(networks, n) for n in names}, target)
    elif networks.architecture.ft_proj_selector:
        raise ValueError(
            f"Of {path}, the encoder alone is read: there is no projection "
            "head for --ft_proj_selector to choose from."
        )
    else:
        found.assign_to(networks.encoder)
        tensor_files.forget()


def _restore(path: str, networks: dict[str, Any], target: bool) -> None:
    prefix = "target_" if target else ""
    restore_networks(path, **{prefix + k: v for k, v in networks.items()})


def read_published(
    path: str, *, target: bool = False, **architecture: Any
) -> published.Published | None:
    """Reads the encoder in a file of another program.

    These are pickles of DeepMind's programs, files of torch, `.safetensors`, TensorFlow checkpoints
    and SavedModels, see `published.identify`; also exports of this program in `.safetensors`. The
    arguments are those of `load_encoder`. Returns None if `path` is of a run of this program.

    Raises:
        ValueError: if the file cannot be read, or holds no known encoder.
    """
    file = tensor_files.read(path)
    if file is None:
        return None
    try:
        if _ARCHITECTURE not in file.metadata:
            fields = _card_normalization(path) | architecture
            return published.identify(file.tensors, target=target, **fields)
        if target:
            raise ValueError("An export has no target network.")
        record = json.loads(file.metadata[_ARCHITECTURE])
        return published.of_export(file.tensors, record, **architecture)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_architecture(path: str) -> model.Architecture:
    """Reads the architecture of the encoder at a path as of `load_encoder`.

    Raises:
        ValueError: if it is not known.
    """
    if found := read_published(path):
        return found.architecture
    run = run_record.read_run(path)
    if run is None:
        raise ValueError(f"The architecture of {path!r} is not known.")
    return model.Architecture.from_record(run["architecture"])


def _card_normalization(path: str) -> dict[str, Any]:
    """Reads how images are normalised from the card beside an export."""
    card = os.path.join(run_record.run_directory(path), CARD)
    if not tf.io.gfile.exists(card):
        return {}
    with tf.io.gfile.GFile(card) as file:
        fields = json.load(file)["architecture"]
    return {name: fields[name] for name in ("image_mean", "image_std")}


def _build(found: published.Published) -> model.Networks:
    """Builds the networks of a published encoder."""
    networks = model.build_networks(found.architecture)
    found.assign_to(networks.encoder)
    tensor_files.forget()
    return networks


def save_tensors(networks: model.Networks, path: str) -> None:
    """Writes networks, bit for bit, into a local `.safetensors` file."""
    tensors = {k: v.numpy() for k, v in _variables(networks).items()}
    architecture = json.dumps(dataclasses.asdict(networks.architecture))
    safetensors.numpy.save_file(tensors, path, {_ARCHITECTURE: architecture})


def _networks_of_export(file: tensor_files.TensorFile) -> model.Networks:
    """Builds the networks that `save_tensors` wrote."""
    networks = model.build_networks(
        model.Architecture.from_record(json.loads(file.metadata[_ARCHITECTURE]))
    )
    for name, variable in _variables(networks).items():
        tensor = file.tensors.get(name)
        if tensor is None or tensor.shape != variable.shape:
            there = "none" if tensor is None else tensor.shape
            raise ValueError(f"{name} is {variable.shape} in the networks, {there} in the file.")
        variable.assign(tensor)
    return networks


def _variables(networks: model.Networks) -> dict[str, tf.Variable]:
    """Returns the variables of all networks by `NETWORK/PATH`."""
    return {
        f"{name}/{variable.path}": variable.value
        for name, network in networks.models().items()
        for variable in network.variables
    }
