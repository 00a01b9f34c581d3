# SPDX-License-Identifier: Apache-2.0
"""Split expressions mean what TFDS takes them to mean."""

import re

import pytest
import tensorflow_datasets as tfds

from contrastive.sources import splits

_SHARDS = {"train": [40, 40, 23], "test": [17], "un-labelled_2": [1, 0, 6]}


def _of_tfds(expression):
    """Returns the range of each term; None for what TFDS refuses."""
    sizes = {"num_bytes": 0, "filename_template": None}
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=lengths, **sizes)
        for name, lengths in _SHARDS.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
    except (ValueError, NotImplementedError):
        return None
    return [
        (
            part.splitname,
            range(sum(_SHARDS[part.splitname]))[part.from_ : part.to],
        )
        for part in parts
    ]


_BOUNDS = ["", "0", "1", "7", "-1", "-7", "1_0", "41", "500", "-500", "1.5"]
_UNITS = ["%", "shard", ""]
_EXPRESSIONS = [
    "train",
    "all",
    "train+test",
    "train + test[:3]+un-labelled_2[50%:]",
    "train+all",
    "test+test",
    "train[33.3%:66.7%]",
    "train[-33.5%:]",
    "train[10:50%]",
    "train[:2%]",
    "train[101%:]",
    "train[]",
    "train[:]",
    "train[::]",
    "train[1:2:3]",
    "train[1-2]",
    "train[2shard]",
    "train[-1shard]",
    "train[5%]",
    "all[:50%]",
    "train[:50%",
    "train:50%]",
    "tset",
    "",
    "+",
    "train+",
    " train",
    *(f"train[{a}{u}]" for a in _BOUNDS for u in _UNITS),
    *(
        f"train[{first}{unit}:{last}{unit}]"
        for first in _BOUNDS
        for last in _BOUNDS
        for unit in _UNITS
    ),
]


@pytest.mark.parametrize("expression", _EXPRESSIONS)
def test_ranges_of_an_expression_equal_those_of_tfds(expression):
    expected = _of_tfds(expression)
    if expected is None or not any(part for _, part in expected):
        with pytest.raises(splits.NoSuchSplit, match=re.escape(repr(expression))):
            splits.ranges(expression, _SHARDS, "name")
    else:
        actual = splits.ranges(expression, _SHARDS, "name")
        assert [(name, list(part)) for name, part in actual] == [
            (name, list(part)) for name, part in expected
        ]


def test_select_counts_through_the_splits():
    sizes = {"train": 5, "test": 3}
    rows = splits.select("test+train[1:3]", sizes, "name")
    assert rows.tolist() == [5, 6, 7, 1, 2]
    with pytest.raises(splits.NoSuchSplit, match="'tset' of 'name'") as error:
        splits.select("tset", sizes, "name")
    assert error.value.splits == sizes
