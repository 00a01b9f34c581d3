# SPDX-License-Identifier: Apache-2.0
"""Where the program runs: TPU, GPUs or CPU, as a `tf.distribute` strategy."""

import functools
import json
import os
import pathlib
import sys
from urllib.error import URLError

import tensorflow as tf
from absl import logging

from contrastive.devices import cloud_tpu

STRATEGIES = ("tpu", "mirrored", "multi_worker", "one_device")
LOCAL_TPU = "local"
# What a lost TPU or machine raises.
LOST = (
    cloud_tpu.AwayError,
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
)

# What connecting to a TPU that is not there raises, by TensorFlow version.
_NO_TPU = (
    tf.errors.NotFoundError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    ValueError,
    IndexError,
    URLError,
)
# TPUs of version 2 to 7 on this machine's bus; other cards are Google's, too.
_PCI_DEVICES = pathlib.Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
_TPU_CHIPS = (
    "0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076",
)  # fmt: skip


def is_lost(error: Exception, strategy: str | None) -> bool:
    """Returns whether an error means that a TPU or a machine was lost.

    Args:
        error: what was raised.
        strategy: of `STRATEGIES`; None if it was not chosen yet.
    """
    if isinstance(error, cloud_tpu.AwayError):
        return True
    # Without devices elsewhere, these come from files or from a defect. A
    # worker that was restarted has none of the variables: FailedPrecondition.
    is_elsewhere = strategy in ("tpu", "multi_worker")
    kinds = (*LOST, tf.errors.FailedPreconditionError)
    return is_elsewhere and isinstance(error, kinds)


def choose_strategy(
    wanted: str,
    *,
    use_tpu: bool | None = None,
    tpu_named: bool = False,
    num_gpus: int,
    cpu_replicas: int = 1,
    must_exist: bool = True,
) -> str:
    """Returns the strategy, of `STRATEGIES`, for what is there.

    Args:
        wanted: one of them, or "auto": the first of a TPU, the machines that
            TF_CONFIG names, several GPUs, one device.
        use_tpu: wins over all else; None: unset.
        tpu_named: whether there is a TPU's name or address, which wins over
            `wanted`.
        num_gpus: of this machine.
        cpu_replicas: logical devices to split the CPU into.
        must_exist: whether to look for what is wanted.

    Raises:
        ValueError: if what is wanted is not there.
    """
    workers = num_workers()
    if use_tpu is False and wanted == "tpu":
        wanted = "auto"
    if use_tpu or (use_tpu is None and tpu_named):
        return "tpu"
    if wanted != "auto" and not must_exist:
        return wanted
    if wanted == "multi_worker" and not workers:
        raise ValueError(
            "--strategy=multi_worker needs the environment variable TF_CONFIG, "
            "which names the machines and says which one this is; see README."
        )
    if wanted == "mirrored" and (num_gpus or cpu_replicas) < 2:
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
    many = num_gpus > 1 or (not num_gpus and cpu_replicas > 1)
    return "mirrored" if many else "one_device"


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
    """Returns a strategy for the devices that are there.

    To be called once a process and before anything else touches a device.

    Args:
        name: of `STRATEGIES`.
        tpu_name: Cloud TPU's name; "local" on a TPU VM; a grpc address; None:
            of the environment variable TPU_NAME, else "local".
        tpu_zone: zone of the TPU; None: from the machine's metadata.
        gcp_project: project of the TPU; None: from the machine's metadata.
        tpu_wait_minutes: to wait for a named TPU to become ready.
        cpu_replicas: logical devices that the CPU is split into, without GPUs.
        first_alone: whether only the first of the devices is to be used.

    Raises:
        ValueError: if there is no such TPU.
    """
    if name == "tpu":
        tpu_name = tpu_name or os.environ.get("TPU_NAME") or LOCAL_TPU
        if tpu_name != LOCAL_TPU and "://" not in tpu_name:
            cloud_tpu.wait_until_ready(
                cloud_tpu.find(tpu_name, tpu_zone, gcp_project),
                tensorflow_version=tf.__version__,
                minutes=tpu_wait_minutes,
            )
        strategy = _tpu_strategy(tpu_name, tpu_zone, gcp_project, first_alone)
    else:
        name = "one_device" if first_alone else name
        strategy = _host_strategy(name, cpu_replicas)
        _compile_quietly()
    logging.info(
        "%s of %d: %s",
        type(strategy).__name__,
        strategy.num_replicas_in_sync,
        ", ".join(strategy.extended.worker_devices),
    )
    return strategy


