# SPDX-License-Identifier: Apache-2.0
"""Trains a few steps on N logical CPU devices; run by `test_replicas.py`.

    python replica_run.py NUM_REPLICAS OUT.npz OBJECTIVE:OPTIMIZER ...

With TF_CONFIG, as one of several workers. Of every objective it stores what
`selftest.trace` sees.
"""

import dataclasses
import os
import sys

import keras
import numpy as np

import data
import data_util
import model
import resnet
from contrastive.commands import selftest
from contrastive.config import methods
from contrastive.devices import devices
from contrastive.training import trainer

_BATCH_SIZE = 16
_STEPS = 3


def small_encoder(architecture, **_):
    """Two convolutions: a ResNet's layers, a quarter of its tracing time."""
    images = keras.Input((None, None, architecture.channels))
    x = images
    for layer in range(2):
        x = keras.layers.Conv2D(
            8, 3, 2, "same", use_bias=False, name=f"initial_conv{layer}"
        )(x)
        x = resnet.GlobalBatchNorm(name=f"initial_bn{layer}")(x)
        x = keras.layers.ReLU(name=f"initial_relu{layer}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="final_avg_pool")(x)
    return keras.Model(images, x)


def architecture(objective):
    method = methods.METHODS[objective]
    heads = {}
    if method.multi_view:
        heads = {
            "proj_head_mode": "mlp",
            "proj_hidden_dim": (16,),
            "predictor": True,
            "target_network": True,
        }
    if objective == "semppl":
        heads["queue_shape"] = (2, 2 * _BATCH_SIZE)
    if objective == "siglip":
        heads["learnable_temperature"] = True
        heads["target_bn"] = "average"
    return model.Architecture(
        **{
            "resnet_depth": 10,
            "width_multiplier": 0.125,
            "stem": "cifar",
            "padding": "fixed",
            "sk_ratio": 0.0,
            "se_ratio": 0.0,
            "zero_init_residual": False,
            "global_bn": True,
            "batch_norm_decay": 0.9,
            "channels": 3,
            "image_mean": (),
            "image_std": (),
            "proj_head_mode": "nonlinear",
            "proj_out_dim": 8,
            "num_proj_layers": 2,
            "ft_proj_selector": 0,
            "num_classes": 16,
            "zero_init_logits_layer": False,
        }
        | heads
    )


def config(objective, optimizer):
    method = methods.METHODS[objective]
    values = {"rpc_marginal_norm": "global", **method.defaults}
    if values.get("num_negatives"):
        values["num_negatives"] = 3
    view = data_util.simclr_augmentation(16, strength=0.5)
    small = ()
    if values.get("num_small_views"):
        small = (data_util.simclr_augmentation(8, strength=0.5),)
    labelled = np.zeros(40, bool)
    labelled[::3] = True
    return trainer.TrainConfig(
        train_mode="pretrain",
        objective=objective,
        hyperparameters={
            argument: values[flag]
            for argument, flag in method.arguments.items()
        },
        gradient_penalty_weight=values.get("gradient_penalty_weight", 0.0),
        views=(view, view, *small),
        num_large_views=2,
        target_decay=0.5,
        num_semantic_positives=values.get("num_semantic_positives", 0),
        num_classes=16,
        labelled=labelled,
        batch_size=_BATCH_SIZE,
        # In two parts where nothing else is particular.
        accumulate_steps=2 if objective == "js" else 1,
        num_examples=40,
        train_steps=100,
        warmup_steps=0,
        peak_learning_rate=1e-4,
        optimizer=optimizer,
        lars_variant="simclr",
        momentum=0.9,
        weight_decay=1e-4,
        fine_tune_after_block=-1,
        checkpoint_steps=100,
        keep_checkpoint_max=1,
        summary_steps=0,
        steps_per_loop=1,
        jit_compile=False,
        jit_augmentation=False,
        seed=1,
    )


def few_photo_patches():
    """Real textures: in flat colours, whole areas cross a ReLU's kink."""
    patches = data.load("photo_patches", "train")
    source = patches.source
    return dataclasses.replace(
        patches,
        source=data.Arrays(source.images[:40], source.labels[:40]),
        num_examples=40,
    )


def predictions(networks, dataset, strategy):
    """What the classifier says of each image; the last batch is not full."""
    stream = strategy.distribute_datasets_from_function(
        lambda context: data.eval_stream(
            dataset,
            batch_size=_BATCH_SIZE,
            num_replicas=context.num_replicas_in_sync,
        )
    )
    return trainer.evaluate(networks, stream, 32, strategy, None)[1]


def main(num_replicas, out_path, cases):
    several = "multi_worker" if "TF_CONFIG" in os.environ else "mirrored"
    strategy = devices.make_strategy(
        several if num_replicas > 1 else "one_device",
        cpu_replicas=num_replicas,
    )
    assert strategy.num_replicas_in_sync == num_replicas
    dataset, out = few_photo_patches(), {}
    build_encoder = model.build_encoder
    for case in cases:
        objective, optimizer = case.split(":")
        keras.utils.set_random_seed(0)
        # One with the real encoder, under either number of replicas.
        is_real = case == "simclr:momentum"
        model.build_encoder = build_encoder if is_real else small_encoder
        with strategy.scope():
            networks = model.build_networks(
                architecture(objective), remat=is_real
            )
        if is_real:
            out["predictions"] = predictions(networks, dataset, strategy)
        run = config(objective, optimizer)
        stream = strategy.distribute_datasets_from_function(
            lambda context, run=run: data.train_stream(
                dataset,
                batch_size=run.batch_size,
                seed=run.seed,
                views=run.views,
                num_replicas=context.num_replicas_in_sync,
                pipeline_index=context.input_pipeline_id,
                num_pipelines=context.num_input_pipelines,
            )
        )
        seen = selftest.trace(run, networks, strategy, stream, _STEPS)
        out |= {f"{case}|{key}": value for key, value in seen.items()}
    np.savez(out_path, **out)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
