# SPDX-License-Identifier: Apache-2.0
"""--mode=check_tpu: finds out without a TPU whether a step fits a slice.

TensorFlow lowers the step on this machine's CPU as the program that each of N replicas runs;
libtpu, the compiler of the TPU itself, compiles it. Neither executes it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator

from absl import logging
from etils import epy

from contrastive.commands import inherit, networks
from contrastive.commands.base import Command
from contrastive.config import schema
from contrastive.config.completion import complete
from contrastive.config.resolve import Resolved
from contrastive.devices import tpu_compilation
from contrastive.devices.tpu_compilation import Slice, find_slice
from contrastive.training.config import TrainConfig, make_config

with epy.lazy_imports():
    import numpy as np
    import tensorflow as tf

    import data
    from contrastive.commands import session as session_lib
    from contrastive.devices import lowering
    from contrastive.training import loop, state as state_lib

_GIB = 1 << 30
EXIT_NOT_FITTING = 4
_ROOMY = 0.75  # share of memory below which the compiler need not recompute
_SMALL = 8  # recomputation is measured against a batch of one in so many images
_RESOLUTION = 1 / 16  # of the largest batch, relative to it
_MOST_ROWS = 1 << 16  # per replica and step
_RECOMPUTED = 0.01  # less is rounding
_NOT_COVERED = """

Compiled by {compiler}, not executed; peaks of chips by Google.
Not covered: data and hosts, batches waiting in HBM (leave room for two),
checkpoints and evaluation, time a step takes, TPUStrategy's own way into the
compiler and the version that it has, whether such a slice is free.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepToCheck:
    """A training step on a slice, without its data.

    The session is on the host's CPU, its values are not completed; the dataset is an outline of the
    training split.
    """

    session: session_lib.Session
    dataset: data.Dataset
    where: Slice

    def config(self, rows: int) -> TrainConfig:
        """Returns the configuration for a number of images per replica.

        Raises:
            ValueError: if the batch does not suit the objective.
        """
        count = self.where.num_replicas
        resolved = self.session.resolved.replace("check", train_batch_size=rows * count)
        resolved = complete(resolved, self.dataset)
        return make_config(resolved, self.dataset, count)


def prepare(resolved: Resolved) -> Callable[[], None]:
    """Prepares the compilation of the training step; returns the work."""
    if not resolved["tpu_topology"]:
        raise ValueError("--mode=check_tpu needs --tpu_topology, such as v5litepod-32.")
    where = find_slice(resolved["tpu_topology"])
    tpu_compilation.require_compiler()
    step = open_step(resolved, where)

    def work() -> None:
        findings = check(step, find_batch=resolved["find_batch"])
        sys.stdout.write(report(findings))
        if findings.compiled.crashed:
            sys.exit(1)
        if not findings.compiled.fits:
            sys.exit(EXIT_NOT_FITTING)

    return work


def open_step(resolved: Resolved, where: Slice) -> StepToCheck:
    """Opens a session on the host and an outline of the data.

    Raises:
        ValueError: if the flags contradict each other, or the data.
    """
    dataset = data.outline(
        resolved["dataset"],
        resolved["train_split"],
        data_dir=resolved["data_dir"],
        channels=resolved.known("channels"),
    )
    session = session_lib.open_host(resolved)
    completed = complete(session.resolved, dataset)
    make_config(completed, dataset, where.num_replicas)  # before any compute
    session_lib.log_flags(completed)
    # The undivided values: the queue follows the batch that is tried.
    return StepToCheck(session=session, dataset=dataset, where=where)


