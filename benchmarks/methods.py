# SPDX-License-Identifier: Apache-2.0
"""Seconds of a step of each objective, beside its encoder passes alone.

`passes` is the least that an objective computes: forward and backward passes of the encoder on the
online views and one forward pass on the target's, on fixed images. `step` is all of training:
input, views, heads, loss, queue and optimizer. Rounds of the two alternate in one process; medians
are reported. The last column is step / passes relative to that of the first objective: the cost
beyond the passes.

    python benchmarks/methods.py --methods simclr byol relicv2 semppl
"""

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import tensorflow as tf
from absl import flags, logging

import data
import run
from contrastive.commands import session, train
from contrastive.training import loop as loop_lib, views as views_lib


def main() -> None:
    """Prints a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["simclr", "byol", "relic", "relicv2", "semppl"],
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each program")
    parser.add_argument("--steps", type=int, default=2, help="a round")
    args, more = parser.parse_known_args()
    logging.set_verbosity(logging.ERROR)

    print(f"{'method':10}{'start, s':>9}{'passes, s':>10}{'step, s':>9}  beyond")
    first = None
    for name in args.methods:
        start, seconds = measure(name, args, more)
        ratio = seconds["step"] / seconds["passes"]
        first = first or ratio
        print(
            f"{name:10}{start:9.1f}{seconds['passes']:10.3f}"
            f"{seconds['step']:9.3f}{ratio / first:8.2f}",
            flush=True,
        )


def measure(name, args, more) -> tuple[float, dict[str, float]]:
    """Returns seconds of the first step, and of each program afterwards."""
    folder = tempfile.mkdtemp()
    flags.FLAGS.unparse_flags()
    flags.FLAGS(
        [
            "run.py",
            f"--objective={name}",
            "--dataset=photo_patches",
            "--resnet_depth=18",
            "--width_multiplier=0.5",
            "--train_batch_size=64",
            "--train_steps=1000",
            f"--model_dir={folder}",
            *more,
        ]
    )
    opened = train.open_run(session.open_session(run.resolve_flags()))
    config = opened.config()
    state = train.create_state(opened, config)
    stream = iter(
        data.train_stream(opened.train_data, batch_size=config.batch_size, seed=config.seed)
    )
    loop = loop_lib.CompiledLoop(
        opened.session.strategy,
        loop_lib.build_step(config, state),
        config.jit_compile,
    )
    passes = make_passes(config, state.networks, next(stream))
    programs = {
        "step": lambda: loop(stream, args.steps),
        "passes": lambda: [passes() for _ in range(args.steps)],
    }
    started = time.monotonic()
    loop(stream, 1)
    start = time.monotonic() - started
    passes()
    seconds = {key: [] for key in programs}
    for _ in range(args.rounds):
        for key, program in programs.items():
            started = time.monotonic()
            program()
            seconds[key].append((time.monotonic() - started) / args.steps)
    shutil.rmtree(folder)
    return start, {key: float(np.median(v)) for key, v in seconds.items()}


def make_passes(config, networks, batch):
    """Returns the function that runs the encoder on all views."""
    views = views_lib.make_views(batch, config.views, config.seed)
    large = config.num_large_views
    groups = [tf.concat(group, 0) for group in (views[:large], views[large:]) if group]
    variables = networks.encoder.trainable_variables

    @tf.function(jit_compile=config.jit_compile)
    def passes(groups):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(networks.features(x, True)) for x in groups])
        sums = [tf.reduce_sum(g) for g in tape.gradient(loss, variables)]
        if networks.target_encoder:
            target = networks.target_encoder(groups[0], training=True)
            sums.append(tf.reduce_sum(target))
        return tf.add_n(sums)

    return lambda: passes(groups).numpy()


if __name__ == "__main__":
    main()
