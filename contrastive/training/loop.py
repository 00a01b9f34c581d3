# SPDX-License-Identifier: Apache-2.0
"""The training loop: one compiled loop runs a step on every replica."""

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from contrastive.devices import strategies
from contrastive.report.events import Reporter
from contrastive.training.checkpoints import TrainingCheckpoints
from contrastive.training.config import TrainConfig
from contrastive.training.finetuning import finetuning_step
from contrastive.training.pretraining import pretraining_step
from contrastive.training.state import TrainState
from contrastive.training.views import Batch, Step, ViewMaker, view_maker

# A call of the compiled loop should take about this long, so that progress is shown and a signal is
# answered, yet the host rarely delays the devices.
_SECONDS_A_CALL = 2.0


class TrainingDiverged(ArithmeticError):
    """The loss or a weight is no longer a finite number."""


class Interrupted(Exception):
    """A signal has ended the run; the state has been saved.

    Attributes:
        signal_number: the signal, which another machine may have received.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class HostsDisagree(ValueError):
    """The machines that train together are not in the same state."""


def build_step(config: TrainConfig, state: TrainState, make_views: ViewMaker | None = None) -> Step:
    """Returns the step of the run's train mode, to be run on every replica.

    `make_views` makes the views of a batch; None: those of the run.
    """
    build = pretraining_step if config.pretrains else finetuning_step
    return build(config, state, make_views or view_maker(config))


class CompiledLoop:
    """Runs a step on every replica, several times per call.

    Attributes:
        names: names of the metrics, after the first call.
    """

    def __init__(self, strategy: tf.distribute.Strategy, step: Step, jit_compile: bool) -> None:
        self.names: list[str] = []

        @tf.autograph.experimental.do_not_convert
        def replica_step(batch: Batch) -> tf.Tensor:
            metrics = step(batch)
            self.names[:] = metrics
            return tf.stack([tf.cast(v, tf.float32) for v in metrics.values()])

        if jit_compile:
            replica_step = tf.function(replica_step, jit_compile=True, reduce_retracing=True)

        @tf.function
        def loop(iterator: Iterator[Batch], num_steps: tf.Tensor) -> tf.Tensor:
            history = tf.TensorArray(tf.float32, size=num_steps)
            for i in tf.range(num_steps):
                metrics = strategy.run(replica_step, (next(iterator),))
                history = history.write(i, strategy.reduce("MEAN", metrics, axis=None))
            return history.stack()

        self._loop = loop

    def __call__(self, iterator: Iterator[Batch], num_steps: int) -> np.ndarray:
        """Runs steps; returns means over replicas, `[num_steps, metrics]`."""
        return self._loop(iterator, tf.constant(num_steps)).numpy()


def train(
    config: TrainConfig,
    state: TrainState,
    make_stream: Callable[[int], tf.data.Dataset],
    strategy: tf.distribute.Strategy,
    checkpoints: TrainingCheckpoints,
    reporter: Reporter,
    received_signal: Callable[[], int] = lambda: 0,
) -> None:
    """Trains from the state's step to `config.train_steps`.

    Args:
        config: the run.
        state: made in the strategy's scope, restored.
        make_stream: from the first step to a (distributed) dataset of batches.
        strategy: where the step runs.
        checkpoints: those of `state`.
        reporter: shows and records the progress.
        received_signal: returns the number of the signal that asks this machine to save and stop; 0
            if there was none.

    Raises:
        TrainingDiverged: at the first loss or weight that is not finite; the newest checkpoint is
            from before.
        Interrupted: after saving, if any of the machines received a signal.
        HostsDisagree: if they do not find the same checkpoint.
    """
    step = int(state.step.numpy())
    hosts = _Hosts(strategy)
    steps = hosts.numbers(step)
    if len(set(steps)) > 1:
        raise HostsDisagree(
            f"The machines resume from different steps, {sorted(set(steps))}: "
            "--model_dir must be one directory that all of them can read."
        )
    with contextlib.closing(reporter):
        reporter.start(step)
        if step >= config.train_steps:
            logging.info("Already trained: step %d of %d.", step, config.train_steps)
            return
        iterator = iter(make_stream(step))
        loop = CompiledLoop(strategy, build_step(config, state), config.jit_compile)
        logging.info("Compiling the step (up to some minutes on a TPU) ...")
        pace = _Pace(config.steps_per_loop)
        saved = time.monotonic()
        while step < config.train_steps:
            # Machines differ in speed and clocks, and only one may be told to stop.
            num_steps = min(hosts.numbers(pace.num_steps))
            num_steps = min(num_steps, _steps_to_save(config, step))
            started = time.monotonic()
            history = loop(iterator, num_steps)
            pace.update(num_steps, time.monotonic() - started)
            step += num_steps
            # Before the check, so that the way to a divergence is recorded.
            reporter.progress(step, loop.names, history, pace.seconds_a_step)
            _check_finite(loop.names, history, step - num_steps)
            is_due = _is_due(config, step, time.monotonic() - saved)
            signal_number = max(hosts.numbers(received_signal()))
            if signal_number or any(hosts.numbers(is_due)):
                _save(state, checkpoints, step, loop.names, history, reporter)
                saved = time.monotonic()
            if signal_number and step < config.train_steps:
                raise Interrupted(
                    f"Saved at step {step} of {config.train_steps}.",
                    signal_number,
                )


def _save(
    state: TrainState,
    checkpoints: TrainingCheckpoints,
    step: int,
    names: list[str],
    history: np.ndarray,
    reporter: Reporter,
) -> None:
    """Saves the state after a step, unless a weight is not finite."""
    try:
        _check_finite_weights(state, step)
    except TrainingDiverged:
        reporter.show_last(step, names, history[-1])
        raise
    checkpoints.save(step)
    reporter.flush()


class _Hosts:
    """The machines that run this program together; mostly only this one."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        @tf.function
        def gathered(number: tf.Tensor) -> tf.Tensor:
            values = strategy.run(lambda: number[tf.newaxis])
            return strategy.gather(values, axis=0)

        self._gathered = gathered
        self._are_several = strategies.runs_on_several_hosts(strategy)

    def numbers(self, own: int) -> list[int]:
        """Returns the number of each machine; they wait for each other.

        To be called at the same points of the program on all of them.
        """
        if not self._are_several:
            return [own]
        return self._gathered(tf.constant(own, tf.int64)).numpy().tolist()


