# SPDX-License-Identifier: Apache-2.0
"""The pretraining methods, each a row: its loss and what else it prefers.

Everything that differs between methods is here, as data. The program takes a
flag's value from the first of these that names it: the command line, the run
that it goes on from, the preset, the row (for small images, what the row says
of them), the flag's own default.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

import objective

Values = Mapping[str, Any]  # by the name of the flag

# Every critic's arguments, and the flags they come from.
_CRITIC = {"temperature": "temperature", "hidden_norm": "hidden_norm"}
# Those of a loss of pairs of views; and where negatives can be sampled.
_PAIRS = {
    "temperature": "temperature",
    "include_same_view": "include_same_view",
    "kl_grad": "kl_grad",
    "kl_form": "kl_form",
    "kl_small": "kl_small",
    "average_pairs": "average_pairs",
}
_SAMPLED_PAIRS = {**_PAIRS, "num_negatives": "num_negatives"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What is particular to one pretraining method.

    Attributes:
        loss: of `objective`. `loss(z1, z2, gather=..., **arguments)` of two
            views, or, where `multi_view`, `loss(online, target, ...)` of one
            projection a view each.
        multi_view: see `loss`.
        arguments: the loss's arguments, and the flags they come from.
        defaults: values of flags that are left unset.
        small_images: values that replace those of `defaults` where images are
            small enough for CIFAR's stem.
        without_target: values that replace both with
            `--target_network=false`.
        renamed: flags that other programs call by another name, by that name.
    """

    loss: Callable[..., tf.Tensor]
    multi_view: bool = False
    arguments: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: dict(_CRITIC)
    )
    defaults: Values
    small_images: Values = dataclasses.field(default_factory=dict)
    without_target: Values = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def can_learn_temperature(self) -> bool:
        """Whether the loss takes a trained temperature and bias."""
        return self.multi_view and "temperature" in self.arguments

    @property
    def has_gradient_penalty(self) -> bool:
        """Whether the loss has gradients in it."""
        return "gradient_penalty_weight" in self.defaults

    def values(self, *, target_network: bool) -> Values:
        """Returns the flags' values with or without a target network."""
        more = {} if target_network else self.without_target
        return {**self.defaults, **more}


# BYOL's networks and optimizer, which ReLIC (with a target network), ReLICv2
# and SemPPL share. Source: deepmind-research, byol/configs/byol.py; Grill et
# al., arXiv:2006.07733, appendix F, for its residual blocks' gammas of 1.
_BYOL_FAMILY = {
    "augmentation": "byol",
    "padding": "same",
    "zero_init_residual": False,
    "proj_head_mode": "mlp",
    "proj_hidden_dim": (4096,),
    "proj_out_dim": 256,
    "proj_bn": "hidden",
    "predictor": True,
    "target_network": True,
    "target_decay": 0.996,
    "lars_variant": "deepmind",
    "weight_decay": 1.5e-6,
}
# Nothing is published for small images. Chosen here: a head in proportion to
# the encoder, a target that follows within a hundred epochs, no blur, as
# SimCLR's recipe of CIFAR-10.
_BYOL_FAMILY_SMALL = {
    "proj_hidden_dim": (512,),
    "target_decay": 0.99,
    "weight_decay": 1e-6,
    "blur_probability": 0.0,
}
# Mitrovic et al., arXiv:2010.07922, which is silent about temperature and
# alpha. With a predictor and a target, BYOL's authors find temperatures of 0.3
# and more best, and 0.1 harmful (their table 18).
_RELIC = {
    **_BYOL_FAMILY,
    "learning_rate": 0.2,
    "temperature": 0.3,
    "alpha": 1.0,
    "include_same_view": False,
    "average_pairs": False,
    "kl_grad": "none",
    "kl_form": "swap",
    "kl_small": "transpose",
}
_RELIC_WITHOUT_TARGET = {
    "learning_rate": 0.3,
    "temperature": 0.1,
    "predictor": False,
    "proj_hidden_dim": (4096, 2048, 1024, 512),
    "proj_out_dim": 128,
    "proj_bn": "all",
}
# Both published without code for pretraining; sources in the README.
_RELICV2 = {
    **_BYOL_FAMILY,
    "num_large_views": 4,
    "num_small_views": 2,
    "temperature": 0.2,
    "contrast_weight": 0.3,
    "invariance_weight": 5.0,
    "num_negatives": 10,
    "include_same_view": True,
    "average_pairs": True,
    "kl_grad": "sg_p",
    "kl_form": "swap",
    "kl_small": "transpose",
    "mask_probability": 0.1,
}
# Small views: (0.05, 0.14) of a 32-pixel image is 7 to 12 pixels wide. Of the
# weights, see the README's results: with those of large images, pseudo-labels
# are wrong for long, and count for little.
_RELICV2_SMALL = {
    **_BYOL_FAMILY_SMALL,
    "small_crop_area": (0.1, 0.4),
    "invariance_weight": 1.0,
}

