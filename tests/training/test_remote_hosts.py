# SPDX-License-Identifier: Apache-2.0
"""Other hosts read their part of the data, as those of a TPU pod do."""

import numpy as np
from PIL import Image

from tests.support import processes


def test_streams_on_other_hosts_read_their_part_of_the_data(tmp_path):
    """And say here what they could not read."""
    folder, out = tmp_path / "images", tmp_path / "out.npz"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(11):
        pixels = random.integers(0, 255, (24 + 2 * index, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    Image.fromarray(pixels).save(folder / "cut.png")
    Image.new("RGB", (40, 60), "gray").save(folder / "even.png")
    processes.run("tests/support/remote_hosts.py", folder, out)
    with np.load(out) as file:
        found = dict(file)
    for name in ("memory", "files", "masked", "evaluation"):
        here, there = (found[f"{name}/{w}"] for w in ("here", "there"))
        assert len(there) > 3 * 8 * 16 * 16
        np.testing.assert_array_equal(there, here, name)
    undecodable, implausible = found["reports/there"]
    assert undecodable == 1
    assert implausible >= 1
    np.testing.assert_array_equal(found["reports/there"], found["reports/here"])
