# SPDX-License-Identifier: Apache-2.0
"""Cloud TPU slices that are for rent, and what their chips can do."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of Cloud TPU.

    Attributes:
        name: as topologies have it.
        cores: by which a chip counts in slices' names.
        replicas: of TPUStrategy on a chip.
        peak: of a chip in bfloat16, TFLOP/s.
        bandwidth: of a chip's HBM, GB/s.
        memory: what the compiler leaves a replica of the HBM, GiB.
        topologies: of slices that are for rent, in chips.
        rented_as: first part of slices' names, if it is not the chip's.
        options: libtpu's.
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


# Peaks, bandwidths and slices: cloud.google.com/tpu/docs, pages v3, v4, v5e,
# v5p, v6e and regions-zones (November 2026); peak and bandwidth of v2: Jouppi
# et al., "A domain-specific supercomputer for training deep neural networks",
# CACM 63 (7), 2020; slices of v4 and v5p also: MaxText,
# accelerator_to_spec_map.py. Memory: from the messages of libtpu 0.0.42.1 for
# programs that exceed it.
CHIPS = (
    Chip("v2", 2, 2, 46, 700, 7.48, "2x2 4x4 8x8 8x16 16x16"),
    Chip(
        "v3", 2, 2, 123, 900, 15.48, "2x2 4x4 4x8 8x8 8x16 16x16 16x32 32x32"
    ),
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
        """Number of chips."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def num_replicas(self) -> int:
        """Number of TPUStrategy's replicas."""
        return self.num_chips * self.chip.replicas

    @property
    def name(self) -> str:
        """What it is rented as, e.g. "v5litepod-32"."""
        prefix = self.chip.rented_as or self.chip.name
        return f"{prefix}-{self.num_chips * self.chip.cores}"

    def request(self) -> dict[str, Any]:
        """Returns the arguments of `tpu_compiler.compile_program`."""
        request: dict[str, Any] = {
            "topology": f"{self.chip.name}:{self.topology}"
        }
        if self.num_chips == 1:
            request["chips_per_host_bounds"] = [1, 1, 1]
        return request | dict(self.chip.options)


def find_slice(name: str) -> Slice:
    """Returns a slice by the name it is rented as, or by chip and topology.

    Args:
        name: such as "v5litepod-32", "v5e-32" or "v5e:4x8".

    Raises:
        ValueError: if no such slice is for rent.
    """
    known = [
        Slice(chip, topology)
        for chip in CHIPS
        for topology in chip.topologies.split()
    ]
    for found in known:
        chip, count = found.chip.name, found.num_chips * found.chip.cores
        if name.lower() in (
            found.name,
            f"{chip}-{count}",
            f"{chip}:{found.topology}",
        ):
            return found
    table = "\n".join(
        f"  {chip.name}: "
        + ", ".join(f"{s.name} ({s.topology})" for s in known if s.chip is chip)
        for chip in CHIPS
    )
    raise ValueError(
        "--tpu_topology must be the name of a slice, or chip:topology. "
        f"Received: {name!r}. For rent are\n{table}"
    )
