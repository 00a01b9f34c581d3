# SPDX-License-Identifier: Apache-2.0
r"""Pretrains image encoders and measures what they learned.

    python run.py --train_mode=pretrain --objective=rpc --dataset=cifar10 python run.py
    --train_mode=finetune --mode=train_then_eval \
        --fine_tune_after_block=4 --checkpoint=runs/... --dataset=cifar10

A flag left unset takes its value from the checkpoint to be fine-tuned or evaluated, from the
preset, or from the objective; the log at start says which.
"""

import logging as std_logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

# Before TensorFlow is loaded: its start-up notes are a page, and without a GPU one of them is an
# error about that.
os.environ.setdefault(
    "TF_CPP_MIN_LOG_LEVEL",
    "2" if os.path.exists("/proc/driver/nvidia") else "3",
)

import model
import objective
from contrastive import commands
from contrastive.commands import outcome
from contrastive.config import flags as config_flags
from contrastive.config.resolve import Resolved, resolve
from contrastive.config.tables import Tables

FLAGS = flags.FLAGS
TABLES = Tables(
    commands=commands.COMMANDS,
    objectives=objective.OBJECTIVES,
    aliases=objective.ALIASES,
    encoders=model.ENCODERS,
)
_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.join(_HERE, "contrastive", "")
_HELP = ("-h", "-help", "--help", "-helpfull", "--helpfull")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses a command line into `FLAGS`; prints the help if it asks for it.

    Exits with 2 if the command line is wrong.
    """
    wants_help = any(word in _HELP for word in argv[1:])
    words = [word for word in argv if word not in _HELP]
    try:
        rest = FLAGS(words)
        if wants_help:
            given = config_flags.given(FLAGS, TABLES)
            sys.stdout.write(config_flags.help_page(TABLES, given, __doc__))
            sys.exit(0)
    except (flags.Error, ValueError) as error:
        outcome.exit_with(outcome.EXIT_USAGE, f"Error: {error}")
    if len(rest) > 1:
        outcome.exit_with(outcome.EXIT_USAGE, f"Error: not a flag: {' '.join(rest[1:])}")
    return rest


def resolve_flags() -> Resolved:
    """Resolves the parsed command line; logs flags without effect.

    Raises:
        ValueError: if flags contradict each other.
    """
    given = config_flags.given(FLAGS, TABLES)
    command = TABLES.commands[given.get("mode", "train")]
    resolved = resolve(given, TABLES, command.inherits(given))
    for line in resolved.without_effect:
        logging.warning(line)
    return resolved


def main(argv: Sequence[str]) -> None:
    """Runs the command that the flags name."""
    del argv
    set_up_log()
    outcome.run_prepared(prepare)


def prepare() -> Callable[[], None]:
    """Resolves the command line and returns the work of its command."""
    resolved = resolve_flags()
    if resolved["mode"] == "selftest":
        # Its steps run in other processes; this one must not hold the TPU, which TensorFlow takes
        # as it is imported.
        os.environ["TPU_LOAD_LIBRARY"] = "0"
    return commands.COMMANDS[resolved["mode"]].prepare(resolved)


def set_up_log() -> None:
    """Logs this program's lines with the time of day, not the libraries'.

    Only errors of libraries are logged: their warnings are about how this program calls them, which
    its users cannot change.
    """
    std_logging.getLogger("tensorflow").setLevel(std_logging.WARNING)
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(
        lambda record: (
            record.levelno > std_logging.WARNING
            or os.path.dirname(record.pathname) == _HERE
            or record.pathname.startswith(_PACKAGE)
        )
    )


config_flags.define(TABLES, FLAGS)

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
