# SPDX-License-Identifier: Apache-2.0
"""Where the program runs: TPU, GPUs or CPU, as a `tf.distribute` strategy."""

from urllib.error import URLError

import tensorflow as tf
from absl import logging

# What connecting to a TPU that is not there raises, by TensorFlow version.
_NO_TPU = (
    tf.errors.NotFoundError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    ValueError,
    IndexError,
    URLError,
)


def make_strategy(
    *,
    use_tpu: bool,
    tpu_name: str | None = None,
    tpu_zone: str | None = None,
    gcp_project: str | None = None,
    cpu_replicas: int = 1,
) -> tf.distribute.Strategy:
    """Returns the strategy for the devices that are there.

    To be called once a process and before anything else touches a device.

    Args:
        use_tpu: whether to connect to a TPU; else all GPUs of this machine
            are used, or the CPU where it has none.
        tpu_name: Cloud TPU's name, "local" (also if None) on a TPU VM, or a
            grpc address.
        tpu_zone: zone of the TPU; None: from the machine's metadata.
        gcp_project: project of the TPU; None: from the machine's metadata.
        cpu_replicas: logical devices that the CPU is split into.

    Raises:
        ValueError: if there is no such TPU.
    """
    if use_tpu:
        strategy = _tpu_strategy(tpu_name or "local", tpu_zone, gcp_project)
    else:
        strategy = _local_strategy(cpu_replicas)
    logging.info(
        "%s of %d: %s",
        type(strategy).__name__,
        strategy.num_replicas_in_sync,
        ", ".join(strategy.extended.worker_devices),
    )
    return strategy


def has_gpu() -> bool:
    """Returns whether this machine has a GPU that TensorFlow sees."""
    return bool(tf.config.list_physical_devices("GPU"))


def _tpu_strategy(
    name: str, zone: str | None, project: str | None
) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            name, zone=zone, project=project
        )
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except _NO_TPU as error:
        raise ValueError(
            f"No TPU found as {name!r}. On a TPU VM, TensorFlow must be the "
            f"package tensorflow-tpu=={tf.__version__}, not tensorflow; from "
            "elsewhere give --tpu_name, --tpu_zone and --gcp_project. Without "
            f"a TPU: --use_tpu=false. ({str(error).splitlines()[0]})"
        ) from error


def _local_strategy(cpu_replicas: int) -> tf.distribute.Strategy:
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        # Otherwise the first program on a machine takes all of its memory.
        tf.config.experimental.set_memory_growth(gpu, True)
    if len(gpus) > 1:
        return tf.distribute.MirroredStrategy()
    if gpus:
        return tf.distribute.OneDeviceStrategy("/gpu:0")
    if cpu_replicas > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * cpu_replicas,
        )
        return tf.distribute.MirroredStrategy(
            [f"/cpu:{i}" for i in range(cpu_replicas)]
        )
    return tf.distribute.OneDeviceStrategy("/cpu:0")
