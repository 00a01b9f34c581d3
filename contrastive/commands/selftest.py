# SPDX-License-Identifier: Apache-2.0
"""A few steps on all devices beside the same steps on one of them.

Whoever has GPUs or TPUs finds out that BatchNorm, the loss and the gradients
are those of the global batch on their machine, too. Each side runs in a
process of its own: strategies collide in one.

    python -m contrastive.commands.selftest SETTINGS.pickle OUT.npz
"""

import dataclasses
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import data
import model
from contrastive.commands import experiment
from contrastive.devices import devices
from contrastive.training import trainer

_ROOT = str(Path(__file__).resolve().parents[2])
STEPS = 5
# Images a replica: few, so that it takes a minute, but some to take a mean of.
_IMAGES = 8
_LEARNING_RATE = 0.01
# Largest relative errors of the first step, and of later ones, which amplify
# rounding where a unit crosses its ReLU's kink. Statistics of a replica's own
# images, a forgotten factor or a lost gradient differ by tens of per cent in
# the first step.
_TOLERANCES = {"float32": (0.01, 0.1), "mixed_bfloat16": (0.1, 0.5)}
# What hardly has a gradient, such as a bias before BatchNorm, moves by rounding
# alone: errors are relative to at least this share of the largest.
_FLOOR = 1e-3

Traced = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What one kind of numbers on all devices is, beside one device.

    Attributes:
        what: the kind.
        count: how many tensors were compared.
        error: the largest, relative.
        worst: the tensor that has it.
        tolerance: the largest error that is agreement.
    """

    what: str
    count: int
    error: float
    worst: str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether they agree; not where something is not a number."""
        return self.error <= self.tolerance


class _Recorder:
    """An optimizer that also keeps the gradients it was given, summed."""

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        variables: list[tf.Variable],
    ) -> None:
        """To be made in the strategy's scope."""
        self._optimizer = optimizer
        self.iterations = optimizer.iterations
        self.gradients = [
            tf.Variable(
                tf.zeros(variable.shape),
                trainable=False,
                aggregation=tf.VariableAggregation.SUM,
            )
            for variable in variables
        ]

    def apply_gradients(self, pairs: Iterable[tuple]) -> None:
        pairs = list(pairs)
        for (gradient, _), copy in zip(pairs, self.gradients, strict=True):
            if gradient is not None:
                copy.assign(gradient)
        self._optimizer.apply_gradients(pairs)


def trace(
    config: trainer.TrainConfig,
    networks: model.Networks,
    strategy: tf.distribute.Strategy,
    stream: tf.data.Dataset,
    steps: int = STEPS,
) -> Traced:
    """Trains a few steps and returns what it sees.

    Args:
        config: the run.
        networks: made in the strategy's scope.
        strategy: where the steps run.
        stream: distributed batches.
        steps: how many.

    Returns:
        `metrics|STEP|NAME` of each step; `gradient|1|VARIABLE`, of the global
        loss; and `variable|STEP|VARIABLE`, BatchNorm's statistics included,
        before the first step, after it and after the last.

    Raises:
        ValueError: if copies of a variable on this machine differ.
    """
    with strategy.scope():
        plain = trainer.build_optimizers(config, networks)
        groups = dict(
            zip(
                plain._fields,
                trainer.trained_variables(config, networks),
                strict=True,
            )
        )
        optimizers = plain._replace(
            **{
                name: _Recorder(getattr(plain, name), group)
                for name, group in groups.items()
                if group
            }
        )
    variables = {
        f"{name}/{variable.path}": variable
        for name, part in networks.models().items()
        for variable in part.variables
    }
    loop = trainer.CompiledLoop(
        strategy,
        trainer.build_step(config, networks, optimizers),
        config.jit_compile,
    )
    iterator, seen = iter(stream), _values(variables, 0)
    for done in range(1, steps + 1):
        metrics = loop(iterator, 1)[0]
        for name, value in zip(loop.names, metrics, strict=True):
            seen[f"metrics|{done}|{name}"] = value
        if done == 1:
            for name, group in groups.items():
                copies = getattr(optimizers, name).gradients if group else []
                for variable, copy in zip(group, copies, strict=True):
                    key = f"gradient|1|{name}/{variable.path}"
                    seen[key] = copy.numpy()
        if done in (1, steps):
            seen |= _values(variables, done)
    _check_copies(variables, strategy)
    return seen