def _steps_to_save(config: TrainConfig, step: int) -> int:
    """Returns the number of steps from `step` to the next checkpoint."""
    to_end = config.train_steps - step
    if config.checkpoint_minutes:  # not known beforehand
        return to_end
    to_checkpoint = config.checkpoint_steps - step % config.checkpoint_steps
    return min(to_checkpoint, to_end)


def _is_due(config: TrainConfig, step: int, seconds: float) -> bool:
    """Returns whether to save after `step`, `seconds` after the last time."""
    if config.checkpoint_minutes and seconds >= 60 * config.checkpoint_minutes:
        return True
    return _steps_to_save(config, step - 1) == 1


class _Pace:
    """The number of steps per call, from the time that they took.

    The first call, which compiles, and the second, which warms up, do not count.
    """

    def __init__(self, fixed: int) -> None:
        self._fixed = fixed
        self._calls = 0
        self.num_steps = fixed or 1
        self.seconds_a_step: float | None = None

    def update(self, num_steps: int, seconds: float) -> None:
        self._calls += 1
        if self._calls <= 2:
            return
        self.seconds_a_step = seconds / num_steps
        if not self._fixed:
            self.num_steps = max(1, int(_SECONDS_A_CALL / self.seconds_a_step))


def _check_finite(names: list[str], history: np.ndarray, step: int) -> None:
    """Raises TrainingDiverged for the first metric that is not finite."""
    bad = np.argwhere(~np.isfinite(history))
    if not len(bad):
        return
    row, column = bad[0]
    loss = names.index("loss")
    before = ", ".join(f"{value:.4g}" for value in history[:row, loss][-5:])
    raise TrainingDiverged(
        f"{names[column]} is {history[row, column]} at step {step + row + 1}. "
        f"Losses before: {before or 'none in this call'}. Likely causes: a "
        "learning rate too high or a warm-up too short for this batch size; "
        "a temperature too low; with an objective that is unbounded in the "
        "scores, too small a --gamma. The newest checkpoint is from before."
    )


def _check_finite_weights(state: TrainState, step: int) -> None:
    """Raises TrainingDiverged for the first variable that is not finite."""
    layers = state.layers().values()
    for variable in (v for layer in layers for v in layer.variables):
        if not np.isfinite(variable.numpy()).all():
            raise TrainingDiverged(
                f"{variable.path} is not finite after step {step}. The newest "
                "checkpoint is from before. Lower the learning rate or "
                "lengthen the warm-up."
            )
