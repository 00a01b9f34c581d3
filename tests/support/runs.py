# SPDX-License-Identifier: Apache-2.0
"""Small training runs, and the numbers that they leave in their directories."""

import os
import signal

import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import (
    plugin_event_accumulator as event_accumulator,
)

from contrastive.sources import labels
from contrastive.training import loop
from tests.support import program

SMALL = (
    "--dataset=photo_patches",
    "--resnet_depth=10",
    "--width_multiplier=0.125",
    "--image_size=16",
    "--train_batch_size=32",
    "--proj_out_dim=16",
    "--objective=simclr",
    "--warmup_epochs=0",
    "--learning_rate=0.5",
)


def tensors(directory, step):
    """Reads the tensors of a checkpoint that belong to the run's state."""
    reader = tf.train.load_checkpoint(f"{directory}/ckpt-{step}")
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        # Of the file, not of the run.
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH" and "save_counter" not in name
    }


def scalars(directory):
    """Reads the points of all curves, and the steps of the sample views."""
    events = event_accumulator.EventAccumulator(os.fspath(directory), {"tensors": 0})
    events.Reload()
    return {
        tag: [
            (event.step, float(tf.make_ndarray(event.tensor_proto)))
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
        if tag != "augmented_views"
    }, [event.step for event in events.Tensors("augmented_views")]


def stopped_and_whole(folder, words):
    """Returns two runs of 8 steps: one was stopped on the way and resumed."""
    words = [*words, "--steps_per_loop=1", "--train_steps=8"]
    train = loop.train

    def stopping(*arguments):
        calls = iter(range(1, 100))
        train(
            *arguments[:-1],
            lambda: signal.SIGTERM if next(calls) == 5 else 0,
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "train", stopping)
        code = program.main(f"--model_dir={folder / 'stopped'}", *words)
        assert code == 128 + signal.SIGTERM
        patched.undo()
        # The choice is read back, not made again from all labels.
        patched.setattr(labels, "choose", None)
        assert program.main(f"--model_dir={folder / 'stopped'}", *words) == 0
    assert program.main(f"--model_dir={folder / 'whole'}", *words) == 0
    return folder / "stopped", folder / "whole"
