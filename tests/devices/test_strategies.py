# SPDX-License-Identifier: Apache-2.0
"""Strategies: the TPU is connected to, or the error says why not."""

import pytest
import tensorflow as tf

from contrastive.devices import strategies


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.delenv("TPU_NAME", raising=False)


# As TensorFlow 2.20 says it.
_NO_KERNEL = (
    "TPUs not found in the cluster. Failed in initialization: No OpKernel was "
    "registered to support Op 'ConfigureDistributedTPU' used by {{node "
    "ConfigureDistributedTPU}}"
)


@pytest.mark.parametrize(
    ("name", "has_chip", "error", "line"),
    [
        (
            "local",
            True,
            tf.errors.NotFoundError(None, None, _NO_KERNEL),
            "pip install -r requirements/tpu.txt",
        ),
        (
            "local",
            False,
            tf.errors.NotFoundError(None, None, _NO_KERNEL),
            "No TPU found on this machine.",
        ),
        (
            "local",
            True,
            tf.errors.InternalError(None, None, "The TPU is in use\nby 1."),
            "does not start, perhaps because another process has it: The TPU",
        ),
        (
            "grpc://10.0.0.2:8470",
            False,
            tf.errors.UnavailableError(None, None, "failed to connect"),
            "No TPU answers as 'grpc://10.0.0.2:8470': failed to connect",
        ),
    ],
)
def test_make_strategy_tpu_does_not_start_raises_one_line(name, has_chip, error, line, monkeypatch):
    monkeypatch.setattr(strategies, "has_tpu_chip", lambda: has_chip)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", fail)
    with pytest.raises(ValueError, match="TPU") as raised:
        strategies.make_strategy("tpu", tpu_name=name)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_make_strategy_looks_up_names_but_not_addresses(monkeypatch):
    looked_up = []
    monkeypatch.setattr(strategies, "_tpu_strategy", _one_device)
    monkeypatch.setattr(strategies.cloud_tpu, "find", lambda *a: a)
    monkeypatch.setattr(
        strategies.cloud_tpu,
        "wait_until_ready",
        lambda client, **more: looked_up.append((client, more["minutes"])),
    )
    for name in ("local", "grpc://1.2.3.4:8470"):
        strategies.make_strategy("tpu", tpu_name=name)
    assert not looked_up
    monkeypatch.setenv("TPU_NAME", "node-1")
    strategies.make_strategy("tpu", tpu_zone="z", tpu_wait_minutes=3)
    assert looked_up == [(("node-1", "z", None), 3)]


def _one_device(*_):
    return tf.distribute.OneDeviceStrategy("/cpu:0")
