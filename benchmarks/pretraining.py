# SPDX-License-Identifier: Apache-2.0
"""Images a second of pretraining: input, step, both, and a bare ResNet.

Everything is measured in one process on photo_patches resized by nothing: the 32-pixel images, one
batch size, the program's own step. Rounds of the four programs alternate; the median round of each
is reported.

    input   augmented views alone, from the stream of batches
    step    the step on one batch that stays where it is, views made before
    both    the step as it trains: stream, views, forward, backward, optimizer
    bare    forward and backward of the same ResNet on the same views: no head,
            no loss but a sum, no optimizer

    python benchmarks/pretraining.py --resnet_depth=18 --batch_size=128
"""

import argparse
import dataclasses
import os
import pathlib
import resource
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
_STARTED = time.monotonic()
_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]

import keras
import numpy as np
import tensorflow as tf

import data
import data_util
import model
from contrastive.devices import strategies
from contrastive.training import loop as loop_lib, views as views_lib
from contrastive.training.state import TrainState
from tests.support import replica_run


def main() -> None:
    """Prints a line for each program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", default="rpc")
    parser.add_argument("--resnet_depth", type=int, default=18)
    parser.add_argument("--width_multiplier", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=128, help="images")
    parser.add_argument("--rounds", type=int, default=5, help="of each program")
    parser.add_argument("--steps", type=int, default=3, help="a round")
    args = parser.parse_args()

    keras.utils.set_random_seed(0)
    dataset = data.load("photo_patches", "train")
    strategy = strategies.make_strategy("one_device")
    with strategy.scope():
        networks = model.build_networks(
            dataclasses.replace(
                replica_run.architecture(args.objective),
                resnet_depth=args.resnet_depth,
                width_multiplier=args.width_multiplier,
                num_proj_layers=3,
                proj_out_dim=128,
            )
        )
        view = data_util.simclr_augmentation(32, strength=0.5, use_blur=False)
        config = dataclasses.replace(
            replica_run.config(args.objective, "lars"),
            views=(view, view),
            batch_size=args.batch_size,
            num_examples=dataset.num_examples,
            jit_augmentation=not strategies.has_gpu(),
            jit_compile=strategies.has_gpu(),
        )
        state = TrainState.create(config, networks)
    programs = make_programs(config, state, strategy, dataset)

    for name, run in programs.items():
        started = time.monotonic()
        run(1)
        seconds = time.monotonic() - started
        print(f"{name:6} first call, compilation included: {seconds:5.1f} s")
        if name == "both":
            print(f"start to first step: {time.monotonic() - _STARTED:.1f} s")
    seconds = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, run in programs.items():
            started = time.monotonic()
            run(args.steps)
            seconds[name].append((time.monotonic() - started) / args.steps)
    rates = {k: args.batch_size / np.median(v) for k, v in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:6}{rate:10,.0f} images/s{rate / rates['bare']:8.2f} bare")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.1f} GiB")


def make_programs(config, state, strategy, dataset):
    """Returns the four programs, each a function of the number of steps."""
    augment = data_util.augment
    if config.jit_augmentation:
        augment = tf.function(augment, jit_compile=True)

    def stream():
        return iter(
            strategy.distribute_datasets_from_function(
                lambda _: data.train_stream(dataset, batch_size=config.batch_size, seed=config.seed)
            )
        )

    def views_of(batch):
        return views_lib.make_views(batch, config.views, config.seed, augment)

    networks, batch = state.networks, next(iter(stream()))
    fixed = [tf.Variable(view) for view in tf.function(views_of)(batch)]
    step = loop_lib.build_step(config, state)
    # The same step, given views instead of making them.
    made = dataclasses.replace(config, views=(config.views[0],) * 2)
    step_alone = loop_lib.build_step(made, state, make_views=lambda _: [v + 0 for v in fixed])

    @tf.function
    def input_loop(iterator, num_steps):
        total = 0.0
        for _ in tf.range(num_steps):
            views = strategy.run(views_of, (next(iterator),))
            total += tf.add_n([tf.reduce_sum(view) for view in views])
        return total

    @tf.function(jit_compile=config.jit_compile)
    def bare(views):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(networks.features(tf.concat(views, 0), True))
        variables = networks.encoder.trainable_variables
        return [tf.reduce_sum(g) for g in tape.gradient(loss, variables)]

    def run_bare(num_steps):
        for _ in range(num_steps):
            gradients = bare([view.value() for view in fixed])
        return gradients[0].numpy()

    loops = {
        "step": loop_lib.CompiledLoop(strategy, step_alone, config.jit_compile),
        "both": loop_lib.CompiledLoop(strategy, step, config.jit_compile),
    }
    iterators = {name: stream() for name in ("input", "step", "both")}
    return {
        "input": lambda n: input_loop(iterators["input"], tf.constant(n)).numpy(),
        "both": lambda n: loops["both"](iterators["both"], n),
        "step": lambda n: loops["step"](iterators["step"], n),
        "bare": run_bare,
    }


if __name__ == "__main__":
    main()