# Temperatures and weights: SimCLR's are its tf2/run.py's; those of the RPC
# family its gpu_pretrain_finetune_cifar.sh's (0.5 for all but RPC itself).
METHODS: dict[str, Method] = {
    "simclr": Method(
        loss=objective.simclr_loss,
        defaults={
            "temperature": 0.1,
            "hidden_norm": True,
            "weight_decay": 1e-6,
        },
    ),
    "rpc": Method(
        loss=objective.rpc_loss,
        arguments={
            **_CRITIC,
            "alpha": "alpha",
            "beta": "beta",
            "gamma": "gamma",
            "marginal_norm": "rpc_marginal_norm",
        },
        defaults={
            "temperature": 128.0,
            "hidden_norm": False,
            "alpha": 0.0,
            "beta": 0.001,
            "gamma": 1.0,
            "weight_decay": 1e-4,
        },
    ),
    **{
        name: Method(
            loss=loss,
            defaults={
                "temperature": 0.5,
                "hidden_norm": True,
                "weight_decay": 1e-4,
                **more,
            },
        )
        for name, loss, more in (
            ("dv", objective.dv_loss, {}),
            ("nwj", objective.nwj_loss, {}),
            ("js", objective.js_loss, {}),
            # At which both terms are of one size: the critic is bounded by
            # 1 / temperature, its gradient at the start some 10. With 10, of
            # Gulrajani et al. (arXiv:1704.00028), whose critic has no bound,
            # the encoder learns to be smooth and little else.
            ("wpc", objective.wpc_loss, {"gradient_penalty_weight": 0.01}),
        )
    },
    "byol": Method(
        loss=objective.byol_loss,
        multi_view=True,
        arguments={},
        defaults=_BYOL_FAMILY,
        small_images=_BYOL_FAMILY_SMALL,
    ),
    "relic": Method(
        loss=objective.relic_loss,
        multi_view=True,
        arguments={**_SAMPLED_PAIRS, "alpha": "alpha"},
        defaults={**_RELIC, "num_negatives": 0},
        small_images=_BYOL_FAMILY_SMALL,
        without_target=_RELIC_WITHOUT_TARGET,
        renamed={"gamma": "target_decay"},
    ),
    # `relic --use_siglip`: as relic-pytorch has it.
    "siglip": Method(
        loss=objective.siglip_loss,
        multi_view=True,
        arguments={**_PAIRS, "alpha": "alpha"},
        # Few pairs match: without a bias that says so, it starts far off.
        defaults={**_RELIC, "learnable_temperature": True},
        small_images=_BYOL_FAMILY_SMALL,
        without_target=_RELIC_WITHOUT_TARGET,
        renamed={"gamma": "target_decay"},
    ),
    "relicv2": Method(
        loss=objective.relic_loss,
        multi_view=True,
        arguments={
            **_SAMPLED_PAIRS,
            "alpha": "invariance_weight",
            "contrastive_weight": "contrast_weight",
        },
        defaults=_RELICV2,
        small_images=_RELICV2_SMALL,
    ),
    "semppl": Method(
        loss=objective.semppl_loss,
        multi_view=True,
        arguments={
            **_SAMPLED_PAIRS,
            "invariance_weight": "invariance_weight",
            "contrastive_weight": "contrast_weight",
            "semantic_weight": "semantic_weight",
            "semantic_invariance": "semantic_invariance",
            "sempos_negatives": "sempos_negatives",
            "drop_same_label_negatives": "drop_same_label_negatives",
        },
        defaults={
            **_RELICV2,
            "weight_decay": 1e-6,
            "semantic_weight": 0.2,
            "semantic_invariance": True,
            "sempos_negatives": "targets",
            "drop_same_label_negatives": False,
            "num_semantic_positives": 3,
        },
        small_images={
            **_RELICV2_SMALL,
            "semantic_weight": 1.0,
            "pseudo_label_start_epoch": 2.0,
        },
    ),
}
ALIASES = {"chi": "rpc", "nce": "simclr"}


