# SPDX-License-Identifier: Apache-2.0
"""The devices and the numerics of a run, and what is measured on them."""

import dataclasses
import functools
import itertools
import math
import platform
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import data
import model
from contrastive.config import schema
from contrastive.config.completion import eval_crop
from contrastive.config.resolve import Resolved
from contrastive.devices import selection, strategies
from contrastive.evaluation import classifier
from contrastive.report import content, events


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A run on its devices: the values of the flags, and where steps run."""

    resolved: Resolved
    strategy: tf.distribute.Strategy

    @property
    def num_replicas(self) -> int:
        """Number of replicas."""
        return self.strategy.num_replicas_in_sync

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files; of several machines, one does."""
        return strategies.is_chief(self.strategy)

    def with_resolved(self, resolved: Resolved) -> "Session":
        """Returns the session with other values of the flags."""
        return dataclasses.replace(self, resolved=resolved)

    def distributed(self, make_stream: Callable[..., tf.data.Dataset]) -> tf.data.Dataset:
        """Returns the batches of `make_stream`, one part for each replica."""
        return self.strategy.distribute_datasets_from_function(
            lambda context: make_stream(
                num_replicas=context.num_replicas_in_sync,
                pipeline_index=context.input_pipeline_id,
                num_pipelines=context.num_input_pipelines,
            )
        )

    @property
    def eval_batch_size(self) -> int:
        """Global batch size of evaluation; it divides among the replicas."""
        count = self.num_replicas
        return math.ceil(self.resolved["eval_batch_size"] / count) * count

    def forward_options(self) -> dict[str, Any]:
        """Returns the options of `features.compute_outputs`."""
        return {
            "crop_proportion": eval_crop(self.resolved["image_size"]),
            "batch_size": self.eval_batch_size,
            "strategy": self.strategy,
            "jit_compile": self.resolved["jit_compile"],
        }

    def subject(self, dataset: data.Dataset, trained: str) -> content.Subject:
        """Returns what a report is about: `trained`, on a data set."""
        size, directory = (
            self.resolved["image_size"],
            self.resolved["model_dir"],
        )
        return content.Subject(
            model_dir=directory,
            dataset=dataset,
            dataset_name=self.resolved["dataset"],
            image_size=size,
            crop_proportion=eval_crop(size),
            trained=trained,
            command=sys.argv,
        )


def open_session(resolved: Resolved, *, first_alone: bool = False) -> Session:
    """Chooses the devices, sets up TensorFlow and returns the session.

    To be called before anything else is done with TensorFlow. `first_alone` says whether only the
    first of the devices is used.

    Raises:
        ValueError: if the devices are not available.
    """
    logging.info(
        "Python %s, TensorFlow %s, Keras %s",
        platform.python_version(),
        tf.__version__,
        keras.__version__,
    )
    resolved = _with_devices(resolved)
    set_numerics(resolved)
    devices = resolved.group(schema.Devices)
    strategy = strategies.make_strategy(
        devices.strategy,
        tpu_name=devices.master or devices.tpu_name,
        tpu_zone=devices.tpu_zone,
        gcp_project=devices.gcp_project,
        tpu_wait_minutes=devices.tpu_wait_minutes,
        cpu_replicas=devices.cpu_replicas,
        first_alone=first_alone,
    )
    return Session(resolved=resolved, strategy=strategy)


def open_host(resolved: Resolved) -> Session:
    """Returns a session on the host's CPU, for what executes no step."""
    resolved = _numerics_derived(resolved, has_gpu=False, uses_tpu=True)
    set_numerics(resolved)
    return Session(resolved=resolved, strategy=strategies.host_only())


