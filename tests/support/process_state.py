# SPDX-License-Identifier: Apache-2.0
"""State of a test process that outlives a test, and its restoration.

The program sets some of it by design (deterministic operations, the dtype policy, logging), and
tests run the program in their own process. Every test starts from the state that this module takes
down when it is imported.
"""

import logging
import os
import signal
import sys

import keras
import tensorflow as tf
from absl import flags, logging as absl_logging
from tensorflow.python.eager import context
from tensorflow.python.framework import config
from tensorflow_datasets.core.utils import tqdm_utils

from contrastive.devices import strategies
from contrastive.weights import tensor_files

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
_LOGGERS = ("", "absl", "tensorflow")
# pytest itself changes this one between the phases of a test.
_VARIABLE_OF_PYTEST = "PYTEST_CURRENT_TEST"


def snapshot():
    """Returns the process-wide state by name; the values can be compared."""
    handler = absl_logging.get_absl_handler()
    return {
        "op determinism": config.is_op_determinism_enabled(),
        "TF32": config.tensor_float_32_execution_enabled(),
        # `get_experimental_options` drops what equals TensorFlow's default.
        "optimizer options": dict(
            context.context()._optimizer_experimental_options
        ),
        "XLA for all graphs": tf.config.optimizer.get_jit(),
        "eager functions": tf.config.functions_run_eagerly(),
        "visible devices": tuple(tf.config.get_visible_devices()),
        "logical CPUs": _logical_cpus(),
        "dtype policy": keras.config.dtype_policy().name,
        "floatx": keras.config.floatx(),
        "image data format": keras.config.image_data_format(),
        "strategy": tf.distribute.has_strategy(),
        "strategies made": tuple(strategies._made),
        "progress bars of TFDS": tqdm_utils._active,
        "flags": {
            name: flags.FLAGS[name].value
            for name in flags.FLAGS
            if flags.FLAGS[name].present
        },
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name != _VARIABLE_OF_PYTEST
        },
        "working directory": os.getcwd(),
        "module path": list(sys.path),
        "signal handlers": [signal.getsignal(number) for number in _SIGNALS],
        "log verbosity": absl_logging.get_verbosity(),
        "log levels": [logging.getLogger(name).level for name in _LOGGERS],
        "log handlers": [
            [handler for handler in logging.getLogger(name).handlers
             if not type(handler).__module__.startswith("_pytest")]
            for name in _LOGGERS
        ],
        "log filters": list(handler.filters),
        "log format": handler.python_handler.formatter,
    }  # fmt: skip


def restore(state):
    """Restores the state that `snapshot` returned, and the random seeds.

    Returns:
        The names of what differed but cannot be restored in this process, and therefore belongs
        into a process of its own.
    """
    # Twice, because flags that are reset set the log's levels, for example.
    for _ in range(2):
        for name in _differing(state):
            if name in _RESTORERS:
                _RESTORERS[name](state[name])
    tensor_files.forget()
    # Draws that no test has seeded are the same in whatever order tests run.
    keras.utils.set_random_seed(0)
    return _differing(state)


def _differing(state):
    return [name for name, value in snapshot().items() if value != state[name]]


def _logical_cpus():
    cpus = tf.config.list_physical_devices("CPU")
    found = tf.config.get_logical_device_configuration(cpus[0])
    return len(found or [None])


def _restore_optimizer_options(options):
    context.context()._optimizer_experimental_options = dict(options)
    # Functions that are called from now on are optimised by these options.
    context.context()._thread_local_data.function_call_options = None


def _restore_determinism(is_on):
    if is_on:
        tf.config.experimental.enable_op_determinism()
    else:
        config.disable_op_determinism()


def _restore_strategies_made(names):
    strategies._made[:] = names


def _restore_flags(given):
    flags.FLAGS.unparse_flags()
    for name, value in given.items():
        flags.FLAGS[name].value = value
        flags.FLAGS[name].present = 1


def _restore_environment(environment):
    for name in set(os.environ) - set(environment) - {_VARIABLE_OF_PYTEST}:
        del os.environ[name]
    os.environ.update(environment)


def _restore_signals(handlers):
    for number, handler in zip(_SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


def _restore_levels(levels):
    for name, level in zip(_LOGGERS, levels, strict=True):
        logging.getLogger(name).setLevel(level)


def _restore_handlers(handlers):
    for name, expected in zip(_LOGGERS, handlers, strict=True):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            is_own = type(handler).__module__.startswith("_pytest")
            if not is_own and handler not in expected:
                logger.removeHandler(handler)
        for handler in expected:
            logger.addHandler(handler)


def _restore_log_filters(filters):
    absl_logging.get_absl_handler().filters[:] = filters


def _restore_log_format(formatter):
    absl_logging.get_absl_handler().setFormatter(formatter)


def _restore_module_path(path):
    sys.path[:] = path


_RESTORERS = {
    "op determinism": _restore_determinism,
    "TF32": tf.config.experimental.enable_tensor_float_32_execution,
    "optimizer options": _restore_optimizer_options,
    "XLA for all graphs": tf.config.optimizer.set_jit,
    "eager functions": tf.config.run_functions_eagerly,
    "dtype policy": keras.config.set_dtype_policy,
    "floatx": keras.config.set_floatx,
    "image data format": keras.config.set_image_data_format,
    "strategies made": _restore_strategies_made,
    "progress bars of TFDS": tqdm_utils.display_progress_bar,
    "flags": _restore_flags,
    "environment": _restore_environment,
    "working directory": os.chdir,
    "module path": _restore_module_path,
    "signal handlers": _restore_signals,
    "log verbosity": absl_logging.set_verbosity,
    "log levels": _restore_levels,
    "log handlers": _restore_handlers,
    "log filters": _restore_log_filters,
    "log format": _restore_log_format,
}
