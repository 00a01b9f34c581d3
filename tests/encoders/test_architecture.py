# SPDX-License-Identifier: Apache-2.0
"""Tests of architecture.py."""

import dataclasses
import json

import pytest

from contrastive.encoders.architecture import Architecture
from tests.support import replica_run


def test_from_record_of_own_json_is_equal():
    architecture = replica_run.architecture("byol")
    record = json.loads(json.dumps(dataclasses.asdict(architecture)))
    assert Architecture.from_record(record) == architecture


def test_from_record_unknown_fields_are_ignored_and_missing_get_defaults():
    architecture = replica_run.architecture("simclr")
    record = dataclasses.asdict(architecture) | {
        "learnable_temperature": False,
        "max_inverse_temperature": 5.0,
        "critic_bias": 0.0,
        "queue_shape": [],
        "of_another_version": 1,
    }
    for name in ("encoder", "shortcuts", "base_filters", "proj_bn"):
        del record[name]
    assert Architecture.from_record(record) == architecture


def test_from_record_required_field_missing_raises():
    record = dataclasses.asdict(replica_run.architecture("simclr"))
    del record["resnet_depth"]
    with pytest.raises(ValueError, match="lacks resnet_depth"):
        Architecture.from_record(record)


def test_without_pretraining_drops_predictor_and_target():
    architecture = replica_run.architecture("byol").without_pretraining()
    assert not architecture.predictor
    assert not architecture.target_network
