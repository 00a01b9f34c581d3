# SPDX-License-Identifier: Apache-2.0
"""The command line, in the process of a test."""

from absl import flags
from absl.testing import flagsaver

import run
from contrastive.config import flags as config_flags


def given(*words):
    """Returns the values of the flags on a command line by name."""
    with flagsaver.flagsaver():
        _parse(words)
        return config_flags.given(flags.FLAGS, run.TABLES)


def resolve(*words):
    """Resolves a command line; logs flags without effect."""
    with flagsaver.flagsaver():
        _parse(words)
        return run.resolve_flags()


def parse(*words):
    """Parses a command line as the program does."""
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        return run.parse_flags(["run.py", *words])


def main(*words) -> int:
    """Runs the program; returns its exit code."""
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        try:
            run.main(run.parse_flags(["run.py", *words]))
        except SystemExit as error:
            return error.code
        return 0


def _parse(words):
    flags.FLAGS.unparse_flags()
    assert flags.FLAGS(["run.py", *words]) == ["run.py"]