def num_replicas(name: str, cpu_replicas: int = 1) -> int | None:
    """Returns how many replicas a strategy will have; None: who knows."""
    if name == "tpu":
        return None
    if name == "one_device":
        return 1
    here = len(tf.config.list_physical_devices("GPU"))
    count = here or cpu_replicas
    if name == "multi_worker":
        count = num_workers() * max(here, 1)
    return count if count > 1 else None  # where they are, there will be several


def host_only() -> tf.distribute.Strategy:
    """Returns a strategy of the host's CPU; accelerators stay untouched."""
    tf.config.set_visible_devices([], "GPU")
    return tf.distribute.OneDeviceStrategy("/cpu:0")


def has_gpu() -> bool:
    """Returns whether this machine has a GPU that TensorFlow sees."""
    return bool(tf.config.list_physical_devices("GPU"))


def has_tpu_chip(pci_devices: pathlib.Path = _PCI_DEVICES) -> bool:
    """Returns whether a TPU is plugged into this machine, driver or not."""
    for vendor in pci_devices.glob("*/vendor"):
        if vendor.read_text().strip() == _GOOGLE:
            device = vendor.with_name("device").read_text().strip()
            if device in _TPU_CHIPS:
                return True
    return False


def num_workers() -> int:
    """Returns how many machines TF_CONFIG names that train; 0 without it.

    Raises:
        ValueError: if it is no such description.
    """
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


def runs_on_several_hosts(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether each of several machines runs this very program."""
    return (
        isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        and num_workers() > 1
    )


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this is the one process that writes files."""
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
        assignment = None
        if first_alone:
            assignment = tf.tpu.experimental.DeviceAssignment.build(
                topology, num_replicas=1
            )
        return tf.distribute.TPUStrategy(resolver, assignment)
    except _NO_TPU as error:
        away = name != LOCAL_TPU and isinstance(error, LOST)
        kind = cloud_tpu.AwayError if away else ValueError
        raise kind(_why_no_tpu(name, error)) from error


def _why_no_tpu(name: str, error: Exception) -> str:
    """Returns, for what connecting raised, what to do."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    if name != LOCAL_TPU:
        return (
            f"No TPU answers as {name!r}: {first} Is it "
            "of this network, and of the same TensorFlow version?"
        )
    if has_tpu_chip() and "No OpKernel" in str(error):
        return (
            "This machine has a TPU, but this TensorFlow was built without. "
            "Run: pip uninstall --yes tensorflow; "
            "pip install -r requirements/tpu.txt"
        )
    if has_tpu_chip():
        return (
            f"The TPU of this machine does not start, perhaps because another "
            f"process has it: {first}"
        )
    return (
        "No TPU found on this machine. Give the --tpu_name, --tpu_zone and "
        "--gcp_project of one elsewhere, or run without: --use_tpu=false."
    )


def _host_strategy(name: str, cpu_replicas: int) -> tf.distribute.Strategy:
    """Returns a strategy of this machine's GPUs, or its CPU without any."""
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        # Otherwise the first program on a machine takes all of its memory.
        tf.config.experimental.set_memory_growth(gpu, True)
    if name == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy("/gpu:0" if gpus else "/cpu:0")
    if gpus:
        return tf.distribute.MirroredStrategy()
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * cpu_replicas,
    )
    return tf.distribute.MirroredStrategy(
        [f"/cpu:{i}" for i in range(cpu_replicas)]
    )


@functools.cache  # once a process
def _compile_quietly() -> None:
    """Compiles a function by XLA while standard error is redirected.

    XLA writes two lines there when it compiles the first function of a
    process, and TF_CPP_MIN_LOG_LEVEL does not apply to them.
    """

    @tf.function(jit_compile=True, autograph=False)
    def double(x: tf.Tensor) -> tf.Tensor:
        return 2 * x

    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with tf.device("CPU:0"):
            double(tf.constant(1.0))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
