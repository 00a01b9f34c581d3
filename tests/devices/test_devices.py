# SPDX-License-Identifier: Apache-2.0
"""Which devices are chosen, and what is said where there are none."""

import json

import pytest
import tensorflow as tf

from contrastive.devices import devices

_TWO_WORKERS = json.dumps(
    {
        "cluster": {"chief": ["a:1"], "worker": ["b:1"]},
        "task": {"type": "worker", "index": 0},
    }
)


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.delenv("TPU_NAME", raising=False)
    monkeypatch.setattr(devices, "has_tpu_chip", lambda: False)


@pytest.mark.parametrize(
    ("wanted", "machine", "expected"),
    [
        ("auto", {"num_gpus": 0}, "one_device"),
        ("auto", {"num_gpus": 1}, "one_device"),
        ("auto", {"num_gpus": 1, "cpu_replicas": 2}, "one_device"),
        ("auto", {"num_gpus": 2}, "mirrored"),
        ("auto", {"num_gpus": 0, "cpu_replicas": 2}, "mirrored"),
        ("one_device", {"num_gpus": 2}, "one_device"),
        ("tpu", {"num_gpus": 0}, "tpu"),
        # The older flags win where they are given.
        ("mirrored", {"num_gpus": 2, "use_tpu": True}, "tpu"),
        ("tpu", {"num_gpus": 2, "use_tpu": False}, "mirrored"),
        ("auto", {"num_gpus": 2, "tpu_named": True}, "tpu"),
        ("mirrored", {"num_gpus": 2, "tpu_named": True}, "tpu"),
        (
            "auto",
            {"num_gpus": 0, "tpu_named": True, "use_tpu": False},
            "one_device",
        ),
    ],
)
def test_the_strategy_that_is_chosen(wanted, machine, expected):
    assert devices.choose_strategy(wanted, **machine) == expected


def test_auto_takes_a_tpu_first_then_other_machines(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", _TWO_WORKERS)
    assert devices.num_workers() == 2
    assert devices.choose_strategy("auto", num_gpus=4) == "multi_worker"
    assert devices.num_replicas("multi_worker") == 2
    monkeypatch.setenv("TPU_NAME", "node-1")
    assert devices.choose_strategy("auto", num_gpus=4) == "tpu"
    chosen = devices.choose_strategy("auto", num_gpus=4, use_tpu=False)
    assert chosen == "multi_worker"
    monkeypatch.delenv("TPU_NAME")
    monkeypatch.setattr(devices, "has_tpu_chip", lambda: True)
    assert devices.choose_strategy("auto", num_gpus=4) == "tpu"


def test_one_worker_is_a_machine_alone(monkeypatch):
    alone = {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(alone))
    assert devices.choose_strategy("auto", num_gpus=0) == "one_device"


@pytest.mark.parametrize(
    ("wanted", "config", "message"),
    [
        ("multi_worker", None, "TF_CONFIG, which names the machines"),
        ("auto", "{", "TF_CONFIG must be JSON"),
        ("auto", "[1]", "TF_CONFIG must be JSON"),
        ("auto", '{"cluster": {"worker": 3}}', "TF_CONFIG must be JSON"),
        ("mirrored", None, "there are 1. To try it on a CPU"),
    ],
)
def test_what_is_wanted_and_not_there(wanted, config, message, monkeypatch):
    if config:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=message):
        devices.choose_strategy(wanted, num_gpus=1)


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([], False),
        ([("0x10de", "0x2330")], False),  # another maker's
        ([("0x1ae0", "0x0042")], False),  # Google's network card
        ([("0x1ae0", "0x0042"), ("0x1ae0", "0x0063")], True),
    ],
)
def test_a_tpu_is_seen_on_the_bus(cards, expected, tmp_path, monkeypatch):
    monkeypatch.undo()
    for index, (vendor, device) in enumerate(cards):
        card = tmp_path / f"0000:00:0{index}.0"
        card.mkdir()
        (card / "vendor").write_text(f"{vendor}\n")
        (card / "device").write_text(f"{device}\n")
    assert devices.has_tpu_chip(tmp_path) == expected


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
def test_a_tpu_that_does_not_start_is_one_line(
    name, has_chip, error, line, monkeypatch
):
    monkeypatch.setattr(devices, "has_tpu_chip", lambda: has_chip)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(
        tf.distribute.cluster_resolver, "TPUClusterResolver", fail
    )
    with pytest.raises(ValueError, match="TPU") as raised:
        devices.make_strategy("tpu", tpu_name=name)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_name_is_looked_up_and_an_address_is_not(monkeypatch):
    looked_up = []
    monkeypatch.setattr(devices, "_tpu_strategy", _one_device)
    monkeypatch.setattr(devices.cloud_tpu, "find", lambda *a: a)
    monkeypatch.setattr(
        devices.cloud_tpu,
        "wait_until_ready",
        lambda client, **more: looked_up.append((client, more["minutes"])),
    )
    for name in ("local", "grpc://1.2.3.4:8470"):
        devices.make_strategy("tpu", tpu_name=name)
    assert not looked_up
    monkeypatch.setenv("TPU_NAME", "node-1")
    devices.make_strategy("tpu", tpu_zone="z", tpu_wait_minutes=3)
    assert looked_up == [(("node-1", "z", None), 3)]


def _one_device(*_):
    return tf.distribute.OneDeviceStrategy("/cpu:0")
