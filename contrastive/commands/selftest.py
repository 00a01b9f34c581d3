# SPDX-License-Identifier: Apache-2.0
"""--mode=selftest: compares a few steps on all devices with the same on one.

It shows that BatchNorm, the loss and the gradients are those of the global batch on the machine at
hand. Each side runs in a process of its own, because two strategies cannot share one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import logging
from etils import epy

from contrastive.commands import inherit
from contrastive.commands.base import Command
from contrastive.config import schema
from contrastive.config.resolve import COMMAND_LINE, DEFAULT, Resolved

with epy.lazy_imports():
    import numpy as np
    import tabulate
    import tensorflow as tf

    from contrastive.commands import session as session_lib, train
    from contrastive.devices import strategies
    from contrastive.training import tracing

_PROGRAM = "import sys; from contrastive.commands import selftest; selftest.main(*sys.argv[1:])"
_ROOT = str(Path(__file__).resolve().parents[2])
EXIT_DIFFERS = 1
# Images per replica: few, so that it takes a minute.
_IMAGES = 8
_LEARNING_RATE = 0.01
# Largest relative errors of the first step, and of later ones, which amplify rounding where a unit
# crosses its ReLU's kink. Statistics of a replica's own images, a forgotten factor or a lost
# gradient differ by tens of per cent in the first step.
_TOLERANCES = {False: (0.01, 0.1), True: (0.1, 0.5)}  # by mixed precision
_WHERE_TO_LOOK = (
    "They differ: do not train on these devices. With --global_bn=false or "
    "--rpc_marginal_norm=local_replica that is so by definition."
)


class ProcessFailed(ValueError):
    """One side has failed and has reported its error."""


class Comparison(NamedTuple):
    """The result of a self-test: devices in words, global batch, agreements."""

    devices: str
    batch_size: int
    agreements: list[tracing.Agreement]


def prepare(resolved: Resolved) -> Callable[[], None]:
    """Prepares the self-test; returns the work."""
    if resolved.origins["dataset"] == DEFAULT:
        resolved = resolved.replace(DEFAULT, dataset="photo_patches")
    return functools.partial(_work, resolved)


def _work(resolved: Resolved) -> None:
    """Compares all devices with one; exits with 1 if they differ."""
    found = compare(resolved)
    agree = all(row.holds for row in found.agreements)
    sys.stdout.write(
        f"{resolved['objective']}, {resolved['encoder']} "
        f"{resolved['resnet_depth']}, batch {found.batch_size}: "
        f"{found.devices} beside one device.\n"
        f"{table(found.agreements)}\n"
        f"{'They are the same computation.' if agree else _WHERE_TO_LOOK}\n"
    )
    sys.exit(0 if agree else EXIT_DIFFERS)


def compare(resolved: Resolved) -> Comparison:
    """Runs a few steps on all devices, then on one, each in its process.

    Raises:
        ProcessFailed: if one of the two fails.
    """
    batch_size = None
    if resolved.origins["train_batch_size"] == COMMAND_LINE:
        batch_size = resolved["train_batch_size"]
    with tempfile.TemporaryDirectory() as folder:
        several = _in_a_process(Path(folder), resolved, batch_size, False)
        batch_size = int(several.pop("batch_size"))
        names = str(several.pop("devices"))
        one = _in_a_process(Path(folder), resolved, batch_size, True)
    del one["batch_size"], one["devices"]
    tolerances = _TOLERANCES[resolved["mixed_precision"]]
    found = tracing.agreements(one, several, tolerances)
    return Comparison(names, batch_size, found)


def table(found: list[tracing.Agreement]) -> str:
    """Returns the agreements as lines of text."""
    return tabulate.tabulate(
        [
            (
                row.what,
                row.count,
                f"{row.error:.2g}",
                f"{row.tolerance:.2g}",
                "agree" if row.holds else f"DIFFER, most {row.worst}",
            )
            for row in found
        ],
        headers=("", "compared", "error", "allowed", ""),
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "right", "right", "right", "left"),
    )


def _in_a_process(
    folder: Path, resolved: Resolved, batch_size: int | None, first_alone: bool
) -> tracing.Traced:
    """Returns the result of `run_steps`, computed in another process."""
    asked, answered = folder / "resolved.pickle", folder / "trace.npz"
    asked.write_bytes(pickle.dumps((resolved, batch_size, first_alone)))
    command = [sys.executable, "-c", _PROGRAM, str(asked), str(answered)]
    environment = {**os.environ, "PYTHONPATH": _ROOT}
    name = resolved["master"] or resolved["tpu_name"]
    name = name or environment.get("TPU_NAME")
    if name in (None, "", strategies.LOCAL_TPU):
        environment.pop("TPU_LOAD_LIBRARY", None)  # see run.py
    code = subprocess.run(command, check=False, env=environment).returncode
    if code:
        which = "one device" if first_alone else "all devices"
        raise ProcessFailed(
            f"The steps on {which} ended with exit code {code}; see the error above."
        )
    with np.load(answered) as file:
        return dict(file)


def run_steps(resolved: Resolved, batch_size: int | None, first_alone: bool) -> tracing.Traced:
    """Returns the trace of the steps that the flags describe.

    It differs from the flags: the batch is small unless it is given; every objective is trained by
    LARS with a rate for the scale of its loss, under which all of them move by more than rounding
    and none explodes; the target follows fast.
    """
    if not resolved["mixed_precision"]:
        # The rounding of TF32 on GPUs would be amplified by the few images.
        tf.config.experimental.enable_tensor_float_32_execution(False)
    # One GPU alone would use XLA, which rounds half precision otherwise.
    resolved = resolved.derived(jit_compile=False)
    session = session_lib.open_session(resolved, first_alone=first_alone)
    count = session.num_replicas
    size = batch_size or _IMAGES * count * resolved["accumulate_steps"]
    resolved = session.resolved.replace("selftest", train_batch_size=size)
    run = train.open_run(session.with_resolved(resolved))
    config = dataclasses.replace(
        run.config(),
        optimizer="lars",
        peak_learning_rate=_LEARNING_RATE / resolved.objective_type.loss_scale,
        learning_rate_schedule="constant",
        warmup_steps=0,
        target_decay=0.5,
    )
    stream = session.distributed(train.stream_maker(run, config))
    state = train.create_state(run, config)
    return tracing.trace(config, state, session.strategy, stream) | {
        "batch_size": np.array(config.batch_size),
        "devices": np.array(f"{type(session.strategy).__name__} of {count} replicas"),
    }


def main(asked: str, answered: str) -> None:
    """Runs one side of the comparison in this process."""
    logging.set_verbosity(logging.ERROR)
    task = pickle.loads(Path(asked).read_bytes())  # noqa: S301
    try:
        seen = run_steps(*task)
    except (ValueError, tf.errors.OpError) as error:
        sys.exit(f"Error: {error}")
    np.savez(answered, **seen)  # type: ignore[arg-type]


SELFTEST = Command(
    help="Compare a few steps on all devices with the same steps on one.",
    groups=(
        schema.Mode,
        schema.TrainMode,
        schema.Seed,
        schema.Start,
        schema.TrainingData,
        schema.DataDirectory,
        *schema.ENCODER_GROUPS,
        *schema.PRETRAINING_GROUPS,
        schema.Batch,
        schema.Regularization,
        schema.Precision,
        schema.Devices,
    ),
    prepare=prepare,
    inherits=inherit.from_checkpoint,
)
