# SPDX-License-Identifier: Apache-2.0
"""Exit codes and messages for the errors of a run."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from etils import epy

from contrastive.commands.evaluate import TrainerIsGone
from contrastive.weights.formats import CannotExport

with epy.lazy_imports():
    import tensorflow as tf

    import data
    from contrastive.commands import selftest
    from contrastive.devices import strategies
    from contrastive.evaluation import classifier
    from contrastive.training import checkpoints, loop

EXIT_USAGE = 2
_EXIT_DIVERGED = 3
_EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h

# Text of TensorFlow's errors when a bucket cannot be reached; their classes vary, and some become
# the text of other errors.
_NO_CONNECTION = "libcurl code"
# Errors of a connection, or of a disk on another machine, that may pass.
_NO_ANSWER = (ConnectionError, TimeoutError)
_PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.EHOSTDOWN, errno.ENETDOWN)


def exit_with(code: int, message: str) -> NoReturn:
    """Writes a message to standard error and exits."""
    sys.stderr.write(message + "\n")
    sys.exit(code)


def run_prepared(prepare: Callable[[], Callable[[], None]]) -> None:
    """Prepares and does the work of a command; exits if that fails.

    Args:
        prepare: returns the work; its errors are those of the user's input.
    """
    try:
        work = prepare()
    except Exception as error:
        outcome = _outcome_of_preparing(error)
        if not outcome:
            raise
        exit_with(*outcome)
    try:
        work()
    except BrokenPipeError:
        # The reader of standard output, such as `head`, has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        outcome = outcome_of_work(error)
        if not outcome:
            raise
        exit_with(*outcome)


def _tensorflow_is_loaded() -> bool:
    return "tensorflow" in sys.modules


def _outcome_of_preparing(error: Exception) -> tuple[int, str] | None:
    """Returns exit code and message; None for a defect of this program."""
    if lost := _lost(error):
        return lost
    is_tensorflow_s = _tensorflow_is_loaded() and isinstance(error, tf.errors.OpError)
    if isinstance(error, (ValueError, OSError)) or is_tensorflow_s:
        return EXIT_USAGE, f"Error: {_one_paragraph(error)}"
    return None


def outcome_of_work(error: Exception) -> tuple[int, str] | None:
    """Returns exit code and message for an error in the prepared work.

    Returns None for a defect of this program.
    """
    if isinstance(error, (OSError, CannotExport)):
        lost = _lost(error)
        return lost or (EXIT_USAGE, f"Error: {_one_paragraph(error)}")
    if not _tensorflow_is_loaded():
        return None
    if isinstance(error, loop.TrainingDiverged):
        return _EXIT_DIVERGED, f"Training stopped: {error}"
    if isinstance(error, loop.Interrupted):
        return 128 + error.signal_number, f"Interrupted. {error}"
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return EXIT_USAGE, (
            f"Error: a device or a disk is full: {_one_paragraph(error)} If it "
            "is the memory of a device: a smaller --train_batch_size, "
            "--accumulate_steps, --mixed_precision or --remat needs less."
        )
    if lost := _lost(error):
        return lost
    if isinstance(error, _input_errors()):
        return EXIT_USAGE, f"Error: {_one_paragraph(error)}"
    if message := data.undecodable_images_message(error):
        return EXIT_USAGE, f"Error: {message}"
    if isinstance(error, strategies.LOST):
        return _EXIT_TRY_AGAIN, _no_answer(error)
    return None


def _input_errors() -> tuple[type[Exception], ...]:
    """Returns errors of the input that only occur during the work."""
    return (
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
        tf.errors.AlreadyExistsError,
        tf.errors.DataLossError,
        loop.HostsDisagree,
        classifier.NoLabelledImage,
        selftest.ProcessFailed,
        checkpoints.CannotRestore,
    )


def _no_answer(error: Exception) -> str:
    return (
        f"A file system or server does not answer: {_one_paragraph(error)}\n"
        "The same command resumes from the last checkpoint."
    )


def _lost(error: Exception) -> tuple[int, str] | None:
    """Returns exit code and message if another machine has been lost."""
    if isinstance(error, TrainerIsGone):
        return _EXIT_TRY_AGAIN, str(error)
    if (
        isinstance(error, _NO_ANSWER)
        or getattr(error, "errno", None) in _PASSING_ERRORS
        or _NO_CONNECTION in str(error)
    ):
        return _EXIT_TRY_AGAIN, _no_answer(error)
    if not _tensorflow_is_loaded() or not strategies.is_lost(error, strategies.last_made()):
        return None
    return _EXIT_TRY_AGAIN, (
        "Lost the TPU or another machine, perhaps to preemption: "
        f"{_one_paragraph(error)}\nThe same command, on all machines, resumes "
        "from the last checkpoint."
    )


def _one_paragraph(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    return message.split("\n\n")[0]
