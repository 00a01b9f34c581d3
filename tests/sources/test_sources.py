# SPDX-License-Identifier: Apache-2.0
"""Tests of the table of the kinds of data."""

import json

import numpy as np
import pytest

import data
from contrastive.sources import arrays, openers
from tests.support import program


class _Toy:
    """Images of one colour, the class: `toy:N` has N of them."""

    def owns(self, request):
        return request.name.startswith("toy:")

    def load(self, request):
        labels = np.arange(int(request.name.split(":")[1])) % 2
        images = np.full((len(labels), 16, 16, 3), 200, np.uint8)
        images[labels == 0] = 50
        return arrays.in_memory(request, images, labels, ["dark", "bright"])

    outline = load


def test_kind_of_data_that_is_added_to_the_table_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(openers.OPENERS, "toy", _Toy())
    code = program.main(
        "--mode=train_then_eval",
        "--dataset=toy:40",
        f"--model_dir={tmp_path}",
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        "--train_batch_size=8",
        "--train_steps=2",
    )
    assert code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["num_examples"] == 40
    assert data.outline("toy:6").num_examples == 6


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cifar11", "train", "no dataset of this name.*'cifar10'"),
        ("./nowhere", "train", "no such folder.*nowhere"),
        ("./nowhere.npz", "train", "No .npz archive"),
        ("photo_patches", "tset", "'tset'.*{'train': 10000, 'test': 2000}"),
        ("photo_patches", "train[:0%]", "no examples in split"),
        ("photo_patches", "all[:50%]", "no examples in split 'all"),
    ],
)
def test_unknown_name_or_split_is_explained(name, split, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, split)
