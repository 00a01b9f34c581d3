# SPDX-License-Identifier: Apache-2.0
"""ReLIC, its sigmoid variant and ReLICv2: objectives over pairs of views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from etils import epy

from contrastive.config import conditions as when
from contrastive.config.fields import field, group, redeclared
from contrastive.objectives import comparison, relic_losses
from contrastive.objectives.base import (
    NEGATIVES,
    Embedded,
    Metrics,
    Objective,
    StepContext,
    Training,
)
from contrastive.objectives.byol import BYOL_DEFAULTS, BYOL_SMALL_IMAGES
from contrastive.objectives.relic_losses import relic_loss, siglip_loss
from contrastive.objectives.two_view import contrastive_metrics

with epy.lazy_imports():
    import keras
    import tensorflow as tf

    from contrastive.objectives import state

_RELIC_WITHOUT_TARGET = {
    "learning_rate": 0.3,
    "temperature": 0.1,
    "predictor": False,
    "proj_hidden_dim": (4096, 2048, 1024, 512),
    "proj_out_dim": 128,
    "proj_bn": "all",
}
# ReLICv2 and SemPPL were published without code for pretraining.
RELICV2_DEFAULTS = {
    **BYOL_DEFAULTS,
    "num_large_views": 4,
    "num_small_views": 2,
    "mask_probability": 0.1,
}
# Small views: (0.05, 0.14) of a 32-pixel image is 7 to 12 pixels wide. With the weights of large
# images, pseudo-labels are wrong for long.
RELICV2_SMALL_IMAGES = {
    **BYOL_SMALL_IMAGES,
    "small_crop_area": (0.1, 0.4),
    "invariance_weight": 1.0,
}


# Two float32 variables, each with two moments of Adam; Adam's step (int64) and its learning rate
# (float32).
_TEMPERATURE_BYTES = 2 * 3 * 4 + 8 + 4


@group("Objective")
class PairsObjective(Objective):
    """An objective over pairs of an online and a target view.

    Attributes:
        loss_function: a static method, such as `relic_loss`.
        initial_bias: initial value of a trained bias.
    """

    loss_function: ClassVar[Callable[..., Any]]

    multi_view = True
    initial_bias = 0.0

    temperature: float = field(
        0.3,
        "Softmax temperature; scores are divided by it.",
        positive=True,
        applies=when.flag("learnable_temperature", False),
    )
    learnable_temperature: bool = field(
        False,
        "Train the temperature and a bias, as relic-pytorch does.",
    )
    max_inverse_temperature: float = field(
        5.0,
        "Largest inverse of a trained temperature.",
        minimum=0.01,
        applies=when.flag("learnable_temperature", True),
    )
    include_same_view: bool = field(False, "Compare a view with its own target, too.")
    average_pairs: bool = field(False, "Average over pairs of views instead of summing.")
    kl_form: str = field(
        "swap",
        "Distribution that a pair's distribution over images is compared "
        "with by KL: that of the swapped views (swap), that over the columns "
        "(transpose), or the latter with KL's arguments exchanged, as in "
        "relic-pytorch (transpose_reversed).",
        choices=relic_losses.KL_FORMS,
    )
    kl_grad: str = field(
        "none",
        "Part of KL's first argument that receives no gradient: all of it "
        "(sg_p), its entropy (entropy_only, ReLICv2's equation), or nothing "
        "(none).",
        choices=relic_losses.KL_GRADS,
    )
    kl_small: str = field(
        "transpose",
        "KL of small views, which have no target.",
        choices=relic_losses.KL_SMALLS,
        applies=when.given("num_small_views"),
    )

    def build_state(self, training: Training) -> keras.layers.Layer | None:
        """Returns the variables of the temperature, if it is trained."""
        del training
        if not self.learnable_temperature:
            return None
        return state.TrainedTemperature(self.initial_bias, self.max_inverse_temperature)

    def state_bytes(self, training: Training) -> int:
        """Computes the size of the temperature and its optimizer, in bytes."""
        del training
        return _TEMPERATURE_BYTES if self.learnable_temperature else 0

    def trained_temperature(self, context: StepContext) -> state.TrainedTemperature | None:
        """Returns the variables of the temperature in a step's state."""
        return context.state

    def arguments(self) -> dict[str, Any]:
        """Returns further arguments of `loss_function`: weights, negatives."""
        raise NotImplementedError

    def batch_arguments(
        self, embedded: Embedded, context: StepContext
    ) -> tuple[dict[str, Any], Metrics]:
        """Returns arguments that depend on the batch, and their metrics."""
        del embedded, context
        return {}, {}

    def __call__(self, embedded: Embedded, context: StepContext) -> tuple[tf.Tensor, Metrics]:
        """Returns the loss and its metrics."""
        online, target = embedded.online, embedded.target
        critic: dict[str, Any] = {"temperature": self.temperature}
        metrics: Metrics = {}
        trained = self.trained_temperature(context)
        if trained is not None:
            critic = {
                "bias": tf.identity(trained.bias),
                "temperature": relic_losses.critic_temperature(
                    trained.log_scale, trained.max_scale
                ),
            }
            metrics |= critic
        arguments = {**critic, **self.arguments()}
        count = arguments.get("num_negatives", 0)
        if 0 < count < context.training.batch_size - 1:
            pairs = comparison.num_pairs(len(online), len(target), self.include_same_view)
            arguments["draws"] = context.draw(NEGATIVES, pairs, count)
        more, measured = self.batch_arguments(embedded, context)
        loss = self.loss_function(
            online,
            target,
            include_same_view=self.include_same_view,
            average_pairs=self.average_pairs,
            kl_form=self.kl_form,
            kl_grad=self.kl_grad,
            kl_small=self.kl_small,
            gather=context.gather,
            **arguments,
            **more,
        )
        metrics |= contrastive_metrics(
            online[0],
            # The second view if there is one; the first is the anchor.
            target[:2][-1],
            temperature=critic["temperature"],
            gather=context.gather,
        )
        return loss, metrics | measured


