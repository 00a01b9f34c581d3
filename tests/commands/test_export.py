# SPDX-License-Identifier: Apache-2.0
"""Tests of `export.py`: the mode that writes networks for other programs."""

import dataclasses
import json

import model
from contrastive.weights import loading
from tests.support import program
from tests.support.replica_run import architecture


def test_export_reports_written_and_refused_formats(tmp_path, capsys):
    networks = model.build_networks(dataclasses.replace(architecture("simclr"), channels=1))
    path = tmp_path / "networks.safetensors"
    loading.save_tensors(networks, str(path))
    command = (
        f"--mode=export --checkpoint={path} --export_dir={tmp_path / 'out'} "
        "--format=safetensors,torchvision --seed=1"
    )
    assert program.main(*command.split()) == 2
    output = capsys.readouterr()
    assert "networks.safetensors: largest difference 0.0e+00" in output.out
    assert "torchvision  not written: " in output.out
    assert "Error: not written: torchvision." in output.err
    card = json.loads((tmp_path / "out" / "export.json").read_text())
    assert card["input"]["channels"] == 1
    assert card["input"]["size"] == 32