def canonical_name(objective: str, use_siglip: bool = False) -> str:
    """Returns the row of `METHODS` that flags name."""
    name = ALIASES.get(objective, objective)
    return "siglip" if use_siglip and name == "relic" else name


def _byol_preset(
    epochs: int, learning_rate: float, weight_decay: float, decay: float
) -> Values:
    """Source: deepmind-research, byol/configs/byol.py."""
    return {
        "objective": "byol",
        "train_epochs": epochs,
        "train_batch_size": 4096,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "target_decay": decay,
    }


def _relic_preset(epochs: int, **more: Any) -> Values:
    """Epochs and batch size of the papers; see the README for the rest."""
    of_length = {
        300: {"target_decay": 0.99, "weight_decay": 1e-6},
        1000: {"target_decay": 0.996, "weight_decay": 1.5e-6},
    }
    return {
        "train_epochs": epochs,
        "train_batch_size": 4096,
        **of_length[epochs],
        **more,
    }


_RELIC_PYTORCH = {
    "objective": "relic",
    "resnet_depth": 18,
    "train_batch_size": 256,
    "optimizer": "adam",
    "learning_rate": 3e-4,
    "learning_rate_scaling": "none",
    "learning_rate_schedule": "constant",
    "warmup_epochs": 0.0,
    "weight_decay": 1e-5,
    "augmentation": "relic_pytorch",
    "padding": "torch",  # torchvision's ResNet
    "shortcuts": "needed",
    "num_small_views": 4,
    "small_crop_area": (0.05, 1.0),
    "proj_hidden_dim": (512,),
    "proj_out_dim": 64,
    "proj_bn": "none",
    "predictor": False,
    "learnable_temperature": True,
    "kl_form": "transpose_reversed",
    "average_pairs": True,
    "update_gamma_after_step": 1,
}

# Published recipes, by what they were published as.
PRESETS: dict[str, Values] = {
    "byol_40": _byol_preset(40, 0.45, 1e-6, 0.97),
    "byol_100": _byol_preset(100, 0.45, 1e-6, 0.99),
    "byol_300": _byol_preset(300, 0.3, 1e-6, 0.99),
    "byol_1000": _byol_preset(1000, 0.2, 1.5e-6, 0.996),
    # Of its appendix G, for smaller batches.
    "byol_1000_b512": {
        **_byol_preset(1000, 0.4, 1.5e-6, 0.9995),
        "train_batch_size": 512,
    },
    "relic_1000": _relic_preset(1000, objective="relic", learning_rate=0.2),
    "relic_1000_no_target": _relic_preset(
        1000, objective="relic", target_network=False
    ),
    "relicv2_300": _relic_preset(300, objective="relicv2"),
    "relicv2_1000": _relic_preset(1000, objective="relicv2"),
    "semppl_300": _relic_preset(300, objective="semppl"),
    "semppl_1000": _relic_preset(1000, objective="semppl"),
    # filipbasara0/relic, `relic_train`'s defaults and its two examples.
    "relic_pytorch_cifar10": {
        **_RELIC_PYTORCH,
        "dataset": "cifar10",
        "small_image_size": 13,
        "target_decay": 0.99,
    },
    "relic_pytorch_stl10": {
        **_RELIC_PYTORCH,
        "dataset": "stl10",
        "train_split": "unlabelled",
        "stem": "imagenet",
        "resnet_depth": 50,
        "target_decay": 0.996,
    },
    # google-research/simclr, tf2/README.md.
    "simclr_cifar10": {
        "objective": "simclr",
        "dataset": "cifar10",
        "resnet_depth": 18,
        "train_epochs": 1000,
        "learning_rate": 1.0,
        "weight_decay": 1e-4,
        "temperature": 0.5,
        "use_blur": False,
        "color_jitter_strength": 0.5,
    },
    "simclr_imagenet": {
        "objective": "simclr",
        "train_batch_size": 4096,
        "train_epochs": 100,
        "temperature": 0.1,
        "learning_rate": 0.075,
        "learning_rate_scaling": "sqrt",
        "weight_decay": 1e-4,
    },
    # martinmamql/relative_predictive_coding, the scripts in vision/.
    "rpc_cifar10": {
        "objective": "rpc",
        "dataset": "cifar10",
        "resnet_depth": 18,
        "learning_rate": 1.0,
    },
    **{
        f"rpc_imagenet_r{depth}": {
            "objective": "rpc",
            "resnet_depth": depth,
            "width_multiplier": width,
            "sk_ratio": 0.0625,
            "train_batch_size": 4096,
            "learning_rate": 0.1,
            "learning_rate_scaling": "sqrt",
            "temperature": 32.0,
            "alpha": 0.3,
            "beta": beta,
            "gamma": gamma,
        }
        for depth, width, beta, gamma in (
            (50, 1.0, 0.01, 0.1),
            (152, 2.0, 0.001, 0.01),
        )
    },
}


