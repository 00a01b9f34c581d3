# SPDX-License-Identifier: Apache-2.0
"""Compiles a lowered program for TPUs without having any.

    python tpu_compiler.py PROGRAM RESULT.json '{"topology": "v5e:4x8"}'

It runs in a process of its own, because libtpu may abort and jax brings another XLA than
TensorFlow. Some functions of jax used here are private, so `requirements/check-tpu.txt` pins its
version.
"""

import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

PACKAGES = ("libtpu", "jax")
JAX_VERSION = "0.10.2"  # the version whose private functions are used
_ENVIRONMENT = {
    # Several checks may run at a time, on machines outside of Google Cloud.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    # The default level takes three times as long for the same memory and operations. O0 skips
    # passes that reduce memory.
    "JAX_OPTIMIZATION_LEVEL": "O1",
}
_COLLECTIVE = re.compile(
    r" = (\S.*?) (all-reduce|all-gather|all-to-all|collective-permute"
    r"|reduce-scatter)(-start)?\("
)
_SHAPE = re.compile(r"\b(?:pred|[a-z]+(\d+))\w*\[([\d,]*)\]")


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Counts the collectives in the text of a compiled HLO module.

    Returns:
        `count` and `bytes` of the results by kind, e.g. "all-reduce".
    """
    found: dict[str, dict[str, int]] = {}
    for shapes, kind, start in _COLLECTIVE.findall(program):
        sizes = [_num_bytes(*shape) for shape in _SHAPE.findall(shapes)]
        # The start of an asynchronous collective returns its operand, too.
        size = sizes[1] if start and len(sizes) > 1 else sum(sizes)
        total = found.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += 1
        total["bytes"] += size
    return dict(sorted(found.items()))


def _num_bytes(bits: str, dims: str) -> int:
    size = math.prod(int(dim) for dim in dims.split(",") if dim)
    return size * int(bits or 8) // 8  # "pred" has no bits in its name


def compile_program(program: bytes, topology: str, **options: Any) -> dict[str, Any]:
    """Compiles a serialized HloModuleProto for every device of a topology.

    `topology` is libtpu's name, e.g. "v5e:4x8", and `options` are libtpu's. Returns the fields of
    `tpu_compilation.Compiled`, without those that do not apply, of one device.
    """
    import jax
    from jax._src.lib import _jax
    from jax.experimental import topologies
    from jaxlib import _hlo

    versions = [f"{n} {importlib.metadata.version(n)}" for n in PACKAGES]
    found: dict[str, Any] = {"compiler": " and ".join(versions)}
    module = _hlo.HloModule.from_serialized_hlo_module_proto(program)
    client = jax.devices("cpu")[0].client
    written = _jax.hlo_module_cost_analysis(client, module)
    try:
        options |= {"platform": "tpu", "topology_name": topology}
        where = topologies.get_topology_desc(**options)
        executable = compile_on(where.devices, program)
    except jax.errors.JaxRuntimeError as error:
        return found | {"error": str(error)}
    memory = executable.get_compiled_memory_stats()
    cost = executable.cost_analysis()
    (compiled,) = executable.hlo_modules()
    return found | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "written_flops": written["flops"],
        "collectives": collectives(compiled.to_string()),
    }


def compile_on(devices: Sequence[Any], program: bytes) -> Any:
    """Compiles a program for jax's devices, each of which runs it."""
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax
    from jax._src.lib.mlir import ir

    client, where = devices[0].client, _jax.DeviceList(tuple(devices))
    options = compiler.get_compile_options(
        num_replicas=len(devices),
        num_partitions=1,
        device_assignment=np.array([[d.id] for d in devices]),
        backend=client,
    )
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(program))
        _drop_copies(module)
        load = compiler.backend_compile_and_load
        return load(client, module, where, options, [])


def _drop_copies(module: Any) -> None:
    """Removes TensorFlow's copies, which the TPU compiler does not support."""

    def walk(operation: Any) -> Iterator[Any]:
        for region in operation.regions:
            for block in region:
                for inner in block:
                    yield from walk(inner.operation)
        yield operation

    for operation in list(walk(module.operation)):
        if operation.name == "mhlo.copy":
            operation.results[0].replace_all_uses_with(operation.operands[0])
            operation.erase()


def main() -> None:
    """Compiles the program that the arguments name."""
    os.environ.update(_ENVIRONMENT)
    program, result, request = sys.argv[1:]
    module = pathlib.Path(program).read_bytes()
    compiled = compile_program(module, **json.loads(request))
    pathlib.Path(result).write_text(json.dumps(compiled))


if __name__ == "__main__":
    main()
