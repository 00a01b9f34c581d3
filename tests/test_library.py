# SPDX-License-Identifier: Apache-2.0
"""The library face: `from contrastive import load_encoder`."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import contrastive
from contrastive.weights import loading
from tests.support.encoders import random_networks

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_WITHOUT_TENSORFLOW = """
import sys
{statement}
found = {{"tensorflow", "keras", "numpy"}} & set(sys.modules)
assert not found, found
"""


@pytest.mark.parametrize("name", ["load_encoder", "load_classifier"])
def test_library_function_is_that_of_loading(name):
    assert getattr(contrastive, name) is getattr(loading, name)
    assert name in contrastive.__all__


def test_library_unknown_name_raises():
    with pytest.raises(AttributeError, match="no attribute 'load_nothing'"):
        _ = contrastive.load_nothing


@pytest.mark.parametrize(
    "statement",
    [
        "import contrastive",
        "from contrastive.weights import formats; formats.FORMATS",
        "from contrastive import run_record; run_record.read_run('.')",
    ],
)
def test_import_light_module_loads_no_tensorflow(statement):
    program = _WITHOUT_TENSORFLOW.format(statement=statement)
    subprocess.run([sys.executable, "-c", program], cwd=_ROOT, check=True)


def test_readme_example_gives_features(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (_ROOT / "README.md").read_text(), re.M | re.S)
    example = next(block for block in blocks if "load_encoder" in block)
    networks = random_networks(
        resnet_depth=10, width_multiplier=0.125, padding="same", stem="cifar"
    )
    path = str(tmp_path / "networks.safetensors")
    loading.save_tensors(networks, path)
    names = {"images": np.zeros((2, 16, 16, 3), np.float32)}
    exec(example.replace("runs/simclr", path), names)
    assert names["features"].shape == (2, 64)
