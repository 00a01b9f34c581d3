# SPDX-License-Identifier: Apache-2.0
"""Trains a few steps on N logical CPU devices; run by `test_replicas.py`.

    python replica_run.py NUM_REPLICAS OUT.npz OBJECTIVE:OPTIMIZER ...

With TF_CONFIG, as one of several workers. For every objective it stores what `tracing.trace`
returns.
"""

import dataclasses
import os
import sys
from unittest import mock

import keras
import numpy as np

import data
import data_util
import model
import objective as objective_lib
import resnet
from contrastive.config.fields import fields_of
from contrastive.devices import strategies
from contrastive.evaluation import classifier
from contrastive.training import tracing
from contrastive.training.config import TrainConfig
from contrastive.training.state import TrainState

BATCH_SIZE = 16
_NUM_IMAGES = 40
_STEPS = 3


def small_encoder(architecture, **_):
    """Two convolutions: a ResNet's layers, a quarter of its tracing time."""
    images = keras.Input((None, None, architecture.channels))
    x = images
    for layer in range(2):
        x = keras.layers.Conv2D(8, 3, 2, "same", use_bias=False, name=f"initial_conv{layer}")(x)
        x = resnet.GlobalBatchNorm(name=f"initial_bn{layer}")(x)
        x = keras.layers.ReLU(name=f"initial_relu{layer}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="final_avg_pool")(x)
    return keras.Model(images, x)


def architecture(objective):
    """Returns a small architecture that suits an objective by its name."""
    cls = objective_lib.OBJECTIVES[objective]
    heads = {}
    if cls.defaults.get("proj_head_mode") == "mlp":
        heads |= {"proj_head_mode": "mlp", "proj_hidden_dim": (16,)}
    if cls.multi_view:
        heads |= {"predictor": True, "target_network": True}
    if objective == "siglip":
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


def make_objective(name, **hyperparameters):
    """Returns an objective with few negatives and a short queue."""
    cls = objective_lib.OBJECTIVES[name]
    defaults = {k: item.default for k, item in fields_of(cls).items()}
    values = {}
    if defaults.get("num_negatives"):
        values["num_negatives"] = 3
    if "queue_size" in defaults:
        values["queue_size"] = 2 * BATCH_SIZE
    return cls(**(values | hyperparameters))


def config(objective, optimizer):
    """Returns the configuration of a run of an objective by its name."""
    view = data_util.simclr_augmentation(16, strength=0.5)
    small = ()
    if objective_lib.OBJECTIVES[objective].defaults.get("num_small_views"):
        small = (data_util.simclr_augmentation(8, strength=0.5),)
    return TrainConfig(
        train_mode="pretrain",
        objective=make_objective(objective),
        views=(view, view, *small),
        num_large_views=2,
        target_decay=0.5,
        num_classes=16,
        batch_size=BATCH_SIZE,
        # In two parts where nothing else is particular.
        accumulate_steps=2 if objective == "js" else 1,
        num_examples=_NUM_IMAGES,
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


def labelled():
    """Returns which images have a label that may be used: every third."""
    mask = np.zeros(_NUM_IMAGES, bool)
    mask[::3] = True
    return mask


def few_photo_patches():
    """Real textures: in flat colours, whole areas cross a ReLU's kink."""
    patches = data.load("photo_patches", "train")
    source = patches.source
    return dataclasses.replace(
        patches,
        source=data.Arrays(source.images[:_NUM_IMAGES], source.labels[:_NUM_IMAGES]),
        num_examples=_NUM_IMAGES,
    )


def build_networks(objective, *, is_real=False):
    """Builds an objective's networks, on a small encoder or a real one."""
    keras.utils.set_random_seed(0)
    fields = architecture(objective)
    if not is_real:
        fields = dataclasses.replace(fields, encoder="small")
    with mock.patch.dict(model.ENCODERS, small=small_encoder):
        return model.build_networks(fields, rematerialize=is_real)


def predictions(networks, dataset, strategy):
    """What the classifier says of each image; the last batch is not full."""
    stream = strategy.distribute_datasets_from_function(
        lambda context: data.eval_stream(
            dataset,
            batch_size=BATCH_SIZE,
            num_replicas=context.num_replicas_in_sync,
        )
    )
    return classifier.evaluate(networks, stream, 32, strategy, None)[1]


def trace(case, networks, dataset, strategy):
    """Trains the steps of a case, and returns what they computed."""
    run = config(*case.split(":"))
    with strategy.scope():
        state = TrainState.create(run, networks, labelled=labelled())
    stream = strategy.distribute_datasets_from_function(
        lambda context: data.train_stream(
            dataset,
            batch_size=run.batch_size,
            seed=run.seed,
            views=run.views,
            num_replicas=context.num_replicas_in_sync,
            pipeline_index=context.input_pipeline_id,
            num_pipelines=context.num_input_pipelines,
        )
    )
    return tracing.trace(run, state, strategy, stream, _STEPS)


def main(num_replicas, out_path, cases):
    several = "multi_worker" if "TF_CONFIG" in os.environ else "mirrored"
    strategy = strategies.make_strategy(
        several if num_replicas > 1 else "one_device",
        cpu_replicas=num_replicas,
    )
    assert strategy.num_replicas_in_sync == num_replicas
    dataset, out = few_photo_patches(), {}
    for case in cases:
        # One with the real encoder, under either number of replicas.
        is_real = case == "simclr:momentum"
        with strategy.scope():
            networks = build_networks(case.split(":")[0], is_real=is_real)
        if is_real:
            out["predictions"] = predictions(networks, dataset, strategy)
        seen = trace(case, networks, dataset, strategy)
        out |= {f"{case}|{key}": value for key, value in seen.items()}
    np.savez(out_path, **out)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
