# SPDX-License-Identifier: Apache-2.0
"""Slices of Cloud TPUs and their names."""

import pytest

from contrastive.devices import tpu_compilation


@pytest.mark.parametrize(
    ("name", "chip", "topology", "replicas"),
    [
        ("v5litepod-16", "v5e", "4x4", 16),
        ("v5e-16", "v5e", "4x4", 16),
        ("V5E:4x8", "v5e", "4x8", 32),
        ("v5litepod-1", "v5e", "1x1", 1),
        ("v4-32", "v4", "2x2x4", 16),
        ("v4-8", "v4", "2x2x1", 4),
        ("v5p-128", "v5p", "4x4x4", 64),
        ("v6e-16", "v6e", "4x4", 16),
        ("v3-8", "v3", "2x2", 8),
        ("v3-64", "v3", "4x8", 64),
        ("v2-512", "v2", "16x16", 512),
    ],
)
def test_find_slice_by_rented_name_or_topology_finds_it(name, chip, topology, replicas):
    found = tpu_compilation.find_slice(name)
    assert (found.chip.name, found.topology) == (chip, topology)
    assert found.num_replicas == replicas
    assert found.request()["topology"] == f"{chip}:{topology}"


def test_find_slice_by_every_name_of_a_slice_finds_it():
    names = []
    for chip in tpu_compilation.CHIPS:
        for topology in chip.topologies.split():
            known = tpu_compilation.Slice(chip, topology)
            assert tpu_compilation.find_slice(known.name) == known
            assert tpu_compilation.find_slice(f"{chip.name}:{topology}") == known
            names.append(known.name)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["", "v5e", "v5litepod-12", "v5e:32x32", "v4:4x4", "v4-4", "v9-8"])
def test_find_slice_unknown_name_raises_with_all_slices(name):
    with pytest.raises(ValueError, match="v5litepod-32 \\(4x8\\)") as error:
        tpu_compilation.find_slice(name)
    assert f"Received: {name!r}" in str(error.value)
    assert "v4-32 (2x2x4)" in str(error.value)


def test_request_of_v4_is_for_chips_not_for_cores():
    assert tpu_compilation.find_slice("v4-8").request() == {
        "topology": "v4:2x2x1",
        "chip_config_name": "megacore",
    }
