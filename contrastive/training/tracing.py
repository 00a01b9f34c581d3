# SPDX-License-Identifier: Apache-2.0
"""The numbers of a few training steps, and their comparison."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from contrastive.training import loop
from contrastive.training.config import TrainConfig
from contrastive.training.state import TrainState

STEPS = 5
# Variables that hardly have a gradient, such as a bias before BatchNorm, move by rounding alone:
# errors are relative to at least this share of the largest.
_FLOOR = 1e-3

Traced = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The difference of one kind of numbers between two traces.

    Attributes:
        what: the kind of numbers.
        count: number of tensors that were compared.
        error: the largest relative error.
        worst: the tensor that has it.
        tolerance: the largest error that counts as agreement.
    """

    what: str
    count: int
    error: float
    worst: str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether they agree; False if a value is not a number."""
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
    config: TrainConfig,
    state: TrainState,
    strategy: tf.distribute.Strategy,
    stream: tf.data.Dataset,
    steps: int = STEPS,
) -> Traced:
    """Trains a few steps and records their numbers.

    Args:
        config: the run.
        state: made in the strategy's scope.
        strategy: where the steps run.
        stream: distributed batches.
        steps: number of steps.

    Returns:
        `metrics|STEP|NAME` of each step; `gradient|1|VARIABLE`, of the global loss; and
        `variable|STEP|VARIABLE`, BatchNorm's statistics included, before the first step, after it
        and after the last.

    Raises:
        ValueError: if copies of a variable on this machine differ.
    """
    groups = state.trained_variables(config)
    with strategy.scope():
        recorders = {
            name: _Recorder(getattr(state.optimizers, name), group)
            for name, group in groups.items()
            if group
        }
    state = dataclasses.replace(state, optimizers=state.optimizers._replace(**recorders))
    variables = {
        f"{name}/{variable.path}": variable
        for name, part in state.layers().items()
        for variable in part.variables
    }
    compiled = loop.CompiledLoop(strategy, loop.build_step(config, state), config.jit_compile)
    iterator, seen = iter(stream), _values(variables, 0)
    for done in range(1, steps + 1):
        metrics = compiled(iterator, 1)[0]
        for name, value in zip(compiled.names, metrics, strict=True):
            seen[f"metrics|{done}|{name}"] = value
        for name, recorder in recorders.items() if done == 1 else ():
            pairs = zip(groups[name], recorder.gradients, strict=True)
            for variable, copy in pairs:
                seen[f"gradient|1|{name}/{variable.path}"] = copy.numpy()
        if done in (1, steps):
            seen |= _values(variables, done)
    _check_copies(variables, strategy)
    return seen


def _values(variables: dict[str, Any], step: int) -> Traced:
    return {f"variable|{step}|{k}": v.numpy() for k, v in variables.items()}


def _check_copies(variables: dict[str, Any], strategy: tf.distribute.Strategy) -> None:
    for name, variable in variables.items():
        first, *others = (
            copy.numpy() for copy in strategy.experimental_local_results(variable.value)
        )
        if any(not np.array_equal(first, other) for other in others):
            raise ValueError(f"Replicas hold different copies of {name}.")


def agreements(one: Traced, several: Traced, tolerances: tuple[float, float]) -> list[Agreement]:
    """Returns how far two traces agree, by kind.

    Args:
        one: of one device, the reference.
        several: of all devices.
        tolerances: relative errors that are agreement, of what the first step computes, and of the
            last.
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
        is_objective_state = name.startswith("objective_state/")
        what = "objective's state" if is_objective_state else "weights"
        return f"{what}, step {step}"
    return None


def _agreement(kind: str, sizes: dict[str, tuple[float, float]], tolerance: float) -> Agreement:
    floor = _FLOOR * max(size for _, size in sizes.values())
    floor = max(floor, float(np.finfo(np.float32).tiny))
    errors = {name: error / max(size, floor) for name, (error, size) in sizes.items()}
    # What is not a number is the worst of all.
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return Agreement(kind, len(errors), errors[worst], worst, tolerance)