def _values(variables: dict[str, Any], step: int) -> Traced:
    return {f"variable|{step}|{k}": v.numpy() for k, v in variables.items()}


def _check_copies(
    variables: dict[str, Any], strategy: tf.distribute.Strategy
) -> None:
    for name, variable in variables.items():
        first, *others = (
            copy.numpy()
            for copy in strategy.experimental_local_results(variable.value)
        )
        if any(not np.array_equal(first, other) for other in others):
            raise ValueError(f"Replicas hold different copies of {name}.")


def agreements(
    one: Traced, several: Traced, tolerances: tuple[float, float]
) -> list[Agreement]:
    """Returns how far two traces agree, by kind.

    Args:
        one: of one device, the reference.
        several: of all devices.
        tolerances: relative errors that are agreement, of what the first step
            computes, and of the last.
    """
    last = max(int(key.split("|")[1]) for key in one)
    # By kind and name, the error and what it is relative to.
    kinds: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}
    for key, value in one.items():
        group, step, name = key.split("|")
        kind = _kind(group, int(step), name, last)
        if not kind:
            continue
        moved = value
        if group == "variable":  # how far since the start
            moved = value - one[f"variable|0|{name}"]
        sizes = kinds.setdefault((kind, int(step)), {})
        error = float(np.linalg.norm(several[key] - value))
        if value.dtype.kind in "biu":  # ids and labels: no error is small
            sizes[name] = np.inf if error else 0.0, 0.0
        else:
            sizes[name] = error, float(np.linalg.norm(moved))
    return [
        _agreement(kind, sizes, tolerances[step > 1])
        for (kind, step), sizes in sorted(kinds.items(), key=lambda x: x[0][1])
    ]


def _kind(group: str, step: int, name: str, last: int) -> str | None:
    """Returns what a tensor is compared as, if it is."""
    if group == "metrics" and name.endswith("loss") and step in (1, last):
        return f"losses, step {step}"
    if group == "gradient":
        return "gradients, step 1"
    # What moves far apart is measured apart.
    if group == "variable" and "/moving_" in name:
        return f"BatchNorm statistics, step {step}" if step else None
    if group == "variable" and step == last:
        what = "queue" if name.startswith("queue/") else "weights"
        return f"{what}, step {step}"
    return None


def _agreement(
    kind: str, sizes: dict[str, tuple[float, float]], tolerance: float
) -> Agreement:
    floor = _FLOOR * max(size for _, size in sizes.values())
    floor = max(floor, float(np.finfo(np.float32).tiny))
    errors = {
        name: error / max(size, floor) for name, (error, size) in sizes.items()
    }
    # What is not a number is the worst of all.
    worst = max(
        errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf)
    )
    return Agreement(kind, len(errors), errors[worst], worst, tolerance)


def table(found: list[Agreement]) -> str:
    """Returns the agreements as lines of text."""
    lines = [f"{'':31} {'compared':>8} {'error':>9} {'allowed':>9}"]
    for row in found:
        verdict = "agree" if row.holds else f"DIFFER, most {row.worst}"
        lines.append(
            f"{row.what:31} {row.count:8} {row.error:9.2g} "
            f"{row.tolerance:9.2g}  {verdict}"
        )
    return "\n".join(lines)


class ProcessFailed(ValueError):
    """One side did not come to its end, and has said why."""


class Comparison(NamedTuple):
    """What `compare` found.

    Attributes:
        devices: of all replicas, as TensorFlow calls the strategy and them.
        batch_size: images a step.
        agreements: by kind.
    """

    devices: str
    batch_size: int
    agreements: list[Agreement]


