# SPDX-License-Identifier: Apache-2.0
"""Programs in processes of their own, and what is said when they fail."""

import sys

import pytest

from tests.support import processes

_PRINT = "import sys; print('out'); print('err', file=sys.stderr); sys.exit({})"


def _words(code=0):
    return [sys.executable, "-c", _PRINT.format(code)]


def test_run_returns_what_the_process_has_written():
    assert processes.run(*_words()) == ("out\n", "err\n")


def test_run_with_another_exit_code_shows_the_whole_log():
    with pytest.raises(AssertionError, match=r"3, not 0(.|\n)*out(.|\n)*err"):
        processes.run(*_words(3))
    assert processes.run(*_words(3), code=3).stdout == "out\n"


def test_run_gives_and_removes_variables():
    code = "import os; print(os.environ.get('TF_CONFIG'))"
    words = [sys.executable, "-c", code]
    for value in ("1", None):
        environment = {"TF_CONFIG": value}
        finished = processes.run(*words, environment=environment)
        assert finished.stdout == f"{value}\n"


def test_run_of_a_process_that_hangs_ends_it_and_shows_its_log(monkeypatch):
    monkeypatch.setattr(processes, "_LIMIT_SECONDS", 0)
    code = "import time; time.sleep(600)"
    with pytest.raises(AssertionError, match="does not end"):
        processes.run(sys.executable, "-c", code)
    assert not processes._running


def test_wait_for_log_returns_while_the_process_runs():
    code = "import sys; sys.stderr.write('begun\\n'); sys.stdin.read()"
    process = processes.Process(sys.executable, "-c", code)
    process.wait_for_log("begun")
    process.finish()


def test_wait_until_the_process_has_ended_fails_with_its_log():
    process = processes.Process(*_words())
    with pytest.raises(AssertionError, match=r"too early(.|\n)*err"):
        process.wait_until(lambda: False)
    process.kill()


def test_end_all_ends_processes_that_still_run():
    code = "import time; time.sleep(600)"
    processes.Process(sys.executable, "-c", code)
    processes.end_all()
    assert not processes._running
