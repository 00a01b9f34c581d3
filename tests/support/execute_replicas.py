# SPDX-License-Identifier: Apache-2.0
"""Executes a program of N replicas on N CPU devices of jax.

python execute_replicas.py FOLDER

Reads `program` and its arguments: `split.npz`, of which every replica has its part of the rows, and
`same.npz`. Writes `results.npz`, replicas in front.
"""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from contrastive.devices import tpu_compiler


def main(folder):
    devices = jax.devices()
    program = (folder / "program").read_bytes()
    executable = tpu_compiler.compile_on(devices, program)
    mesh = jax.sharding.Mesh(np.array(devices), ("replica",))
    arguments = []
    for name, axes in (("split", ["replica"]), ("same", [])):
        placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        with np.load(folder / f"{name}.npz") as file:
            arguments += [jax.device_put(x, placed) for x in file.values()]
    outputs = executable.execute_sharded(arguments)
    results = [
        np.stack([np.asarray(part) for part in parts])
        for parts in outputs.disassemble_into_single_device_arrays()
    ]
    np.savez(folder / "results.npz", *results)


if __name__ == "__main__":
    with jax.enable_x64(True):
        main(pathlib.Path(sys.argv[1]))
