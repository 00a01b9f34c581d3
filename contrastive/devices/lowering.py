# SPDX-License-Identifier: Apache-2.0
"""Lowers a training step, with its collectives, without any TPU."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

import data
from contrastive.config.augmentation import Augmentation


class _Replica(tf.distribute.ReplicaContext):
    """One of N replicas of a lowered program, as in TPUStrategy (2.20)."""

    def __init__(self, strategy: tf.distribute.Strategy, count: int) -> None:
        super().__init__(strategy, replica_id_in_sync_group=0)
        self._count = count

    @property
    def num_replicas_in_sync(self) -> int:
        return self._count

    @property
    def replica_id_in_sync_group(self) -> tf.Tensor:
        return gen_xla_ops.xla_replica_id()

    def all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        del options
        total = tf.nest.map_structure(self._sum, value)
        if tf.distribute.ReduceOp(reduce_op) == tf.distribute.ReduceOp.MEAN:
            return tf.nest.map_structure(lambda x: x / self._count, total)
        return total

    def _sum(self, x: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def total(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            group, reduce = list(range(self._count)), gen_xla_ops.xla_all_reduce
            return reduce(x, [group], "Add", "CrossReplica"), self._sum

        return total(x)

    def all_gather(self, value: tf.Tensor, axis: int, options: Any = None) -> tf.Tensor:
        if value.dtype == tf.int64:  # there is no sum of them
            halves = self.all_gather(tf.bitcast(value, tf.int32), axis, options)
            return tf.bitcast(halves, tf.int64)
        # The sum of tensors that are zero but in the rows of one replica.
        shape = value.shape.as_list()
        replica = self.replica_id_in_sync_group
        own = tf.one_hot(replica, self._count, dtype=value.dtype)
        own = tf.reshape(own, [-1] + [1] * (len(shape) - axis))
        rows = self._sum(tf.expand_dims(value, axis) * own)
        shape[axis] *= self._count
        return tf.reshape(rows, shape)


def batch_spec(dataset: data.Dataset, rows: int, views: tuple[Augmentation, ...]) -> dict[str, Any]:
    """Lists the `tf.TensorSpec`s of the batches of `data.train_stream`.

    `dataset` is the training split, whose images need not exist; `rows` is the batch size of one
    replica; and there is one augmentation per view.
    """
    dtypes = {
        "id": tf.int64, "epoch": tf.int32, "label": tf.int32,
        "weight": tf.float32,
    }  # fmt: skip
    spec = {name: tf.TensorSpec([rows], x) for name, x in dtypes.items()}

    def image(*shape: int) -> tf.TensorSpec:
        return tf.TensorSpec([rows, *shape], tf.uint8)

    channels = dataset.channels
    if dataset.image_size and not dataset.is_encoded:
        spec["image"] = image(*dataset.image_size, channels)
        if any(view.mask_probability for view in views):
            spec["mask"] = image(*dataset.image_size)
        return spec
    sizes = [view.size for view in views]
    spec["crops"] = tuple(image(size, size, channels) for size in sizes)
    if len(set(sizes)) == 1:
        spec["crops"] = image(len(sizes), sizes[0], sizes[0], channels)
    return spec


def replica_program(
    step: Callable[[Any], dict[str, tf.Tensor]],
    spec: dict[str, Any],
    strategy: tf.distribute.Strategy,
    num_replicas: int,
) -> tf.types.experimental.PolymorphicFunction:
    """Builds the program of one of several replicas, not traced yet.

    `step` is made by `contrastive.training.loop.build_step`, `spec` by `batch_spec`, and the
    networks in the scope of `strategy`, of one device.

    Returns:
        A function of the batch's tensors, in `tf.nest.flatten`'s order, that returns the metrics,
        float32 `[m]`.
    """

    @tf.autograph.experimental.do_not_convert
    def program(*tensors: tf.Tensor) -> tf.Tensor:
        with _Replica(strategy, num_replicas):
            metrics = step(tf.nest.pack_sequence_as(spec, tensors))
            return tf.stack([tf.cast(v, tf.float32) for v in metrics.values()])

    return tf.function(program, jit_compile=True)


def lower(
    program: tf.types.experimental.PolymorphicFunction,
    spec: dict[str, Any],
    strategy: tf.distribute.Strategy,
) -> bytes:
    """Converts a `replica_program` to an unoptimized HloModuleProto.

    Its parameters are the batch's tensors and what the function captured.
    """
    with strategy.scope():
        ir = program.experimental_get_compiler_ir(*tf.nest.flatten(spec))
        return ir(stage="hlo_serialized")