def compare(
    settings: experiment.Settings, sources: dict[str, str]
) -> Comparison:
    """Runs a few steps on all devices, then on one, each in its process.

    Args:
        settings: the flags in force, of pretraining.
        sources: where each comes from.

    Raises:
        ProcessFailed: if one of the two does not end well.
    """
    batch_size = None
    if sources["train_batch_size"] == "command line":
        batch_size = settings.train_batch_size
    with tempfile.TemporaryDirectory() as folder:
        several = _in_a_process(
            Path(folder), settings, sources, batch_size, False
        )
        batch_size = int(several.pop("batch_size"))
        names = str(several.pop("devices"))
        one = _in_a_process(Path(folder), settings, sources, batch_size, True)
    del one["batch_size"], one["devices"]
    precision = "mixed_bfloat16" if settings.mixed_precision else "float32"
    found = agreements(one, several, _TOLERANCES[precision])
    return Comparison(names, batch_size, found)


def _in_a_process(
    folder: Path, settings: experiment.Settings, *more: Any
) -> Traced:
    """Returns what `_run` returns for these arguments."""
    asked, answered = folder / "settings.pickle", folder / "trace.npz"
    asked.write_bytes(pickle.dumps((settings, *more)))
    command = [sys.executable, "-m", __spec__.name, str(asked), str(answered)]
    environment = {**os.environ, "PYTHONPATH": _ROOT}
    name = settings.master or settings.tpu_name or environment.get("TPU_NAME")
    if name in (None, "", devices.LOCAL_TPU):
        environment.pop("TPU_LOAD_LIBRARY", None)  # see run.py
    code = subprocess.run(command, check=False, env=environment).returncode
    if code:
        raise ProcessFailed(
            f"The steps on {'one device' if more[-1] else 'all devices'} "
            f"ended with exit code {code}; why, is said above."
        )
    with np.load(answered) as file:
        return dict(file)


def _run(
    settings: experiment.Settings,
    sources: dict[str, str],
    batch_size: int | None,
    first_alone: bool,
) -> Traced:
    """Returns the trace of the steps that flags describe.

    Differs from what they say: the batch is small, if it is not given; every
    objective is trained by LARS with one rate, under which all of them move by
    more than rounding and none explodes; the target follows fast.
    """
    if not settings.mixed_precision:
        # What GPUs round to otherwise, the few images here would amplify.
        tf.config.experimental.enable_tensor_float_32_execution(False)
    # One GPU alone would have XLA, which rounds half precision otherwise.
    settings.jit_compile = bool(settings.jit_compile)
    run = experiment.Run(settings, sources, first_alone=first_alone)
    count = run.strategy.num_replicas_in_sync
    settings.train_batch_size = (
        batch_size or _IMAGES * count * settings.accumulate_steps
    )
    config = dataclasses.replace(
        experiment.make_train_config(
            settings, run.train_data, count, labelled_ids=run.labelled_ids
        ),
        optimizer="lars",
        peak_learning_rate=_LEARNING_RATE,
        learning_rate_schedule="constant",
        warmup_steps=0,
        target_decay=0.5,
    )
    stream = run.distributed(
        functools.partial(
            data.train_stream,
            run.train_data,
            batch_size=config.batch_size,
            seed=config.seed,
            views=config.views,
        )
    )
    return trace(config, run.networks, run.strategy, stream) | {
        "batch_size": np.array(config.batch_size),
        "devices": np.array(
            f"{type(run.strategy).__name__} of {count} replicas"
        ),
    }


def main(asked: str, answered: str) -> None:
    """Does what `_in_a_process` asks."""
    logging.set_verbosity(logging.ERROR)
    task = pickle.loads(Path(asked).read_bytes())  # noqa: S301
    try:
        seen = _run(*task)
    except (ValueError, tf.errors.OpError) as error:
        sys.exit(f"Error: {error}")
    np.savez(answered, **seen)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
