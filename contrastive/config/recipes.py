# SPDX-License-Identifier: Apache-2.0
"""Presets: named values of flags for pretraining and for evaluation."""

from __future__ import annotations

from typing import Any

from contrastive.config.fields import Values


def _byol_preset(epochs: int, learning_rate: float, weight_decay: float, decay: float) -> Values:
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
    decay, weight_decay = {300: (0.99, 1e-6), 1000: (0.996, 1.5e-6)}[epochs]
    return {
        "train_epochs": epochs,
        "train_batch_size": 4096,
        "target_decay": decay,
        "weight_decay": weight_decay,
        **more,
    }


def _cifar10_preset(objective: str, **more: Any) -> Values:
    return {
        "objective": objective,
        "dataset": "cifar10",
        "resnet_depth": 18,
        "learning_rate": 1.0,
        **more,
    }


def _rpc_preset(depth: int, width: float, beta: float, gamma: float) -> Values:
    return {
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
PRETRAINING: dict[str, Values] = {
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
    "relic_1000_no_target": _relic_preset(1000, objective="relic", target_network=False),
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
    "simclr_cifar10": _cifar10_preset(
        "simclr",
        train_epochs=1000,
        weight_decay=1e-4,
        temperature=0.5,
        use_blur=False,
        color_jitter_strength=0.5,
    ),
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
    "rpc_cifar10": _cifar10_preset("rpc"),
    "rpc_imagenet_r50": _rpc_preset(50, 1.0, 0.01, 0.1),
    "rpc_imagenet_r152": _rpc_preset(152, 2.0, 0.001, 0.01),
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


def _simclr_evaluation(
    block: int, size: int, epochs: int, learning_rate: float, **more: Any
) -> Values:
    """Source: google-research/simclr, tf2/README.md."""
    return _evaluation(
        fine_tune_after_block=block,
        zero_init_logits_layer=True,
        train_batch_size=size,
        train_epochs=epochs,
        learning_rate=learning_rate,
        **more,
    )


# BYOL's sweeps are decided on images held out of the training split, which it is then trained on as
# a whole. Source: Grill et al., arXiv:2006.07733, appendix D.
_BYOL_EVALUATION = {"train_batch_size": 1024, "held_out_examples": 10_009}
_BYOL_FINE_TUNING = _evaluation(
    **_BYOL_EVALUATION,
    fine_tune_after_block=-1,
    sweep_learning_rate=(0.01, 0.02, 0.05, 0.1, 0.005),
    sweep_train_epochs=(30, 50),
)

# Published evaluations, by what they were published with.
EVALUATION: dict[str, Values] = {
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
    # RPC's README has the same.
    "linear_eval_simclr": _simclr_evaluation(4, 4096, 90, 0.1, weight_decay=1e-6),
    "linear_eval_simclr_cifar10": _simclr_evaluation(4, 512, 100, 0.1, dataset="cifar10"),
    # All but the stem is trained. martinmamql/relative_predictive_coding, the scripts in vision/.
    "finetune_rpc_imagenet": _simclr_evaluation(0, 4096, 90, 0.16),
    "finetune_rpc_cifar10": _simclr_evaluation(0, 512, 100, 0.1, dataset="cifar10"),
    # Of a share of ImageNet's labels, everything is trained.
    **{
        f"semi_supervised_simclr_{share}pct": _simclr_evaluation(
            -1,
            1024,
            epochs,
            0.005,
            dataset=f"imagenet2012_subset/{share}pct",
            ft_proj_selector=1,
            optimizer="lars",
            learning_rate_scaling="sqrt",
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
