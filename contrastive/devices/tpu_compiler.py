# SPDX-License-Identifier: Apache-2.0
"""Compiles a lowered program for TPUs that are not there.

    python tpu_compiler.py PROGRAM RESULT.json '{"topology": "v5e:4x8"}'

A process of its own: libtpu may abort, and jax brings another XLA than
TensorFlow. What is used of jax is partly private, so its version is pinned, in
`requirements/check-tpu.txt`.
"""

import collections
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
JAX_VERSION = "0.10.2"  # whose private parts these are
_ENVIRONMENT = {
    # Several checks may run at a time; this machine need not be Google's.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    # The default takes three times as long, for the same verdict, memory and
    # operations; O0 leaves out what makes a program fit.
    "JAX_OPTIMIZATION_LEVEL": "O1",
}
_COLLECTIVE = re.compile(
    r" = (\S.*?) (all-reduce|all-gather|all-to-all|collective-permute"
    r"|reduce-scatter)(-start)?\("
)
_SHAPE = re.compile(r"\b(?:pred|[a-z]+(\d+))\w*\[([\d,]*)\]")


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Returns the number of collectives of each kind, and their bytes.

    Args:
        program: text of a compiled HLO module. Bytes are those of results.
    """
    found: dict[str, collections.Counter[str]] = {}
    for shapes, kind, start in _COLLECTIVE.findall(program):
        sizes = [_num_bytes(*shape) for shape in _SHAPE.findall(shapes)]
        # What starts an asynchronous one returns its operand, too.
        size = sizes[1] if start and len(sizes) > 1 else sum(sizes)
        counter = found.setdefault(kind, collections.Counter())
        counter.update(count=1, bytes=size)
    return {kind: dict(counter) for kind, counter in sorted(found.items())}


def _num_bytes(bits: str, dims: str) -> int:
    """Returns the bytes of an array; "pred", which names no bits, has one."""
    size = math.prod(int(dim) for dim in dims.split(",") if dim)
    return size * int(bits or 8) // 8


def compile_program(
    program: bytes, topology: str, **options: Any
) -> dict[str, Any]:
    """Compiles a program that every device of a topology runs.

    Args:
        program: serialized HloModuleProto, of one replica.
        topology: libtpu's name of it, e.g. "v5e:4x8".
        **options: libtpu's, of the topology.

    Returns:
        `compiler`, the versions; and either `error`, its own message, or, of
        one device: bytes of `arguments`, of `temporaries` and at the `peak`; a
        step's `flops` and `bytes_accessed` as compiled, and `written_flops`,
        those of the program as it came; and `collectives`.
    """
    import jax
    from jax._src.lib import _jax
    from jax.experimental import topologies
    from jaxlib import _hlo

    versions = [f"{n} {importlib.metadata.version(n)}" for n in PACKAGES]
    found: dict[str, Any] = {"compiler": " and ".join(versions)}
    written = _jax.hlo_module_cost_analysis(
        jax.devices("cpu")[0].client,
        _hlo.HloModule.from_serialized_hlo_module_proto(program),
    )
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
        executable = compile_on(devices, program)
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
    """Returns jax's executable of a program that each of its devices runs."""
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax
    from jax._src.lib.mlir import ir

    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(program))
        _drop_copies(module)
        return compiler.backend_compile_and_load(
            devices[0].client,
            module,
            _jax.DeviceList(tuple(devices)),
            compiler.get_compile_options(
                num_replicas=len(devices),
                num_partitions=1,
                device_assignment=np.array([[d.id] for d in devices]),
                backend=devices[0].client,
            ),
            [],
        )


def _drop_copies(module: Any) -> None:
    """Takes out TensorFlow's copies, which the TPU compiler does not know."""

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
    """Compiles what the arguments name."""
    os.environ.update(_ENVIRONMENT)
    program, result, request = sys.argv[1:]
    compiled = compile_program(
        pathlib.Path(program).read_bytes(), **json.loads(request)
    )
    pathlib.Path(result).write_text(json.dumps(compiled))


if __name__ == "__main__":
    main()
