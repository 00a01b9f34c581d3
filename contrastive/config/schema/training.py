# SPDX-License-Identifier: Apache-2.0
"""The length of training, the optimizers, the target network, fine-tuning."""

from __future__ import annotations

from contrastive.config import choices, conditions as when
from contrastive.config.fields import field, group


@group("Schedule")
class Batch:
    """The batch of a training step.

    Attributes:
        train_batch_size: Global batch size, summed over replicas.
        accumulate_steps: Number of parts in which a replica embeds its batch, twice each, so that a
            large batch needs the memory of one part. The loss is that of the whole batch; BatchNorm
            statistics are those of a part.
    """

    train_batch_size: int = field(512, minimum=1)
    accumulate_steps: int = field(1, minimum=1, applies=when.PRETRAINING)


@group("Schedule")
class Length:
    """The length of training.

    Attributes:
        train_epochs: Number of training epochs.
        train_steps: Number of training steps; if not 0, it replaces --train_epochs.
    """

    train_epochs: int = field(
        100,
        minimum=0,
        applies=(when.without("train_steps"), when.NO_EPOCHS_SWEEP),
    )
    train_steps: int = field(0, minimum=0)


@group("Schedule")
class Checkpointing:
    """How often a run saves and reports.

    Attributes:
        checkpoint_epochs: Epochs between checkpoints.
        checkpoint_steps: Steps between checkpoints; if not 0, it replaces --checkpoint_epochs.
        checkpoint_minutes: Minutes between checkpoints; if not 0, it replaces --checkpoint_steps.
        keep_checkpoint_max: Number of checkpoints that are kept.
        train_summary_steps: Steps between TensorBoard points; 0 writes none.
        steps_per_loop: Training steps per call of the compiled loop; 0 chooses as many as take two
            seconds.
    """

    checkpoint_epochs: int = field(
        1,
        minimum=1,
        applies=when.without("checkpoint_steps", "checkpoint_minutes"),
    )
    checkpoint_steps: int = field(0, minimum=0, applies=when.without("checkpoint_minutes"))
    checkpoint_minutes: float = field(0.0, minimum=0)
    keep_checkpoint_max: int = field(5, minimum=1)
    train_summary_steps: int = field(10, minimum=0)
    steps_per_loop: int = field(0, minimum=0)


@group("Optimization")
class Optimizer:
    """The optimizer's own hyperparameters.

    Attributes:
        optimizer: LARS, SGD with Nesterov momentum (momentum), or Adam.
        learning_rate: Peak learning rate before --learning_rate_scaling.
        learning_rate_scaling: Factor of the learning rate for batch size B: B / 256 (linear), the
            square root of B (sqrt), or 1 (none).
        learning_rate_schedule: Learning rate after the warm-up: half a cosine down to 0, or
            constant.
        warmup_epochs: Epochs of linear learning rate warm-up.
    """

    optimizer: str = field("lars", choices=("lars", "momentum", "adam"))
    learning_rate: float = field(0.3, minimum=0, applies=when.NO_RATE_SWEEP)
    learning_rate_scaling: str = field("linear", choices=("linear", "sqrt", "none"))
    learning_rate_schedule: str = field("cosine", choices=("cosine", "constant"))
    warmup_epochs: float = field(10.0, minimum=0)


@group("Optimization")
class Regularization:
    """Hyperparameters that the optimizers share.

    Attributes:
        weight_decay: Weight of the L2 penalty of kernels; biases and BatchNorm have none.
        momentum: Momentum of the LARS and momentum optimizers.
        lars_variant: Apply the learning rate before (simclr) or after (deepmind) the momentum of
            LARS.
    """

    weight_decay: float = field(0.0, minimum=0)
    momentum: float = field(0.9, minimum=0, maximum=1, applies=when.MOMENTUM)
    lars_variant: str = field("simclr", choices=("simclr", "deepmind"), applies=when.LARS)


@group("Target network", applies=(when.PRETRAINING, when.MULTI_VIEW))
class Target:
    """The target network (EMA of the encoder and the projection head).

    Attributes:
        target_network: Compare online embeddings with those of a target network, an exponential
            moving average (EMA) of the online networks.
        target_decay: Initial EMA decay of the target network; a cosine schedule raises it to 1.
        target_bn: BatchNorm of the target network: statistics of the batch, as in BYOL's code, or
            the EMA of the online network's moving statistics (average).
        update_gamma_after_step: Up to this step the target network is a copy of the online network;
            -1 never copies.
        update_gamma_every_n_steps: Steps between two updates of the target network.
    """

    target_network: bool = field(False)
    target_decay: float = field(0.0, minimum=0, maximum=1, applies=when.TARGET)
    target_bn: str = field("batch", choices=choices.TARGET_BNS, applies=when.TARGET)
    update_gamma_after_step: int = field(-1, minimum=-1, applies=when.TARGET)
    update_gamma_every_n_steps: int = field(1, minimum=1, applies=when.TARGET)


@group("Fine-tuning", applies=(when.FINE_TUNING,))
class FineTuning:
    """The training of a classifier.

    Attributes:
        fine_tune_after_block: Last block whose layers are frozen, statistics included: -1 trains
            all, 0 freezes the stem, 4 trains the classifier alone.
        train_on_labelled: Train only on the images whose labels the pretraining used.
    """

    fine_tune_after_block: int = field(-1, minimum=-1, maximum=4)
    train_on_labelled: bool = field(False, applies=when.given("checkpoint"))


@group("Fine-tuning", applies=(when.FINE_TUNING,))
class Sweep:
    """The choice of hyperparameters on held-out images.

    Attributes:
        sweep_learning_rate: Learning rates to choose from: each is trained on a part of the
            training images and evaluated on the others; the best is trained on all.
        sweep_train_epochs: Numbers of epochs to choose from, with each learning rate.
        held_out_examples: Number of training images that decide a sweep, at most a tenth of all.
    """

    sweep_learning_rate: tuple[float, ...] = field((), minimum=0)
    sweep_train_epochs: tuple[int, ...] = field((), minimum=0, applies=when.without("train_steps"))
    held_out_examples: int = field(10_009, minimum=1, applies=when.SWEEPS)
