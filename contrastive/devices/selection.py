# SPDX-License-Identifier: Apache-2.0
"""Chooses a strategy for the devices of this machine, without TensorFlow."""

import json
import os
import pathlib

LOCAL_TPU = "local"

_PCI_DEVICES = pathlib.Path("/sys/bus/pci/devices")
_NVIDIA_GPUS = pathlib.Path("/proc/driver/nvidia/gpus")
# PCI identifiers of TPU v2 to v7; Google makes other PCI devices, too.
_GOOGLE = "0x1ae0"
_TPU_CHIPS = "0x0027 0x0056 0x005e 0x0062 0x0063 0x006f 0x0076".split()


def choose_strategy(
    wanted: str,
    *,
    use_tpu: bool | None = None,
    tpu_named: bool = False,
    num_gpus: int,
    cpu_replicas: int = 1,
    must_exist: bool = True,
) -> str:
    """Chooses one of `STRATEGIES` for the devices that there are.

    Args:
        wanted: one of `STRATEGIES`, or "auto": the first that exists of a TPU, several machines
            (named by TF_CONFIG), several GPUs, one device.
        use_tpu: if given, it overrides everything else.
        tpu_named: whether a TPU is named, which overrides `wanted`.
        num_gpus: number of GPUs of this machine.
        cpu_replicas: number of logical devices to split the CPU into.
        must_exist: whether a missing device that is wanted is an error.

    Raises:
        ValueError: if the devices of the strategy do not exist.
    """
    workers = num_workers()
    if use_tpu or (use_tpu is None and tpu_named):
        return "tpu"
    if wanted == "tpu" and use_tpu is False:
        wanted = "auto"
    if must_exist and wanted == "multi_worker" and not workers:
        raise ValueError(
            "--strategy=multi_worker needs the environment variable TF_CONFIG, "
            "which names the machines and says which one this is; see README."
        )
    many = (num_gpus or cpu_replicas) > 1
    if must_exist and wanted == "mirrored" and not many:
        raise ValueError(
            f"--strategy=mirrored is for several GPUs; there are {num_gpus}. "
            "To try it on a CPU: --cpu_replicas=2."
        )
    if wanted != "auto":
        return wanted
    if use_tpu is None and (os.environ.get("TPU_NAME") or has_tpu_chip()):
        return "tpu"
    if workers > 1:
        return "multi_worker"
    return "mirrored" if many else "one_device"


def num_replicas(name: str, *, num_gpus: int, cpu_replicas: int = 1) -> int | None:
    """Computes how many replicas a strategy will have, as in `choose_strategy`.

    Returns:
        The number; None if it is unknown before connecting to the devices.
    """
    if name in ("tpu", "one_device"):
        return None if name == "tpu" else 1
    count = num_gpus or cpu_replicas
    if name == "multi_worker":
        count = num_workers() * max(num_gpus, 1)
    # One device where several are asked for: the plan is for another machine.
    return count if count > 1 else None


def has_tpu_chip(pci_devices: pathlib.Path = _PCI_DEVICES) -> bool:
    """Checks whether this machine has a TPU, with or without its driver."""
    return any(
        vendor.read_text().strip() == _GOOGLE
        and vendor.with_name("device").read_text().strip() in _TPU_CHIPS
        for vendor in pci_devices.glob("*/vendor")
    )


def count_gpus() -> int:
    """Counts the NVIDIA GPUs that TensorFlow would use, without TensorFlow."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(_NVIDIA_GPUS.glob("*")))
    return sum(x.strip() not in ("", "-1") for x in visible.split(","))


def num_workers() -> int:
    """Counts the machines in TF_CONFIG; a malformed one is a `ValueError`."""
    config = os.environ.get("TF_CONFIG")
    if not config:
        return 0
    try:
        cluster = json.loads(config).get("cluster", {})
        return sum(len(cluster.get(job, ())) for job in ("chief", "worker"))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            "The environment variable TF_CONFIG must be JSON such as "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": '
            f'"worker", "index": 0}}}}. Received: {config}'
        ) from error
