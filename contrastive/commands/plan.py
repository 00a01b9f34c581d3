# SPDX-License-Identifier: Apache-2.0
"""What a training would be, in numbers, before anything is computed."""

import math

import keras
import tensorflow as tf

from contrastive import storage
from contrastive.commands import experiment
from contrastive.devices import devices, tpu_slices
from contrastive.training import trainer
from contrastive.weights import checkpoint as checkpoint_lib

# Where it is not known how many cores there will be.
_NUM_CORES = (2, 4, 8, 16, 32, 64, 128, 256)


def describe(run: experiment.Run) -> str:
    """Returns the plan of a training run, made with `dry_run`.

    Raises:
        ValueError: if the flags contradict each other, or the data.
    """
    settings = run.settings
    where, replicas = _devices(settings)
    config = experiment.make_train_config(
        settings, run.train_data, replicas or 1
    )
    lines = {
        "training": f"{_what(settings)}, {settings.dataset} "
        f"{run.train_data.split}, {config.num_examples:,} images"
        + "".join(f"; {note}" for note in run.train_data.notes),
        **_sweep(settings),
        "devices": where,
        "steps": f"{config.train_steps:,}, of them "
        f"{min(config.warmup_steps, config.train_steps):,} of warm-up; "
        f"{config.train_steps * config.batch_size / config.num_examples:.4g} "
        "epochs",
        "batch": f"{config.batch_size:,} images; a core: "
        + _per_core(config, replicas),
        "learning rate": f"{config.peak_learning_rate:.4g} at most, "
        f"{config.learning_rate_schedule}, {config.optimizer}, weight decay "
        f"{config.weight_decay:g}",
        "input": f"{_size(_input_bytes(config, run))} a step, of all cores",
        "checkpoints": _checkpoints(config, settings),
    }
    bytes_of = _state_bytes(config, run)
    if bytes_of is None:
        lines["sizes"] = (
            f"known once {settings.checkpoint} is there: it says what the "
            "encoder is"
        )
    else:
        networks, state = bytes_of
        kept = min(config.keep_checkpoint_max, _num_checkpoints(config))
        lines["sizes"] = (
            f"networks {_size(networks)}; with the optimizers, on every core "
            f"and in every checkpoint, {_size(state)}; checkpoints kept, "
            f"{_size(kept * state)}"
        )
    return "".join(f"{name + ':':15}{text}\n" for name, text in lines.items())


def _what(settings: experiment.Settings) -> str:
    encoder = settings.encoder
    if encoder == "resnet":
        encoder = (
            f"ResNet-{settings.resnet_depth} x{settings.width_multiplier:g}"
            + (", selective kernels" if settings.sk_ratio else "")
        )
    if settings.train_mode == "finetune":
        return f"classifier on {settings.checkpoint or 'no checkpoint'}"
    return f"{settings.objective}, {encoder}"


def _sweep(settings: experiment.Settings) -> dict[str, str]:
    """Returns what a sweep trains before; nothing without one."""
    rates = len(settings.sweep_learning_rate or [0])
    epochs = settings.sweep_train_epochs or (settings.train_epochs,)
    if rates * len(epochs) == 1:
        return {}
    held_out = settings.held_out_examples
    return {
        "sweep": f"before it, {rates} learning rates, each for "
        f"{' and '.join(map(str, epochs))} epochs, without {held_out:,} "
        "held-out images; what follows is of the flags as they are"
    }


def _devices(settings: experiment.Settings) -> tuple[str, int | None]:
    """Returns what they are, and how many replicas; None: who knows."""
    if settings.tpu_topology:
        slice_ = tpu_slices.find_slice(settings.tpu_topology)
        count: int | None = slice_.num_replicas
        return f"{slice_.name}, {count} replicas", count
    count = devices.num_replicas(settings.strategy, settings.cpu_replicas)
    known = "as many cores as there are"
    if count:
        known = "1 replica" if count == 1 else f"{count} replicas"
    return f"{settings.strategy}, {known}", count


def _per_core(config: trainer.TrainConfig, replicas: int | None) -> str:
    """Returns how many images a core has, or would have, of a batch."""
    parts = config.accumulate_steps
    more = f", in {parts} parts" if parts > 1 else ""
    if replicas:
        return f"{config.batch_size // replicas:,}" + more
    return (
        ", ".join(
            f"{config.batch_size // cores:,} with {cores}"
            for cores in _NUM_CORES
            if config.batch_size % (cores * parts) == 0
        )
        + more
    )


def _num_checkpoints(config: trainer.TrainConfig) -> int:
    """Returns how many are written; as the steps say, not the minutes."""
    return math.ceil(config.train_steps / config.checkpoint_steps)


def _checkpoints(
    config: trainer.TrainConfig, settings: experiment.Settings
) -> str:
    every = (
        f"every {config.checkpoint_minutes:g} minutes"
        if config.checkpoint_minutes
        else f"{_num_checkpoints(config):,}, every "
        f"{config.checkpoint_steps:,} steps"
    )
    kept = (
        f"{every}, the last {config.keep_checkpoint_max} kept, in "
        f"{settings.model_dir}; "
    )
    reason = storage.why_unreachable(settings.model_dir)
    if reason:
        return f"{kept}it is unknown whether there is a checkpoint: {reason}"
    found = tf.train.latest_checkpoint(settings.model_dir)
    if not found:
        return f"{kept}none is there yet"
    return f"{kept}goes on from step {checkpoint_lib.checkpoint_step(found):,}"


def _input_bytes(config: trainer.TrainConfig, run: experiment.Run) -> int:
    """Returns the bytes of images that travel to the devices in a step."""
    data, channels = run.train_data, run.train_data.channels
    if not data.is_encoded and data.image_size:
        pixels = math.prod(data.image_size)
    else:
        pixels = sum(view.size**2 for view in config.views)
    return config.batch_size * pixels * channels


def _state_bytes(
    config: trainer.TrainConfig, run: experiment.Run
) -> tuple[int, int] | None:
    """Returns the bytes of the networks, and of all that is saved."""
    start = run.settings.checkpoint
    files = (start, f"{start}.index")  # directory or file; prefix of files
    if start and not any(map(storage.is_reachable, files)):
        return None
    trainer.freeze(config, run.networks)
    optimizers = trainer.build_optimizers(config, run.networks)
    networks = sum(
        _bytes(part.variables) for part in run.networks.models().values()
    )
    return networks, networks + sum(
        _bytes(optimizer.variables) for optimizer in optimizers if optimizer
    )


def _bytes(variables: list[keras.Variable]) -> int:
    return sum(
        math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables
    )


def _size(count: float) -> str:
    """Returns a number of bytes in words."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"
