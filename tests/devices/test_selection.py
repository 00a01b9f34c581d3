# SPDX-License-Identifier: Apache-2.0
"""Tests of selection.py."""

import json

import pytest

from contrastive.devices import selection

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
    monkeypatch.setattr(selection, "has_tpu_chip", lambda: False)


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
def test_choose_strategy_takes_expected_one(wanted, machine, expected):
    assert selection.choose_strategy(wanted, **machine) == expected


def test_choose_strategy_auto_prefers_tpu_then_other_machines(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", _TWO_WORKERS)
    assert selection.num_workers() == 2
    assert selection.choose_strategy("auto", num_gpus=4) == "multi_worker"
    assert selection.num_replicas("multi_worker", num_gpus=0) == 2
    monkeypatch.setenv("TPU_NAME", "node-1")
    assert selection.choose_strategy("auto", num_gpus=4) == "tpu"
    chosen = selection.choose_strategy("auto", num_gpus=4, use_tpu=False)
    assert chosen == "multi_worker"
    monkeypatch.delenv("TPU_NAME")
    monkeypatch.setattr(selection, "has_tpu_chip", lambda: True)
    assert selection.choose_strategy("auto", num_gpus=4) == "tpu"


def test_choose_strategy_auto_one_worker_is_one_device(monkeypatch):
    alone = {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(alone))
    assert selection.choose_strategy("auto", num_gpus=0) == "one_device"


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
def test_choose_strategy_missing_devices_raise(wanted, config, message, monkeypatch):
    if config:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=message):
        selection.choose_strategy(wanted, num_gpus=1)


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([], False),
        ([("0x10de", "0x2330")], False),  # another maker's
        ([("0x1ae0", "0x0042")], False),  # Google's network card
        ([("0x1ae0", "0x0042"), ("0x1ae0", "0x0063")], True),
    ],
)
def test_has_tpu_chip_finds_pci_device(cards, expected, tmp_path, monkeypatch):
    monkeypatch.undo()
    for index, (vendor, device) in enumerate(cards):
        card = tmp_path / f"0000:00:0{index}.0"
        card.mkdir()
        (card / "vendor").write_text(f"{vendor}\n")
        (card / "device").write_text(f"{device}\n")
    assert selection.has_tpu_chip(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "machine", "expected"),
    [
        ("tpu", {"num_gpus": 0}, None),
        ("one_device", {"num_gpus": 4}, 1),
        ("mirrored", {"num_gpus": 4}, 4),
        ("mirrored", {"num_gpus": 0, "cpu_replicas": 2}, 2),
        # Several are wanted on another machine.
        ("mirrored", {"num_gpus": 1}, None),
        ("multi_worker", {"num_gpus": 4}, 8),
    ],
)
def test_num_replicas_of_machine(name, machine, expected, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", _TWO_WORKERS)
    assert selection.num_replicas(name, **machine) == expected
