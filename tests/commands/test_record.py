# SPDX-License-Identifier: Apache-2.0
"""A directory is checked for an earlier run of other settings."""

import dataclasses
import json

import pytest

from contrastive.commands import record
from tests.support.replica_run import architecture


def _run(fields):
    return {
        "architecture": fields,
        "flags": {"train_mode": "pretrain", "checkpoint": None, "seed": 0},
    }


@pytest.fixture
def now():
    fields = dataclasses.asdict(architecture("simclr"))
    return json.loads(json.dumps(fields))


def test_compare_run_of_older_version_is_accepted(now):
    older = {k: v for k, v in now.items() if k not in ("shortcuts", "base_filters")}
    record._compare("runs/x", _run(older), _run(now), True)
    other = older | {"padding": "same"}
    with pytest.raises(ValueError, match="padding: same there"):
        record._compare("runs/x", _run(other), _run(now), True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train_mode", "finetune", "train_mode: finetune there, pretrain here"),
        ("checkpoint", "runs/y", "checkpoint: runs/y there, None here"),
    ],
)
def test_compare_other_origin_of_weights_raises(now, name, value, message):
    before = _run(now)
    before["flags"] |= {name: value}
    with pytest.raises(ValueError, match=message):
        record._compare("runs/x", before, _run(now), True)


def test_compare_other_flag_is_logged_if_asked(now, caplog):
    before = _run(now)
    before["flags"] |= {"seed": 1}
    record._compare("runs/x", before, _run(now), False)
    assert not caplog.text
    record._compare("runs/x", before, _run(now), True)
    assert "another flag than before: seed: 1 there, 0 here" in caplog.text
