# SPDX-License-Identifier: Apache-2.0
"""--mode=embed and predict: features or classes of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epy

from contrastive.commands import inherit
from contrastive.commands.base import Command
from contrastive.commands.probe import check_checkpoint
from contrastive.config import schema
from contrastive.config.completion import complete
from contrastive.config.resolve import Resolved

with epy.lazy_imports():
    import data
    from contrastive.commands import session as session_lib
    from contrastive.evaluation import features
    from contrastive.weights import loading


def prepare_embedding(resolved: Resolved) -> Callable[[], None]:
    """Prepares the embedding of the input's images; returns the work."""
    _check_input(resolved)
    if not resolved["output"]:
        raise ValueError("--mode=embed needs --output, the file to write.")
    features.check_output(resolved["output"], features.EMBEDDING_FORMATS)
    session, images = _open(resolved)
    with session.strategy.scope():
        encoder = loading.load_encoder(resolved["checkpoint"], target=resolved["evaluate_target"])

    def write(outputs: features.Outputs) -> int:
        return features.write_embeddings(resolved["output"], images, outputs)

    return lambda: _compute(session, images, encoder, write)


def prepare_prediction(resolved: Resolved) -> Callable[[], None]:
    """Prepares predictions for the input's images; returns the work."""
    _check_input(resolved)
    if resolved["output"]:
        features.check_output(resolved["output"], features.PREDICTION_FORMATS)
    session, images = _open(resolved)
    with session.strategy.scope():
        network, classes = loading.load_classifier(resolved["checkpoint"])

    def write(outputs: features.Outputs) -> int:
        return features.write_predictions(
            resolved["output"], images, outputs, classes, resolved["top_k"]
        )

    return lambda: _compute(session, images, network, write)


def _check_input(resolved: Resolved) -> None:
    check_checkpoint(resolved)
    if not resolved["input"]:
        raise ValueError(f"--mode={resolved['mode']} needs --input, the images.")


def _open(resolved: Resolved) -> tuple[session_lib.Session, data.Dataset]:
    """Opens the devices and the images."""
    session = session_lib.open_session(resolved)
    images = data.load(
        resolved["input"],
        resolved["input_split"],
        data_dir=resolved["data_dir"],
        channels=resolved.known("channels"),
    )
    resolved = complete(session.resolved, images)
    session_lib.log_flags(resolved)
    return session.with_resolved(resolved), images


def _compute(
    session: session_lib.Session,
    images: data.Dataset,
    network: Callable[..., Any],
    write: Callable[[features.Outputs], int],
) -> None:
    """Computes a network's outputs for all images and writes them."""
    resolved = session.resolved
    outputs = features.compute_outputs(
        network, images, resolved["image_size"], **session.forward_options()
    )
    missing = write(outputs)
    logging.info(
        "%d images written to %s, %d unreadable.",
        len(outputs.ids),
        resolved["output"] or "standard output",
        missing,
    )


_GROUPS = (*schema.FORWARD_GROUPS, schema.Start, schema.Input)

EMBED = Command(
    help="Write the features of --input's images.",
    groups=_GROUPS,
    prepare=prepare_embedding,
    inherits=inherit.from_checkpoint,
)
PREDICT = Command(
    help="Write the most probable classes of --input's images.",
    groups=(*_GROUPS, schema.TopClasses),
    prepare=prepare_prediction,
    inherits=inherit.from_checkpoint,
)
