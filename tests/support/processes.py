# SPDX-License-Identifier: Apache-2.0
"""Programs that tests run in processes of their own."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Only a process that hangs takes so long, however busy the machine is.
_LIMIT_SECONDS = 3600
_SECONDS_BETWEEN_POLLS = 0.02

_running = set()


class Finished(NamedTuple):
    """What a process has written."""

    stdout: str
    stderr: str


class Process:
    """A process with this environment.

    Args:
        *words: of the command; the first may be a script of Python.
        environment: variables that are added; None removes one.
        folder: where it works.
    """

    def __init__(self, *words, environment=None, folder=ROOT):
        words = [str(word) for word in words]
        if words[0].endswith(".py"):
            words.insert(0, sys.executable)
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        for name, value in (environment or {}).items():
            variables.pop(name, None)
            if value is not None:
                variables[name] = str(value)
        self._words = words
        # Files, which can be read meanwhile and never fill up as pipes do.
        self._files = [tempfile.TemporaryFile() for _ in range(2)]
        self._process = subprocess.Popen(
            words,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
        )
        self._started = time.monotonic()
        _running.add(self)

    def send(self, number):
        """Sends a signal."""
        self._process.send_signal(number)

    def wait_until(self, is_so):
        """Waits for a condition, which must hold before the process ends."""
        while not is_so():
            ended = self._process.poll() is not None
            # It may have become true after the first look.
            assert not ended or is_so(), self._report("has ended too early")
            self._check_time()
            time.sleep(_SECONDS_BETWEEN_POLLS)

    def wait_for_log(self, text):
        """Waits until the process has logged a text."""
        self.wait_until(lambda: text in self._read(1))

    def finish(self, code=0):
        """Waits for the end; returns what was written.

        Args:
            code: the exit code that is expected.
        """
        while self._process.poll() is None:
            self._check_time()
            time.sleep(_SECONDS_BETWEEN_POLLS)
        got = self._process.returncode
        report = self._report(f"ended with {got}, not {code}")
        finished = Finished(self._read(0), self._read(1))
        self.kill()
        assert got == code, report
        return finished

    def kill(self):
        """Ends the process and its own, and forgets what it wrote."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in self._files:
            file.close()
        _running.discard(self)

    def _check_time(self):
        if time.monotonic() - self._started > _LIMIT_SECONDS:
            report = self._report("does not end")
            self.kill()
            raise AssertionError(report)

    def _read(self, index):
        file = self._files[index]
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode(errors="replace")

    def _report(self, what):
        return (
            f"{' '.join(self._words)}\n{what}. Standard output:\n"
            f"{self._read(0)}\nStandard error:\n{self._read(1)}"
        )


def run(*words, code=0, **options):
    """Runs a process to its end; returns what it has written."""
    return Process(*words, **options).finish(code)


def end_all():
    """Ends what a failed test has left running."""
    for process in list(_running):
        process.kill()
