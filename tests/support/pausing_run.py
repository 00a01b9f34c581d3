# SPDX-License-Identifier: Apache-2.0
"""Runs the program, which waits for a signal after it has saved a step.

    python pausing_run.py STEP [flags of run.py]

Writes "Paused." to standard error. So a signal arrives when the checkpoint is there and the run has
not ended, however fast or slow the machine is.
"""

import signal
import sys
import time

from absl import app

import run
from contrastive.training import checkpoints

_received = []


def main():
    step_to_pause_at = int(sys.argv.pop(1))
    save = checkpoints.TrainingCheckpoints.save

    def save_and_pause(self, step):
        save(self, step)
        if step == step_to_pause_at:
            _pause()

    checkpoints.TrainingCheckpoints.save = save_and_pause
    app.run(run.main, flags_parser=run.parse_flags)


def _pause():
    handler = signal.getsignal(signal.SIGTERM)

    def receive(number, frame):
        _received.append(number)
        handler(number, frame)

    signal.signal(signal.SIGTERM, receive)
    sys.stderr.write("Paused.\n")
    sys.stderr.flush()
    while not _received:
        time.sleep(0.01)


if __name__ == "__main__":
    main()
