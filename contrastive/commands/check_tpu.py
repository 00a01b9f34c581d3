# SPDX-License-Identifier: Apache-2.0
"""Whether a run's training step fits a Cloud TPU slice, found out without one.

The step is lowered by TensorFlow, on this machine's CPU, as the program that
each of N replicas runs, collectives between them included; `tpu_compiler.py`
has it compiled by libtpu, the compiler of the TPU itself. Neither is executed.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf
from absl import logging
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

import data
import data_util
from contrastive.commands import experiment
from contrastive.config import methods
from contrastive.devices import tpu_compiler
from contrastive.devices.tpu_slices import Chip, Slice
from contrastive.training import trainer

_GIB = 1 << 30
# Below this share of the memory, the compiler had no reason to recompute.
_ROOMY = 0.75
# Recomputation is measured against a batch with one in so many of the images.
_SMALL = 8
# How exactly the largest batch is found, relative to it.
_RESOLUTION = 1 / 16
_MOST_ROWS = 1 << 16  # a replica and step; nobody asks for more
_RECOMPUTED = 0.01  # less is rounding
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_NOT_COVERED = """

Compiled by {compiler}, not executed; peaks of chips by Google.
Not covered: data and hosts, batches waiting in HBM (leave room for two),
checkpoints and evaluation, time a step takes, TPUStrategy's own way into the
compiler and the version that it has, whether such a slice is free.
"""


def require_compiler() -> None:
    """Raises a ValueError, unless the compiler is installed."""
    missing = [
        name
        for name in tpu_compiler.PACKAGES
        if not importlib.util.find_spec(name)
    ]
    how = "pip install -r requirements/check-tpu.txt"
    if missing:
        raise ValueError(
            f"--mode=check_tpu needs {' and '.join(missing)}: {how}"
        )
    found = importlib.metadata.version("jax")
    if found != tpu_compiler.JAX_VERSION:
        raise ValueError(
            f"--mode=check_tpu needs jax {tpu_compiler.JAX_VERSION}, not "
            f"{found}: {how}"
        )


class _Replica(tf.distribute.ReplicaContext):
    """One of N replicas, in a program that is lowered to run on all of them.

    Collectives are those of XLA, and a gathered tensor is the sum of tensors
    that are zero but in one replica's rows, as TPUStrategy has it (TensorFlow
    2.20, tpu_strategy.py).
    """

    def __init__(self, strategy: tf.distribute.Strategy, count: int) -> None:
        super().__init__(strategy, replica_id_in_sync_group=0)
        self._count = count

    @property
    def num_replicas_in_sync(self) -> int:
        return self._count

    @property
    def replica_id_in_sync_group(self) -> tf.Tensor:
        return gen_xla_ops.xla_replica_id()

    def all_reduce(
        self,
        reduce_op: tf.distribute.ReduceOp | str,
        value: Any,
        options: Any = None,
    ) -> Any:
        del options
        mean = tf.distribute.ReduceOp(reduce_op) == tf.distribute.ReduceOp.MEAN
        total = tf.nest.map_structure(self._sum, value)
        if not mean:
            return total
        return tf.nest.map_structure(lambda x: x / self._count, total)

    def _sum(self, x: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def total(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            reduced = gen_xla_ops.xla_all_reduce(
                x, [list(range(self._count))], "Add", "CrossReplica"
            )
            return reduced, self._sum

        return total(x)

    def all_gather(
        self, value: tf.Tensor, axis: int, options: Any = None
    ) -> tf.Tensor:
        if value.dtype == tf.int64:  # there is no sum of them
            halves = self.all_gather(tf.bitcast(value, tf.int32), axis, options)
            return tf.bitcast(halves, tf.int64)
        shape = value.shape.as_list()
        own = tf.one_hot(
            self.replica_id_in_sync_group, self._count, dtype=value.dtype
        )
        own = tf.reshape(own, [-1] + [1] * (len(shape) - axis))
        rows = tf.expand_dims(value, axis) * own
        shape[axis] *= self._count
        return tf.reshape(
            self.all_reduce(tf.distribute.ReduceOp.SUM, rows), shape
        )


def batch_spec(
    dataset: data.Dataset,
    rows: int,
    views: tuple[data_util.Augmentation, ...],
) -> dict[str, Any]:
    """Returns what `data.train_stream` yields, as `tf.TensorSpec`s.

    Args:
        dataset: whose images there need not be.
        rows: images of a batch of one replica.
        views: as there.
    """
    spec = {
        "id": tf.TensorSpec([rows], tf.int64),
        "epoch": tf.TensorSpec([rows], tf.int32),
        "label": tf.TensorSpec([rows], tf.int32),
        "weight": tf.TensorSpec([rows], tf.float32),
    }

    def image(*shape: int) -> tf.TensorSpec:
        return tf.TensorSpec([rows, *shape], tf.uint8)

    if dataset.image_size and not dataset.is_encoded:
        spec["image"] = image(*dataset.image_size, dataset.channels)
        if any(view.mask_probability for view in views):
            spec["mask"] = image(*dataset.image_size)
        return spec
    sizes = [view.size for view in views]
    crops = tuple(image(size, size, dataset.channels) for size in sizes)
    if len(set(sizes)) == 1:
        crops = image(len(sizes), sizes[0], sizes[0], dataset.channels)
    return spec | {"crops": crops}


def replica_program(
    step: trainer.Step,
    spec: dict[str, Any],
    strategy: tf.distribute.Strategy,
    num_replicas: int,
) -> tf.types.experimental.PolymorphicFunction:
    """Returns the program of one of several replicas, not traced yet.

    Args:
        step: of `trainer.build_step`.
        spec: of its batch, of one replica.
        strategy: of one device, in whose scope the networks were made.
        num_replicas: how many there are.

    Returns:
        A function of the batch's tensors, in `tf.nest.flatten`'s order, that
        returns the metrics, float32 `[m]`.
    """

    @tf.autograph.experimental.do_not_convert
    def program(*tensors: tf.Tensor) -> tf.Tensor:
        with _Replica(strategy, num_replicas):
            metrics = step(tf.nest.pack_sequence_as(spec, tensors))
            return tf.stack([tf.cast(v, tf.float32) for v in metrics.values()])

    return tf.function(program, jit_compile=True)


def lower(
    program: tf.types.experimental.PolymorphicFunction,
    spec: dict[str, Any],
    strategy: tf.distribute.Strategy,
) -> bytes:
    """Returns a `replica_program` as a HloModuleProto, as it was written.

    Its parameters are the batch's tensors and what the function captured.
    """
    with strategy.scope():
        ir = program.experimental_get_compiler_ir(*tf.nest.flatten(spec))
        return ir(stage="hlo_serialized")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler said; of one replica and step.

    Attributes:
        compiler: its versions; "" where it did not live to say.
        error: why it did not compile; or "".
        crashed: whether that is because the compiler did not come to its end.
        arguments: bytes of weights, optimizer and batch.
        temporaries: bytes of activations and all else.
        peak: bytes in use at a time, both together.
        flops: as compiled.
        written_flops: of the program before the compiler changed it.
        bytes_accessed: read and written by all operations.
        collectives: `count` and `bytes` of each kind.
    """

    compiler: str = ""
    error: str = ""
    crashed: bool = False
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    flops: float = 0.0
    written_flops: float = 0.0
    bytes_accessed: float = 0.0
    collectives: Mapping[str, Mapping[str, int]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def fits(self) -> bool:
        """Whether it compiled."""
        return not self.error

    @property
    def out_of_memory(self) -> bool:
        """Whether it did not compile because it does not fit."""
        return _OUT_OF_MEMORY in self.error


def compile_for(where: Slice, module: bytes) -> Compiled:
    """Has what `lower` returned compiled, in another process."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = (pathlib.Path(folder, n) for n in ("in", "out"))
        source.write_bytes(module)
        process = subprocess.run(
            [
                sys.executable,
                tpu_compiler.__file__,
                source,
                result,
                json.dumps(where.request()),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if process.returncode == 0:
            return Compiled(**json.loads(result.read_text()))
    how = f"exit code {process.returncode}"
    if process.returncode < 0:
        how = signal.Signals(-process.returncode).name
    last = "\n".join(process.stderr.strip().splitlines()[-5:])
    return Compiled(
        error=f"The compiler ended with {how}:\n{last}", crashed=True
    )


def recomputation(compiled: Compiled, small: Compiled) -> float:
    """Returns the share of operations that the compiler computes twice.

    Near the limit it computes again what it cannot keep. Both counts are
    relative to those of the program as it was written, where the loss, which
    grows with the square of the batch, is included.

    Args:
        compiled: a program that fits.
        small: the same of a smaller batch, for which memory is plenty.

    Returns:
        Additional operations, relative to those without; about 0 for none.
    """
    as_it_is = compiled.flops / compiled.written_flops
    return as_it_is / (small.flops / small.written_flops) - 1


def roofline(compiled: Compiled, chip: Chip) -> tuple[float, float]:
    """Returns seconds a step, by operations and by bytes, at a chip's peak."""
    return (
        compiled.flops / (chip.peak * 1e12 / chip.replicas),
        compiled.bytes_accessed / (chip.bandwidth * 1e9 / chip.replicas),
    )


def largest(fits: Callable[[int], bool], start: int, unit: int) -> int:
    """Returns the largest number for which `fits`, to a sixteenth; or 0.

    Args:
        fits: true up to some number, and false beyond.
        start: where to begin, > 0.
        unit: only its multiples are tried.
    """
    low, high = 0, _MOST_ROWS // unit  # in units; what fits, what does not
    middle = max(1, start // unit)
    while high - low > max(1, int(low * _RESOLUTION)):
        if fits(middle * unit):
            low = middle
        else:
            high = middle
        # First up by doubling; what does not fit is close.
        middle = (low + high) // 2
        if low and high == _MOST_ROWS // unit:
            middle = min(2 * low, middle)
    return low * unit


def train_config(run: experiment.Run, where: Slice) -> trainer.TrainConfig:
    """Returns what is trained on a slice.

    Raises:
        ValueError: if the batch does not divide among its replicas.
    """
    return experiment.make_train_config(
        run.settings,
        run.train_data,
        where.num_replicas,
        labelled_ids=run.labelled_ids,
    )


def compile_step(run: experiment.Run, where: Slice, rows: int) -> Compiled:
    """Returns what the compiler says of so many images a replica."""
    started = time.monotonic()
    run = run.with_batch(rows * where.num_replicas)
    config = train_config(run, where)
    trainer.freeze(config, run.networks)
    with run.strategy.scope():
        optimizers = trainer.build_optimizers(config, run.networks)
    step = trainer.build_step(config, run.networks, optimizers)
    spec = batch_spec(run.train_data, rows, config.views)
    program = replica_program(step, spec, run.strategy, where.num_replicas)
    try:
        module = lower(program, spec, run.strategy)
    except (ValueError, tf.errors.OpError) as error:
        # An operation that XLA does not have, for instance.
        return Compiled(error=f"TensorFlow does not lower it: {error}")
    lowered = time.monotonic()
    compiled = compile_for(where, module)
    logging.info(
        "%d images a replica: lowered in %.0f s, %s in %.0f s.",
        rows,
        lowered - started,
        "compiled" if compiled.fits else "refused",
        time.monotonic() - lowered,
    )
    return compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found out about a run.

    Attributes:
        where: the slice.
        rows: images a replica and step.
        compiled: the step.
        small: the step with an eighth of the images; None: memory is plenty.
        largest: most images a replica that fit; None: not looked for.
        advice: flags that make the step need less memory, and how.
    """

    where: Slice
    rows: int
    compiled: Compiled
    small: Compiled | None = None
    largest: int | None = None
    advice: tuple[str, ...] = ()


def check(
    run: experiment.Run, where: Slice, *, find_batch: bool = False
) -> Findings:
    """Has a run's step compiled for a slice; takes minutes for a ResNet-50.

    Args:
        run: whose networks are made in a strategy of one device.
        where: the slice.
        find_batch: whether to look for the largest batch.
    """
    settings, count = run.settings, where.num_replicas
    rows, parts = settings.train_batch_size // count, settings.accumulate_steps
    compiled = functools.cache(functools.partial(compile_step, run, where))
    asked, small, most = compiled(rows), None, None
    if asked.fits and asked.peak > _ROOMY * where.chip.memory * _GIB:
        few = rows // _SMALL // parts * parts
        if few and compiled(few).fits:
            small = compiled(few)

    def fits(rows: int) -> bool:
        found = compiled(rows)
        if not (found.fits or found.out_of_memory):
            raise ValueError(f"{rows} images a replica: {found.error}")
        return found.fits

    if find_batch and (asked.fits or asked.out_of_memory):
        # The compiler pads batches to multiples of 8.
        unit = parts * 8 if rows >= parts * 8 else parts
        try:
            most = largest(fits, rows, unit)
        except ValueError as error:  # whatever it is, it is not the memory
            logging.warning("The largest batch is not known: %s", error)
    return Findings(
        where=where,
        rows=rows,
        compiled=asked,
        small=small,
        largest=most,
        advice=tuple(_advice(settings)),
    )


def _advice(settings: experiment.Settings) -> Iterator[str]:
    """Yields what would make the step need less memory."""
    if not settings.mixed_precision:
        yield "--mixed_precision: activations of half the size"
    is_twice = methods.METHODS[settings.objective].has_gradient_penalty
    if settings.encoder == "resnet" and not (settings.remat or is_twice):
        yield "--remat: blocks are computed again for gradients"
    if settings.train_mode == "pretrain":
        more = 2 * settings.accumulate_steps
        yield f"--accumulate_steps={more}: the same batch, in smaller parts"
    yield "a smaller --train_batch_size, or a slice of more chips"


def report(findings: Findings) -> str:
    """Returns the findings as text, of 80 columns where that is possible."""
    where, compiled = findings.where, findings.compiled
    chip, count = where.chip, where.num_replicas
    each = "chip" if chip.replicas == 1 else "core"
    lines = [
        f"{where.name} ({chip.name}:{where.topology}): {count} replicas, one a "
        f"{each}, of {findings.rows} images; {findings.rows * count:,} a step",
        "",
    ]

    def add(title: str, *texts: str) -> None:
        for text in texts:
            lines.append(f"{title:<15}{text}")
            title = ""

    if compiled.fits:
        add("compiles", "yes")
        add("memory", *_memory_lines(findings))
        add("a step", *_roofline_lines(findings))
        add(
            "collectives",
            *(
                f"{found['count']} {kind}, {_amount(found['bytes'], 'B')}"
                for kind, found in compiled.collectives.items()
            ),
        )
    else:
        verdict = "not known" if compiled.crashed else "no"
        add("compiles", verdict, *compiled.error.split("\n\n")[0].splitlines())
        add("memory", f"{chip.memory:.2f} GiB a replica, by the compiler")
        if compiled.out_of_memory:
            add("what helps", *findings.advice)
    if findings.largest is not None:
        add(
            "largest batch",
            f"{findings.largest} images a replica, "
            f"{findings.largest * count:,} a step"
            if findings.largest
            else "none that fits",
        )
    return "\n".join(lines) + _NOT_COVERED.format(
        compiler=compiled.compiler or "libtpu"
    )


def _amount(value: float, unit: str) -> str:
    """Returns a number > 0 with a prefix of its unit."""
    power = min(max(math.floor(math.log10(value) / 3), -2), 4)
    prefix = ("µ", "m", "", "k", "M", "G", "T")[power + 2]
    return f"{value / 1000**power:,.1f} {prefix}{unit}"


def _memory_lines(findings: Findings) -> list[str]:
    compiled, limit = findings.compiled, findings.where.chip.memory
    lines = [
        f"{compiled.peak / _GIB:.2f} of {limit:.2f} GiB a replica; arguments "
        f"{compiled.arguments / _GIB:.2f}, temporaries "
        f"{compiled.temporaries / _GIB:.2f}"
    ]
    if findings.small:
        share = recomputation(compiled, findings.small)
        lines.append(
            f"the compiler added {share:+.1%} of operations, to fit: what is "
            "left is no headroom"
            if share > _RECOMPUTED
            else "nothing is computed again to fit"
        )
    return lines


def _roofline_lines(findings: Findings) -> list[str]:
    compiled, chip = findings.compiled, findings.where.chip
    by_flops, by_bytes = roofline(compiled, chip)
    slowest = max(by_flops, by_bytes)
    images = findings.rows * findings.where.num_replicas / slowest
    return [
        f"{_amount(compiled.flops, 'FLOP')} a replica: "
        f"{_amount(by_flops, 's')} at {chip.peak:g} TFLOP/s a chip",
        f"{_amount(compiled.bytes_accessed, 'B')} moved: "
        f"{_amount(by_bytes, 's')} at {chip.bandwidth:g} GB/s a chip",
        f"{images:,.0f} images/s if nothing else took time; no forecast",
    ]
