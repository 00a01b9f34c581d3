# SPDX-License-Identifier: Apache-2.0
"""Connects to the devices: TPU, GPUs or CPU, as a `tf.distribute` strategy."""

import functools
import os
import sys
from urllib.error import URLError

import tensorflow as tf
from absl import logging

from contrastive.devices import cloud_tpu
from contrastive.devices.selection import LOCAL_TPU, has_tpu_chip, num_workers

# Errors that a lost TPU or machine causes.
LOST = (
    cloud_tpu.AwayError, tf.errors.UnavailableError, tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
)  # fmt: skip
# Errors of a connection to a missing TPU; they depend on the version.
_NO_TPU = (
    tf.errors.NotFoundError, tf.errors.InternalError,
    tf.errors.UnavailableError, ValueError, IndexError, URLError,
)  # fmt: skip


def is_lost(error: Exception, strategy: str | None) -> bool:
    """Checks whether an error, under a strategy, is a lost TPU or machine."""
    if isinstance(error, cloud_tpu.AwayError):
        return True
    # Without remote devices, files or defects cause these errors. A worker that has restarted has
    # lost its variables, which is a FailedPreconditionError.
    kinds = (*LOST, tf.errors.FailedPreconditionError)
    return strategy in ("tpu", "multi_worker") and isinstance(error, kinds)


_made: list[str] = []


def last_made() -> str | None:
    """Returns the name of the strategy of this process; None without one."""
    return _made[-1] if _made else None


def make_strategy(
    name: str,
    *,
    tpu_name: str | None = None,
    tpu_zone: str | None = None,
    gcp_project: str | None = None,
    tpu_wait_minutes: float = 0.0,
    cpu_replicas: int = 1,
    first_alone: bool = False,
) -> tf.distribute.Strategy:
    """Connects to the devices and creates their strategy.

    Call this once a process, before anything else uses a device. `name` is one of `STRATEGIES`.
    `tpu_name` is the name of a Cloud TPU, "local" on a TPU VM, or a grpc address; by default it is
    the environment variable TPU_NAME, or else "local". The zone and the project of the TPU are by
    default those of this machine. The CPU is split into `cpu_replicas` logical devices if there are
    no GPUs. With `first_alone`, only the first device is used. Raises `ValueError` if the TPU does
    not exist or does not answer.
    """
    _made.append(name)
    if name == "tpu":
        tpu_name = tpu_name or os.environ.get("TPU_NAME") or LOCAL_TPU
        if tpu_name != LOCAL_TPU and "://" not in tpu_name:
            client = cloud_tpu.find(tpu_name, tpu_zone, gcp_project)
            version, minutes = tf.__version__, tpu_wait_minutes
            cloud_tpu.wait_until_ready(client, tensorflow_version=version, minutes=minutes)
        strategy = _tpu_strategy(tpu_name, tpu_zone, gcp_project, first_alone)
    else:
        kind = "one_device" if first_alone else name
        strategy = _host_strategy(kind, cpu_replicas)
        _compile_quietly()
    kind, count = type(strategy).__name__, strategy.num_replicas_in_sync
    devices = ", ".join(strategy.extended.worker_devices)
    logging.info("%s of %d: %s", kind, count, devices)
    return strategy


def host_only() -> tf.distribute.Strategy:
    """Creates a strategy for the CPU and hides GPUs from TensorFlow."""
    tf.config.set_visible_devices([], "GPU")
    return tf.distribute.OneDeviceStrategy("/cpu:0")


def has_gpu() -> bool:
    """Checks whether TensorFlow finds a GPU on this machine."""
    return bool(tf.config.list_physical_devices("GPU"))


def runs_on_several_hosts(strategy: tf.distribute.Strategy) -> bool:
    """Checks whether several machines run this program together."""
    kind = tf.distribute.MultiWorkerMirroredStrategy
    return isinstance(strategy, kind) and num_workers() > 1


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Checks whether this process is the one that writes files."""
    if not runs_on_several_hosts(strategy):
        return True
    resolver = strategy.cluster_resolver
    first = "chief" if "chief" in resolver.cluster_spec().jobs else "worker"
    return (resolver.task_type, resolver.task_id) == (first, 0)


def _tpu_strategy(
    name: str, zone: str | None, project: str | None, first_alone: bool
) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            name, zone=zone, project=project
        )
        tf.config.experimental_connect_to_cluster(resolver)
        topology = tf.tpu.experimental.initialize_tpu_system(resolver)
        assign = tf.tpu.experimental.DeviceAssignment.build
        first = assign(topology, num_replicas=1) if first_alone else None
        return tf.distribute.TPUStrategy(resolver, first)
    except _NO_TPU as error:
        away = name != LOCAL_TPU and isinstance(error, LOST)
        kind = cloud_tpu.AwayError if away else ValueError
        raise kind(_why_no_tpu(name, error)) from error


def _why_no_tpu(name: str, error: Exception) -> str:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    if name != LOCAL_TPU:
        return (
            f"No TPU answers as {name!r}: {first} Is it of this network, and "
            "of the same TensorFlow version?"
        )
    if not has_tpu_chip():
        return (
            "No TPU found on this machine. Give the --tpu_name, --tpu_zone and "
            "--gcp_project of one elsewhere, or run without: --use_tpu=false."
        )
    if "No OpKernel" in str(error):
        return (
            "This machine has a TPU, but this TensorFlow was built without. "
            "Run: pip uninstall --yes tensorflow; "
            "pip install -r requirements/tpu.txt"
        )
    return (
        f"The TPU of this machine does not start, perhaps because another process has it: {first}"
    )


def _host_strategy(name: str, cpu_replicas: int) -> tf.distribute.Strategy:
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        # By default, the first program would take all of the GPU's memory.
        tf.config.experimental.set_memory_growth(gpu, True)
    if name == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy("/gpu:0" if gpus else "/cpu:0")
    if gpus:
        return tf.distribute.MirroredStrategy()
    parts = [tf.config.LogicalDeviceConfiguration()] * cpu_replicas
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, parts)
    cpus = [f"/cpu:{i}" for i in range(cpu_replicas)]
    return tf.distribute.MirroredStrategy(cpus)


@functools.cache  # The lines appear once a process.
def _compile_quietly() -> None:
    """Hides two lines that XLA writes, at any log level, when first used."""
    double = tf.function(lambda x: 2 * x, jit_compile=True, autograph=False)
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, tf.device("CPU:0"):
            os.dup2(nowhere.fileno(), 2)
            double(tf.constant(1.0))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