def compile_step(step: StepToCheck, rows: int) -> tpu_compilation.Compiled:
    """Compiles the step for a number of images per replica."""
    started = time.monotonic()
    config, strategy = step.config(rows), step.session.strategy
    resolved = complete(step.session.resolved, step.dataset)
    architecture = networks.make_architecture(resolved, step.dataset.num_classes)
    built = networks.build_networks(resolved, architecture, strategy)
    chooses_labels = resolved["labelled_batch_share"] or any(
        resolved[name] is not None
        for name in ("labelled_fraction", "labels_per_class", "labelled_file")
    )
    # Which images have labels does not matter here.
    labelled = np.arange(config.num_examples) == 0 if chooses_labels else None
    with strategy.scope():
        state = state_lib.TrainState.create(config, built, labelled=labelled)
    spec = lowering.batch_spec(step.dataset, rows, config.views)
    program = lowering.replica_program(
        loop.build_step(config, state), spec, strategy, step.where.num_replicas
    )
    try:
        module = lowering.lower(program, spec, strategy)
    except (ValueError, tf.errors.OpError) as error:
        # An operation that XLA does not have, for instance.
        return tpu_compilation.Compiled(error=f"TensorFlow does not lower it: {error}")
    lowered = time.monotonic()
    compiled = tpu_compilation.compile_for(step.where, module)
    logging.info(
        "%d images a replica: lowered in %.0f s, %s in %.0f s.",
        rows,
        lowered - started,
        "compiled" if compiled.fits else "refused",
        time.monotonic() - lowered,
    )
    return compiled


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a check.

    Attributes:
        where: the slice.
        rows: images per replica and step.
        compiled: the step.
        small: the step with an eighth of the images; None: memory is plenty.
        largest: most images a replica that fit; None: not looked for.
        advice: flags that make the step need less memory, and how.
    """

    where: Slice
    rows: int
    compiled: tpu_compilation.Compiled
    small: tpu_compilation.Compiled | None = None
    largest: int | None = None
    advice: tuple[str, ...] = ()


def check(step: StepToCheck, *, find_batch: bool = False) -> Findings:
    """Compiles a step for a slice; takes minutes for a ResNet-50.

    `find_batch` says whether to search for the largest batch.
    """
    resolved, where = step.session.resolved, step.where
    rows = resolved["train_batch_size"] // where.num_replicas
    parts = resolved["accumulate_steps"]
    compiled = functools.cache(functools.partial(compile_step, step))
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
        except ValueError as error:  # not for lack of memory
            logging.warning("The largest batch is not known: %s", error)
    return Findings(
        where=where,
        rows=rows,
        compiled=asked,
        small=small,
        largest=most,
        advice=tuple(_advice(resolved)),
    )


def _advice(resolved: Resolved) -> Iterator[str]:
    """Yields flags that make the step need less memory."""
    pretrains = resolved["train_mode"] == "pretrain"
    if not resolved["mixed_precision"]:
        yield "--mixed_precision: activations of half the size"
    is_twice = pretrains and resolved.objective_type.differentiates_twice
    if resolved["encoder"] == "resnet" and not (resolved["remat"] or is_twice):
        yield "--remat: blocks are computed again for gradients"
    if pretrains:
        more = 2 * resolved["accumulate_steps"]
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
        counts = compiled.collectives.items()
        add(
            "collectives",
            *(f"{found['count']} {kind}, {_amount(found['bytes'], 'B')}" for kind, found in counts),
        )
    else:
        verdict = "not known" if compiled.crashed else "no"
        add("compiles", verdict, *compiled.error.split("\n\n")[0].splitlines())
        add("memory", f"{chip.memory:.2f} GiB a replica, by the compiler")
        if compiled.out_of_memory:
            add("what helps", *findings.advice)
    if findings.largest is not None:
        most = findings.largest
        text = f"{most} images a replica, {most * count:,} a step"
        add("largest batch", text if most else "none that fits")
    return "\n".join(lines) + _NOT_COVERED.format(compiler=compiled.compiler or "libtpu")


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
        share = tpu_compilation.recomputation(compiled, findings.small)
        lines.append(
            f"the compiler added {share:+.1%} of operations, to fit: what is left is no headroom"
            if share > _RECOMPUTED
            else "nothing is computed again to fit"
        )
    return lines


def _roofline_lines(findings: Findings) -> list[str]:
    compiled, chip = findings.compiled, findings.where.chip
    by_flops, by_bytes = tpu_compilation.roofline(compiled, chip)
    slowest = max(by_flops, by_bytes)
    images = findings.rows * findings.where.num_replicas / slowest
    return [
        f"{_amount(compiled.flops, 'FLOP')} a replica: "
        f"{_amount(by_flops, 's')} at {chip.peak:g} TFLOP/s a chip",
        f"{_amount(compiled.bytes_accessed, 'B')} moved: "
        f"{_amount(by_bytes, 's')} at {chip.bandwidth:g} GB/s a chip",
        f"{images:,.0f} images/s if nothing else took time; no forecast",
    ]


CHECK_TPU = Command(
    help="Compile the training step for --tpu_topology without a TPU, and report whether it fits.",
    groups=(*schema.STEP_GROUPS, schema.Topology, schema.BatchSearch),
    prepare=prepare,
    inherits=inherit.from_checkpoint,
)
