# SPDX-License-Identifier: Apache-2.0
"""Trains a few steps on N logical CPU devices; run by `test_replicas.py`.

    python replica_run.py NUM_REPLICAS OUT.npz OBJECTIVE:OPTIMIZER ...

Of every objective it stores the metrics of each step, and all weights and
BatchNorm statistics before and after the first step (with momentum, the
gradient) and after the last.
"""

import dataclasses
import functools
import sys

import keras
import numpy as np

import data
import data_util
import devices
import methods
import model
import trainer

_BATCH_SIZE = 16
_STEPS = 3


def architecture():
    return model.Architecture(
        resnet_depth=10,
        width_multiplier=0.125,
        stem="cifar",
        padding="fixed",
        sk_ratio=0.0,
        se_ratio=0.0,
        zero_init_residual=False,
        global_bn=True,
        batch_norm_decay=0.9,
        channels=3,
        image_mean=(),
        image_std=(),
        proj_head_mode="nonlinear",
        proj_out_dim=8,
        num_proj_layers=2,
        ft_proj_selector=0,
        num_classes=16,
        zero_init_logits_layer=False,
    )


def config(objective, optimizer):
    method = methods.METHODS[objective]
    values = {"rpc_marginal_norm": "global", **method.defaults}
    view = data_util.simclr_augmentation(16, strength=0.5)
    return trainer.TrainConfig(
        train_mode="pretrain",
        objective=objective,
        hyperparameters={
            argument: values[flag]
            for argument, flag in method.hyperparameters.items()
        },
        # Its default is of a size that a first step without LARS explodes.
        gradient_penalty_weight=values.get("gradient_penalty_weight", 0.0)
        / 1000,
        lineareval_while_pretraining=True,
        views=(view, view),
        batch_size=_BATCH_SIZE,
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


def main(num_replicas, path, cases):
    strategy = devices.make_strategy(use_tpu=False, cpu_replicas=num_replicas)
    dataset, out = few_photo_patches(), {}
    keras.utils.set_random_seed(0)
    with strategy.scope():
        networks = model.build_networks(architecture())
    variables = [v for m in networks.models().values() for v in m.variables]
    start = [v.numpy() for v in variables]
    for case in cases:
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
            out[f"{case}|{variable.path}|0"] = value
        run = config(*case.split(":"))
        with strategy.scope():
            optimizers = trainer.build_optimizers(run, networks)
        stream = strategy.distribute_datasets_from_function(
            lambda context, run=run: functools.partial(
                data.train_stream,
                dataset,
                batch_size=run.batch_size,
                seed=run.seed,
                views=run.views,
            )(num_replicas=context.num_replicas_in_sync)
        )
        step = trainer.build_step(run, networks, optimizers)
        loop = trainer.CompiledLoop(strategy, step, run.jit_compile)
        iterator = iter(stream)
        for done in range(1, _STEPS + 1):
            out[f"{case}|metrics|{done}"] = loop(iterator, 1)[0]
            if done in (1, _STEPS):
                for variable in variables:
                    out[f"{case}|{variable.path}|{done}"] = variable.numpy()
        out[f"{case}|names"] = np.array(loop.names)
        # Every replica must hold the same copy of every variable.
        for variable in variables:
            copies = [c.numpy() for c in strategy.experimental_local_results(
                variable.value
            )]  # fmt: skip
            for copy in copies[1:]:
                np.testing.assert_array_equal(copy, copies[0], variable.path)
    np.savez(path, **out)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
