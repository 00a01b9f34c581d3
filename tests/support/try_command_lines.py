# SPDX-License-Identifier: Apache-2.0
"""Tries many command lines in one process, without TensorFlow.

Reads a JSON list of command lines, each a list of words, from standard input. Writes a JSON list of
results: exit code, standard error, and the name of an exception that was not caught. A command line
that is accepted ends with code 0.
"""

import contextlib
import io
import json
import sys

_BANNED = ("tensorflow", "keras", "tensorflow_datasets")


class _NoTensorFlow:
    """Refuses imports of the libraries that take seconds."""

    def find_spec(self, name, path=None, target=None):  # noqa: ARG002
        """Raises ImportError for a banned module."""
        if name.partition(".")[0] in _BANNED:
            raise ImportError(f"{name} is imported")


def _try(words):
    """Returns what a command line ends with."""
    written, code, defect = io.StringIO(), 0, ""
    with (
        flagsaver.flagsaver(),
        contextlib.redirect_stderr(written),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        run.FLAGS.unparse_flags()
        try:
            run.parse_flags(["run.py", *words])
            outcome.run_prepared(run.prepare)
        except SystemExit as error:
            code = error.code
        except Exception as error:  # noqa: BLE001
            defect = f"{type(error).__name__}: {error}"
    return {"code": code, "stderr": written.getvalue(), "defect": defect}


if __name__ == "__main__":
    sys.meta_path.insert(0, _NoTensorFlow())
    from absl import logging
    from absl.testing import flagsaver

    import run
    from contrastive.commands import outcome

    logging.set_verbosity(logging.FATAL)
    json.dump([_try(words) for words in json.load(sys.stdin)], sys.stdout)
