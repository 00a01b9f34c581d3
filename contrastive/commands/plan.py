# SPDX-License-Identifier: Apache-2.0
"""--dry_run: the plan of a training, in numbers."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable

from etils import epy

from contrastive import storage
from contrastive.commands import networks, sizes
from contrastive.config.completion import complete
from contrastive.config.resolve import Resolved
from contrastive.devices import selection
from contrastive.devices.tpu_compilation import find_slice
from contrastive.objectives.base import Training
from contrastive.sources import facts
from contrastive.training.config import TrainConfig, make_config

with epy.lazy_imports():
    import data
    from contrastive.training import checkpoints

# Numbers of cores that a plan lists if it is not known how many there will be.
_NUM_CORES = (2, 4, 8, 16, 32, 64, 128, 256)
_BYTES = 4  # of a float32 number


def prepare(resolved: Resolved) -> Callable[[], None]:
    """Prepares the plan of a training; returns the work, which prints it."""
    return functools.partial(print_plan, describe(resolved))


def print_plan(text: str) -> None:
    """Writes a plan to standard output."""
    sys.stdout.write(text)


def describe(resolved: Resolved) -> str:
    """Returns the plan of a training run.

    Raises:
        ValueError: if the flags contradict each other, or the data.
    """
    where, replicas = _devices(resolved)
    found = _data_facts(resolved)
    resolved = complete(resolved, found)
    config = make_config(resolved, found, replicas or 1)
    epochs = config.train_steps * config.batch_size / config.num_examples
    warmup = min(config.warmup_steps, config.train_steps)
    lines = {
        "training": f"{_what(resolved)}, {resolved['dataset']} "
        f"{found.split}, {config.num_examples:,} images"
        + "".join(f"; {note}" for note in found.notes),
        **_sweep(resolved),
        "devices": where,
        "steps": f"{config.train_steps:,}, of them {warmup:,} of warm-up; {epochs:.4g} epochs",
        "batch": f"{config.batch_size:,} images; a core: " + _per_core(config, replicas),
        "learning rate": f"{config.peak_learning_rate:.4g} at most, "
        f"{config.learning_rate_schedule}, {config.optimizer}, weight decay "
        f"{config.weight_decay:g}",
        "input": f"{_size(_input_bytes(config, found))} a step, of all cores",
        "checkpoints": _checkpoints(config, resolved),
        "sizes": _sizes(config, resolved, found.num_classes),
    }
    return "".join(f"{name + ':':15}{text}\n" for name, text in lines.items())


def _data_facts(resolved: Resolved) -> facts.Facts | data.Dataset:
    """Returns what is known of the training data without reading it."""
    name, split = resolved["dataset"], resolved["train_split"]
    directory, channels = resolved["data_dir"], resolved.known("channels")
    found = facts.known_facts(name, split, data_dir=directory, channels=channels)
    if found is not None:
        return found
    return data.outline(name, split, data_dir=directory, channels=channels)


def _what(resolved: Resolved) -> str:
    encoder = resolved["encoder"]
    if encoder == "resnet":
        encoder = f"ResNet-{resolved['resnet_depth']} x{resolved['width_multiplier']:g}" + (
            ", selective kernels" if resolved["sk_ratio"] else ""
        )
    if resolved["train_mode"] == "finetune":
        return f"classifier on {resolved['checkpoint'] or 'no checkpoint'}"
    return f"{resolved['objective']}, {encoder}"


def _sweep(resolved: Resolved) -> dict[str, str]:
    """Returns the trainings of a sweep; nothing without one."""
    rates = len(resolved["sweep_learning_rate"] or [0])
    epochs = resolved["sweep_train_epochs"] or (resolved["train_epochs"],)
    if rates * len(epochs) == 1:
        return {}
    held_out = resolved["held_out_examples"]
    return {
        "sweep": f"before it, {rates} learning rates, each for "
        f"{' and '.join(map(str, epochs))} epochs, without {held_out:,} "
        "held-out images; the rest of this plan is for the flags as they are"
    }


def _devices(resolved: Resolved) -> tuple[str, int | None]:
    """Returns the devices in words, and how many replicas; None: unknown."""
    if resolved["tpu_topology"]:
        slice_ = find_slice(resolved["tpu_topology"])
        count: int | None = slice_.num_replicas
        return f"{slice_.name}, {count} replicas", count
    num_gpus, cpu_replicas = selection.count_gpus(), resolved["cpu_replicas"]
    name = selection.choose_strategy(
        resolved["strategy"],
        use_tpu=resolved["use_tpu"],
        tpu_named=bool(resolved["master"] or resolved["tpu_name"]),
        num_gpus=num_gpus,
        cpu_replicas=cpu_replicas,
        must_exist=False,
    )
    count = selection.num_replicas(name, num_gpus=num_gpus, cpu_replicas=cpu_replicas)
    known = "as many cores as there are"
    if count:
        known = "1 replica" if count == 1 else f"{count} replicas"
    return f"{name}, {known}", count


def _per_core(config: TrainConfig, replicas: int | None) -> str:
    """Returns the number of images per core, or the possible ones."""
    parts = config.accumulate_steps
    more = f", in {parts} parts" if parts > 1 else ""
    if replicas:
        return f"{config.batch_size // replicas:,}{more}"
    possible = (n for n in _NUM_CORES if config.batch_size % (n * parts) == 0)
    return ", ".join(f"{config.batch_size // n:,} with {n}" for n in possible) + more


def _num_checkpoints(config: TrainConfig) -> int:
    """Returns how many are written; as the steps say, not the minutes."""
    return math.ceil(config.train_steps / config.checkpoint_steps)


def _checkpoints(config: TrainConfig, resolved: Resolved) -> str:
    directory = resolved["model_dir"]
    every = f"{_num_checkpoints(config):,}, every {config.checkpoint_steps:,} steps"
    if config.checkpoint_minutes:
        every = f"every {config.checkpoint_minutes:g} minutes"
    kept = f"{every}, the last {config.keep_checkpoint_max} kept, in {directory}; "
    reason = storage.why_unreachable(directory)
    if reason:
        return f"{kept}it is unknown whether there is a checkpoint: {reason}"
    found = storage.latest_checkpoint(directory)
    if not found:
        return f"{kept}none is there yet"
    step = checkpoints.checkpoint_step(found)
    return f"{kept}resumes from step {step:,}"


def _input_bytes(config: TrainConfig, found: facts.Facts | data.Dataset) -> int:
    """Returns the bytes of images that travel to the devices in a step."""
    if not found.is_encoded and found.image_size:
        pixels = math.prod(found.image_size)
    else:
        pixels = sum(view.size**2 for view in config.views)
    return config.batch_size * pixels * found.channels


def _sizes(config: TrainConfig, resolved: Resolved, num_classes: int) -> str:
    """Returns the sizes of the networks and of a checkpoint, in words."""
    start = resolved["checkpoint"]
    files = (start, f"{start}.index")  # directory or file; prefix of files
    if start and not any(map(storage.is_reachable, files)):
        return f"known once {start} is there: it says what the encoder is"
    found = state_bytes(config, resolved, num_classes)
    if found is None:
        return f"known once {resolved['encoder']} has been built"
    of_networks, of_state = found
    kept = min(config.keep_checkpoint_max, _num_checkpoints(config))
    return (
        f"networks {_size(of_networks)}; with the optimizers, on every core "
        f"and in every checkpoint, {_size(of_state)}; checkpoints kept, "
        f"{_size(kept * of_state)}"
    )


def state_bytes(
    config: TrainConfig, resolved: Resolved, num_classes: int
) -> tuple[int, int] | None:
    """Returns the bytes of the networks, and of all that is saved.

    None if the size of the encoder is known only once it has been built.
    """
    architecture = networks.make_architecture(resolved, num_classes)
    by_network = sizes.network_sizes(architecture)
    trained = sizes.trained_numbers(
        architecture,
        finetune=not config.pretrains,
        fine_tune_after_block=config.fine_tune_after_block,
    )
    if by_network is None or trained is None:
        return None
    of_networks = _BYTES * sum(sum(part) for part in by_network.values())
    names = (
        config.optimizer,
        "momentum" if config.optimizer == "lars" else config.optimizer,
    )
    optimizers = _BYTES * sum(
        sizes.optimizer_numbers(name, count, momentum=config.momentum)
        for name, count in zip(names, trained, strict=True)
    )
    of_objective = 0
    if config.pretrains:
        training = Training(
            batch_size=config.batch_size,
            num_examples=config.num_examples,
            num_classes=num_classes,
            labelled=None,
            num_large_views=config.num_large_views,
            embedding_dim=sizes.embedding_dim(architecture),
        )
        of_objective = config.objective.state_bytes(training)
    total = of_networks + of_objective
    return total, total + optimizers


def _size(count: float) -> str:
    """Returns a number of bytes in words."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"