def _with_devices(resolved: Resolved) -> Resolved:
    """Derives the values that depend on this machine's devices."""
    gpus = tf.config.list_physical_devices("GPU")
    name = selection.choose_strategy(
        resolved["strategy"],
        use_tpu=resolved["use_tpu"],
        tpu_named=bool(resolved["master"] or resolved["tpu_name"]),
        num_gpus=len(gpus),
        cpu_replicas=resolved["cpu_replicas"],
    )
    uses_tpu = name == "tpu"
    if uses_tpu and resolved["cpu_replicas"] > 1:
        raise ValueError("--cpu_replicas is for runs without a TPU.")
    mode = resolved["mode"]
    trains = mode in ("train", "train_then_eval", "selftest")
    sweeps = resolved["sweep_learning_rate"] or resolved["sweep_train_epochs"]
    if name == "multi_worker" and (sweeps or not trains):
        what = "a sweep" if sweeps else f"--mode={mode}"
        raise ValueError(
            f"Several machines train; {what} runs on one: --strategy=mirrored or one_device."
        )
    resolved = resolved.replace(resolved.origins["strategy"], strategy=name).replace(
        resolved.origins["use_tpu"], use_tpu=uses_tpu
    )
    return _numerics_derived(resolved, bool(gpus), uses_tpu=uses_tpu)


def _numerics_derived(resolved: Resolved, has_gpu: bool, *, uses_tpu: bool) -> Resolved:
    on_cpu = not has_gpu and not uses_tpu
    alone = has_gpu and resolved["strategy"] == "one_device"
    return resolved.derived(deterministic=on_cpu, jit_compile=alone)


def set_numerics(resolved: Resolved) -> None:
    """Sets determinism, seeds and precision of TensorFlow and Keras."""
    if resolved["deterministic"]:
        tf.config.experimental.enable_op_determinism()
        # Sums that it rewrites come out different from one call to the
        # next on several threads (TensorFlow 2.20 on a CPU).
        tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    keras.utils.set_random_seed(resolved["seed"])
    if resolved["mixed_precision"]:
        keras.mixed_precision.set_global_policy("mixed_bfloat16")


def log_flags(resolved: Resolved) -> None:
    """Logs all values but defaults, by their origin."""
    for origin, values in resolved.by_origin().items():
        logging.info("Flags from %s: %s", origin, " ".join(values))


def check_classes(
    architecture: model.Architecture, train_split: str, eval_data: data.Dataset
) -> None:
    """Raises ValueError if a classifier cannot be evaluated on a split."""
    if not architecture.num_classes:
        raise ValueError(
            "There is no classifier to evaluate: the data has no labels, or "
            "--lineareval_while_pretraining=false."
        )
    if eval_data.num_classes != architecture.num_classes:
        raise ValueError(
            f"{eval_data.split} has {eval_data.num_classes} classes, "
            f"{train_split} {architecture.num_classes}."
        )


def evaluate(
    session: Session,
    networks: model.Networks,
    dataset: data.Dataset,
    step: int,
    train_mode: str,
) -> tuple[dict[str, float], np.ndarray]:
    """Evaluates the classifier of networks, writes the result and returns it.

    Args:
        session: session of the run.
        networks: with the classifier.
        dataset: split to evaluate on.
        step: optimizer steps done in training.
        train_mode: train mode of the networks.

    Returns:
        As `contrastive.evaluation.classifier.evaluate`.
    """
    resolved = session.resolved
    size, crop = resolved["image_size"], eval_crop(resolved["image_size"])
    stream = session.distributed(
        functools.partial(
            data.eval_stream,
            dataset,
            batch_size=session.eval_batch_size,
            image_size=size,
            crop_proportion=crop,
        )
    )
    if resolved["eval_steps"]:
        stream = itertools.islice(stream, resolved["eval_steps"])
    measured, predictions = classifier.evaluate(
        networks,
        stream,
        size,
        session.strategy,
        None if dataset.is_encoded else crop,
    )
    result = measured | {
        "global_step": step,
        "dataset": resolved["dataset"],
        "split": dataset.split,
        "train_mode": train_mode,
    }
    if session.is_chief:
        events.write_result(resolved["model_dir"], result, step)
    logging.info(
        "Step %d, %s %s: top-1 %.2f %%, top-5 %.2f %% of %d images.",
        step,
        resolved["dataset"],
        dataset.split,
        100 * measured["top_1_accuracy"],
        100 * measured["top_5_accuracy"],
        measured["num_examples"],
    )
    return measured, predictions
