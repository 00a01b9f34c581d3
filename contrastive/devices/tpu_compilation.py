# SPDX-License-Identifier: Apache-2.0
"""Slices of Cloud TPUs for rent, and compilation of a lowered step for them."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from contrastive.devices import tpu_compiler


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of Cloud TPU.

    Attributes:
        name: name of the chip in topologies, e.g. "v5e".
        cores: number that a chip adds to the number in the name of a slice.
        replicas: number of replicas of TPUStrategy on a chip.
        peak: peak performance of a chip in bfloat16, TFLOP/s.
        bandwidth: bandwidth of the HBM of a chip, GB/s.
        memory: HBM that a program can use on a replica, GiB.
        topologies: sizes in chips of the slices that can be rented.
        rented_as: first part of the names of slices; by default `name`.
        options: options of libtpu for the topology.
    """

    name: str
    cores: int
    replicas: int
    peak: float
    bandwidth: float
    memory: float
    topologies: str
    rented_as: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Peaks, bandwidths and slices: cloud.google.com/tpu/docs, pages v3, v4, v5e, v5p, v6e and
# regions-zones (November 2026); peak and bandwidth of v2: Jouppi et al., "A domain-specific
# supercomputer for training deep neural networks", CACM 63 (7), 2020; slices of v4 and v5p also:
# MaxText, accelerator_to_spec_map.py. Memory: from the messages of libtpu 0.0.42.1 for programs
# that exceed it.
CHIPS = (
    Chip("v2", 2, 2, 46, 700, 7.48, "2x2 4x4 8x8 8x16 16x16"),
    Chip("v3", 2, 2, 123, 900, 15.48, "2x2 4x4 4x8 8x8 8x16 16x16 16x32 32x32"),
    Chip(
        "v4", 2, 1, 275, 1200, 30.75,
        "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 8x8x8 8x8x12 8x8x16 "
        "8x16x16",
        # Both cores of a chip as one device, which is what a replica gets.
        options={"chip_config_name": "megacore"},
    ),
    Chip(
        "v5e", 1, 1, 197, 819, 15.75, "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
        rented_as="v5litepod",
    ),
    Chip(
        "v5p", 2, 1, 459, 2765, 95.74,
        "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 "
        "16x16x16 16x16x24",
    ),
    Chip("v6e", 1, 1, 918, 1638, 31.25, "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of a TPU pod; `topology` is in chips, e.g. "4x8"."""

    chip: Chip
    topology: str

    @property
    def num_chips(self) -> int:
        """The number of chips."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def num_replicas(self) -> int:
        """The number of replicas of TPUStrategy."""
        return self.num_chips * self.chip.replicas

    @property
    def name(self) -> str:
        """The name under which it is rented, e.g. "v5litepod-32"."""
        prefix = self.chip.rented_as or self.chip.name
        return f"{prefix}-{self.num_chips * self.chip.cores}"

    def request(self) -> dict[str, Any]:
        """Collects the arguments of `tpu_compiler.compile_program`."""
        topology = f"{self.chip.name}:{self.topology}"
        one = {"chips_per_host_bounds": [1] * 3} if self.num_chips == 1 else {}
        return {"topology": topology, **one, **self.chip.options}


def find_slice(name: str) -> Slice:
    """Finds a slice by a name such as "v5litepod-32", "v5e-32" or "v5e:4x8".

    Raises:
        ValueError: if no such slice can be rented.
    """
    table = ""
    for chip in CHIPS:
        slices = [Slice(chip, topology) for topology in chip.topologies.split()]
        for found in slices:
            _, count = found.name.split("-")
            shorts = f"{chip.name}-{count}", f"{chip.name}:{found.topology}"
            if name.lower() in (found.name, *shorts):
                return found
        names = ", ".join(f"{s.name} ({s.topology})" for s in slices)
        table += f"\n  {chip.name}: {names}"
    raise ValueError(
        "--tpu_topology must be the name of a slice, or chip:topology. "
        f"Received: {name!r}. For rent are{table}"
    )


def require_compiler() -> None:
    """Raises a ValueError, unless the compiler is installed."""
    find, version = importlib.util.find_spec, tpu_compiler.JAX_VERSION
    missing = [name for name in tpu_compiler.PACKAGES if not find(name)]
    needed = " and ".join(missing)
    if not missing and (found := importlib.metadata.version("jax")) != version:
        needed = f"jax {version}, not {found}"
    if needed:
        how = "pip install -r requirements/check-tpu.txt"
        raise ValueError(f"--mode=check_tpu needs {needed}: {how}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiler's figures for one replica and step, or its `error`.

    `compiler` are its versions; `crashed` says whether it failed itself. `arguments` are the bytes
    of weights, optimizer and batch; `temporaries` those of activations and all else; `peak` those
    in use at a time of both. `flops` are operations of the compiled program, and `written_flops` of
    the program before. All operations together read and write `bytes_accessed`. `collectives` has
    `count` and `bytes` of each kind.
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
    collectives: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether it compiled."""
        return not self.error

    @property
    def out_of_memory(self) -> bool:
        """Whether it did not compile because it does not fit."""
        return "RESOURCE_EXHAUSTED" in self.error


def compile_for(where: Slice, module: bytes) -> Compiled:
    """Compiles the result of `lowering.lower` for a slice."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = (pathlib.Path(folder, n) for n in ("in", "out"))
        source.write_bytes(module)
        request = json.dumps(where.request())
        process = subprocess.run(
            [sys.executable, tpu_compiler.__file__, source, result, request],
            capture_output=True,
            errors="replace",
        )
        if process.returncode == 0:
            return Compiled(**json.loads(result.read_text()))
    how = f"exit code {process.returncode}"
    if process.returncode < 0:
        how = signal.Signals(-process.returncode).name
    last = "\n".join(process.stderr.strip().splitlines()[-5:])
    error = f"The compiler ended with {how}:\n{last}"
    return Compiled(error=error, crashed=True)


def recomputation(compiled: Compiled, small: Compiled) -> float:
    """Computes the share of operations that the compiler computes twice.

    Near the limit of the memory it recomputes values. `compiled` fits, and `small` is the same
    program with a smaller batch, for which memory is plenty. Both counts are relative to those of
    the program as it was written, where the loss, which grows with the square of the batch, is
    included.

    The result is relative to the operations without; about 0 for none.
    """
    growth, least = (c.flops / c.written_flops for c in (compiled, small))
    return growth / least - 1


def roofline(compiled: Compiled, chip: Chip) -> tuple[float, float]:
    """Computes seconds a step, by operations and by bytes, at a chip's peak."""
    flops = chip.peak * 1e12 / chip.replicas
    bandwidth = chip.bandwidth * 1e9 / chip.replicas
    return compiled.flops / flops, compiled.bytes_accessed / bandwidth
