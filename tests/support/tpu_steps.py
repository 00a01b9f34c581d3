# SPDX-License-Identifier: Apache-2.0
"""Steps that are compiled for a TPU, of small networks."""

import importlib.util
import shlex

import pytest

from contrastive.commands import check_tpu
from contrastive.devices import tpu_compilation
from tests.support import program

needs_compiler = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("jax", "libtpu"))),
    reason="requirements/check-tpu.txt is not installed",
)
COMPILED = tpu_compilation.Compiled(
    arguments=1 << 30,
    temporaries=7 << 30,
    peak=8 << 30,
    flops=197e12 / 100,
    written_flops=200e12 / 100,
    bytes_accessed=819e9 / 50,
    collectives={"all-reduce": {"count": 3, "bytes": 4_000_000}},
)
_SMALL_RUN = "--mode=check_tpu --dataset=cifar10 --resnet_depth=10 --width_multiplier=0.125"


def open_step(arguments, tmp_path):
    """Opens the step of a command line, whose data is not here."""
    resolved = program.resolve(*shlex.split(f"{_SMALL_RUN} {arguments}"), f"--data_dir={tmp_path}")
    where = tpu_compilation.find_slice(resolved["tpu_topology"])
    return check_tpu.open_step(resolved, where)


def check(arguments, tmp_path):
    """Returns the findings of a command line."""
    step = open_step(arguments, tmp_path)
    return check_tpu.check(step, find_batch=step.session.resolved["find_batch"])