def _evaluation(**values: Any) -> Values:
    """Returns what evaluations of frozen or pretrained encoders share."""
    return {
        "train_mode": "finetune",
        "optimizer": "momentum",
        "momentum": 0.9,
        "learning_rate_scaling": "linear",
        "learning_rate_schedule": "cosine",
        "warmup_epochs": 0.0,
        "weight_decay": 0.0,
        **values,
    }


# BYOL's sweeps are decided on images held out of the training split, which it
# is then trained on as a whole. Source: Grill et al., arXiv:2006.07733,
# appendix D.
_BYOL_EVALUATION = {"train_batch_size": 1024, "held_out_examples": 10_009}
_BYOL_FINE_TUNING = _evaluation(
    **_BYOL_EVALUATION,
    fine_tune_after_block=-1,
    sweep_learning_rate=(0.01, 0.02, 0.05, 0.1, 0.005),
    sweep_train_epochs=(30, 50),
)

# Published evaluations, by what they were published with.
EVALUATION_PRESETS: dict[str, Values] = {
    # ReLICv2 and SemPPL. Source: google-deepmind/relicv2, configs/eval.py.
    "linear_eval_deepmind": _evaluation(
        fine_tune_after_block=4,
        train_batch_size=1024,
        train_epochs=100,
        learning_rate=0.3,
        checkpoint_minutes=5.0,
    ),
    # BYOL and ReLIC.
    "linear_eval_byol": _evaluation(
        **_BYOL_EVALUATION,
        fine_tune_after_block=4,
        train_epochs=80,
        sweep_learning_rate=(0.4, 0.3, 0.2, 0.1, 0.05),
    ),
    # google-research/simclr, tf2/README.md; RPC's README has the same.
    "linear_eval_simclr": _evaluation(
        fine_tune_after_block=4,
        zero_init_logits_layer=True,
        train_batch_size=4096,
        train_epochs=90,
        learning_rate=0.1,
        weight_decay=1e-6,
    ),
    "linear_eval_simclr_cifar10": _evaluation(
        dataset="cifar10",
        fine_tune_after_block=4,
        zero_init_logits_layer=True,
        train_batch_size=512,
        train_epochs=100,
        learning_rate=0.1,
    ),
    # All but the stem is trained. martinmamql/relative_predictive_coding, the
    # scripts in vision/.
    "finetune_rpc_imagenet": _evaluation(
        fine_tune_after_block=0,
        zero_init_logits_layer=True,
        train_batch_size=4096,
        train_epochs=90,
        learning_rate=0.16,
    ),
    "finetune_rpc_cifar10": _evaluation(
        dataset="cifar10",
        fine_tune_after_block=0,
        zero_init_logits_layer=True,
        train_batch_size=512,
        train_epochs=100,
        learning_rate=0.1,
    ),
    # Of a share of ImageNet's labels, everything is trained.
    **{
        f"semi_supervised_simclr_{share}pct": _evaluation(
            dataset=f"imagenet2012_subset/{share}pct",
            fine_tune_after_block=-1,
            zero_init_logits_layer=True,
            ft_proj_selector=1,
            optimizer="lars",
            learning_rate=0.005,
            learning_rate_scaling="sqrt",
            train_batch_size=1024,
            train_epochs=epochs,
        )
        for share, epochs in ((1, 60), (10, 30))
    },
    **{
        f"semi_supervised_byol_{share}pct": {
            **_BYOL_FINE_TUNING,
            "dataset": f"imagenet2012_subset/{share}pct",
        }
        for share in (1, 10)
    },
    # On the labels that the pretraining saw; the sweep is BYOL's.
    "semi_supervised_semppl": {**_BYOL_FINE_TUNING, "train_on_labelled": True},
}
