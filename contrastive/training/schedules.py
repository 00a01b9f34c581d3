# SPDX-License-Identifier: Apache-2.0
"""Learning rate and target decay: functions of the training step."""

import math
from typing import Any

import keras
import tensorflow as tf
from keras import ops


@keras.saving.register_keras_serializable(package="schedules")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0, then half a cosine down to 0, where it stays.

    With `w = warmup_steps` and `T = total_steps`:

        step < w:   peak * step / w
        otherwise:  peak * (1 + cos(pi * (step - w) / (T - w))) / 2

    Source: Loshchilov and Hutter, arXiv:1608.03983; the same as SimCLR's `WarmUpAndCosineDecay` and
    BYOL's `learning_schedule`.

    Args:
        peak: learning rate at the end of the warm-up.
        warmup_steps: number of steps with a growing rate; 0 for none.
        total_steps: first step with rate 0, at least `warmup_steps`.
        decay: False keeps the rate at its peak after the warm-up.

    Raises:
        ValueError: unless `0 <= warmup_steps <= total_steps`.
    """

    def __init__(
        self,
        peak: float,
        warmup_steps: int,
        total_steps: int,
        decay: bool = True,
    ):
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(
                "`warmup_steps` must be in 0..`total_steps`. Received: "
                f"warmup_steps={warmup_steps}, total_steps={total_steps}."
            )
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay = decay

    def __call__(self, step: Any) -> tf.Tensor:
        """Returns the float32 learning rate of a step, counted from 0."""
        step = ops.cast(step, "float32")
        warmup = step / max(self.warmup_steps, 1)
        after = 1.0
        if self.decay:
            after = _half_cosine(step - self.warmup_steps, self.total_steps - self.warmup_steps)
        return self.peak * ops.where(step < self.warmup_steps, warmup, after)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "decay": self.decay,
        }


def ema_decay(
    step: Any,
    total_steps: int,
    base: float,
    *,
    copy_until: int = -1,
    every: int = 1,
) -> tf.Tensor:
    """Returns the decay of the target network's average, from `base` to 1.

    `1 - (1 - base) * (1 + cos(pi * step / total_steps)) / 2`; the target is then `decay * target +
    (1 - decay) * online`.

    Source: Grill et al. (BYOL), arXiv:2006.07733. `copy_until` and `every`: filipbasara0/relic,
    train.py, `update_gamma_after_step` and `update_gamma_every_n_steps`.

    Args:
        step: integer or integer tensor, counted from 0.
        total_steps: step at which the decay reaches 1, and stays there.
        base: decay at step 0, in [0, 1].
        copy_until: up to this step the target is a copy: the decay is 0.
        every: steps from one update to the next; 1 between them.

    Returns:
        float32 scalar.
    """
    decay = 1.0 - (1.0 - base) * _half_cosine(step, total_steps)
    decay = ops.where(ops.equal(ops.mod(step, every), 0), decay, 1.0)
    return ops.where(step <= copy_until, 0.0, decay)


def _half_cosine(step: Any, total_steps: int) -> tf.Tensor:
    """Returns 1 at step 0, falling to 0 at `total_steps`, constant outside."""
    progress = ops.cast(step, "float32") / max(total_steps, 1)
    return (1.0 + ops.cos(math.pi * ops.clip(progress, 0.0, 1.0))) / 2.0
