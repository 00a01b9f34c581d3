# SPDX-License-Identifier: Apache-2.0
"""Tensors without a known encoder, or that do not fit, are refused."""

import numpy as np
import pytest

import model
from contrastive.weights import published
from tests.support.foreign import pretrain


def _changed(change):
    content = pretrain("tiny_v2")
    change(content["experiment_state"]["online_params"])
    return {
        f"experiment_state/{tree}/{module}/{name}": np.asarray(array)
        for tree, tensors in content["experiment_state"].items()
        for module, arrays in tensors.items()
        for name, array in arrays.items()
    }


_BLOCK = "tiny_res_net/~/block_group_1/~/block_0/~"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.update({f"{_BLOCK}/sk_conv": {"w": np.ones((1, 2))}}),
            rf"(?s)selective kernels.*{_BLOCK}/sk_conv/w \(1, 2\)",
        ),
        (
            lambda p: p.pop(f"{_BLOCK}/conv_1"),
            r"block_group2_block1_conv2/kernel: none in the file, \(3, 3, 8, 8",
        ),
        (
            lambda p: p[f"{_BLOCK}/conv_1"].update(w=np.ones((3, 3, 8, 9))),
            r"\(3, 3, 8, 9\) in the file, \(3, 3, 8, 8\) here",
        ),
        (
            lambda p: p.update({f"{_BLOCK[:-3]}1/~/conv_0": {"w": np.ones((3, 3, 8, 8))}}),
            r"\(1, 2, 1, 1\) basic blocks are no ResNet",
        ),
        (
            lambda p: p.update({"other/~/initial_conv": p["tiny_res_net/~/initial_conv"]}),
            "2 online networks that may be meant",
        ),
    ],
)
def test_identify_tensors_that_do_not_fit_lists_them(change, message):
    with pytest.raises(ValueError, match=message):
        published.identify(_changed(change))


def test_identify_unknown_tensors_lists_them():
    tensors = {f"x{i:02}": np.ones(i) for i in range(30)}
    with pytest.raises(ValueError, match=r"(?s)x00 \(0,\).*and 10 more"):
        published.identify(tensors)


def test_identify_network_larger_than_file_raises_before_building_it():
    tensors = _changed(lambda _: None)
    huge = np.broadcast_to(np.float32(0), (3, 3, 64, 10**6))
    tensors["experiment_state/online_params/tiny_res_net/~/block_group_0/~/block_0/~/conv_0/w"] = (
        huge
    )
    with pytest.raises(ValueError, match="do not fit"):
        published.identify(tensors)


_RECORD = published._NOT_SHOWN | {
    "resnet_depth": 18,
    "width_multiplier": 1.0,
    "stem": "cifar",
    "padding": "same",
    "sk_ratio": 0.0,
    "se_ratio": 0.0,
    "channels": 3,
}


def test_read_architecture_fields_of_older_versions_are_ignored():
    older = {"of_another_version": 1, "critic_bias": 0.0, "queue_shape": []}
    expected = model.Architecture.from_record(_RECORD)
    assert model.Architecture.from_record(_RECORD | {"gone": 1}) == expected
    found = model.Architecture.from_record(older | _RECORD, stem="imagenet")
    assert found.stem == "imagenet"
    assert found.shortcuts == "always"


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        (_RECORD, {"resnet_dept": 50}, "no resnet_dept"),
        ({"stem": "cifar"}, {}, "resnet_depth"),
    ],
)
def test_read_architecture_unknown_change_or_missing_field_raises(record, changes, message):
    with pytest.raises(ValueError, match=message):
        model.Architecture.from_record(record, **changes)
