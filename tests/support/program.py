# SPDX-License-Identifier: Apache-2.0
"""The command line, in the process of a test."""

from absl import flags
from absl.testing import flagsaver

import run


def resolve(*words):
    """Returns the settings of a command line, and where each comes from."""
    with flagsaver.flagsaver():
        _parse(words)
        return run.resolve_flags()


def main(*words) -> int:
    """Runs the program; returns its exit code."""
    with flagsaver.flagsaver():
        _parse(words)
        try:
            run.main(["run.py"])
        except SystemExit as error:
            return error.code
        return 0


def _parse(words):
    flags.FLAGS.unparse_flags()
    assert flags.FLAGS(["run.py", *words]) == ["run.py"]
