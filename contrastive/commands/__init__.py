# SPDX-License-Identifier: Apache-2.0
"""The modes of `run.py`: to add one, a new file here and a line below."""

from contrastive.commands.base import Command
from contrastive.commands.check_tpu import CHECK_TPU
from contrastive.commands.embed import EMBED, PREDICT
from contrastive.commands.evaluate import EVAL
from contrastive.commands.export import EXPORT
from contrastive.commands.probe import PROBE
from contrastive.commands.selftest import SELFTEST
from contrastive.commands.train import TRAIN, TRAIN_THEN_EVAL

COMMANDS: dict[str, Command] = {
    "train": TRAIN,
    "eval": EVAL,
    "train_then_eval": TRAIN_THEN_EVAL,
    "probe": PROBE,
    "embed": EMBED,
    "predict": PREDICT,
    "export": EXPORT,
    "selftest": SELFTEST,
    "check_tpu": CHECK_TPU,
}