def num_negatives_field(default: int) -> int:
    """Declares the number of sampled negatives."""
    return field(
        default,
        "Number of negatives sampled from the global batch for each image and "
        "pair of views, some tens at most; 0 uses all.",
        minimum=0,
    )


@group("Objective")
class ReLIC(PairsObjective):
    """ReLIC (Mitrovic et al., arXiv:2010.07922).

    The paper is silent about the temperature and alpha. With a predictor and a target network,
    BYOL's authors find temperatures of 0.3 and more best, and 0.1 harmful (their table 18).
    """

    loss_function = staticmethod(relic_loss)

    defaults = {**BYOL_DEFAULTS, "learning_rate": 0.2}
    small_images = BYOL_SMALL_IMAGES
    without_target = _RELIC_WITHOUT_TARGET
    synonyms = {"gamma": "target_decay"}

    alpha: float = field(1.0, "Weight of the invariance (KL) term.", minimum=0)
    num_negatives: int = num_negatives_field(0)

    def arguments(self) -> dict[str, Any]:
        """Returns the weights and the number of negatives."""
        return {
            "alpha": self.alpha,
            "num_negatives": self.num_negatives,
        }


@group("Objective")
class SigLIP(PairsObjective):
    """ReLIC with the pairwise sigmoid loss, as in filipbasara0/relic."""

    loss_function = staticmethod(siglip_loss)

    defaults = ReLIC.defaults
    small_images = ReLIC.small_images
    without_target = _RELIC_WITHOUT_TARGET
    synonyms = ReLIC.synonyms
    # So that the many negatives do not dominate at first.
    initial_bias = -10.0

    # Few pairs match: without a trained bias, training starts far off.
    learnable_temperature: bool = redeclared(PairsObjective, "learnable_temperature", True)
    alpha: float = redeclared(ReLIC, "alpha", 1.0)

    def arguments(self) -> dict[str, Any]:
        """Returns the weights."""
        return {
            "alpha": self.alpha,
        }


@group("Objective")
class ReLICv2(PairsObjective):
    """ReLICv2 (Tomasev et al., arXiv:2201.05119)."""

    loss_function: ClassVar[Callable[..., Any]] = staticmethod(relic_loss)

    defaults = RELICV2_DEFAULTS
    small_images = RELICV2_SMALL_IMAGES

    temperature: float = redeclared(PairsObjective, "temperature", 0.2)
    include_same_view: bool = redeclared(PairsObjective, "include_same_view", True)
    average_pairs: bool = redeclared(PairsObjective, "average_pairs", True)
    kl_grad: str = redeclared(PairsObjective, "kl_grad", "sg_p")
    contrast_weight: float = field(0.3, "Weight of the contrastive terms.", minimum=0)
    invariance_weight: float = field(5.0, "Weight of the KL terms.", minimum=0)
    num_negatives: int = num_negatives_field(10)

    def arguments(self) -> dict[str, Any]:
        """Returns the weights and the number of negatives."""
        return {
            "alpha": self.invariance_weight,
            "contrastive_weight": self.contrast_weight,
            "num_negatives": self.num_negatives,
        }
