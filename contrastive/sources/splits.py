# SPDX-License-Identifier: Apache-2.0
"""Splits of a data set: expressions of them, and the tenth that is held out.

The expressions are TFDS's (https://www.tensorflow.org/datasets/splits), which takes seconds to
import.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from etils import epy

with epy.lazy_imports():
    import numpy as np

ALL = "all"  # every split
_NUMBER = r"(?:(-?[\d_.]+)(%|shard)?)?"
_TERM = re.compile(rf"([\w-]+)(\[{_NUMBER}(:)?{_NUMBER}\])?")


class NoSuchSplit(ValueError):
    """No examples; `splits` has the size of each split there is, by name."""

    def __init__(self, message: str, splits: Mapping[str, int]) -> None:
        super().__init__(message)
        self.splits = dict(splits)


def ranges(split: str, shards: Mapping[str, Sequence[int]], name: str) -> list[tuple[str, range]]:
    """Evaluates a split expression such as "train[:90%]+test".

    `shards` holds the number of examples in each shard, by name of the split, and `name` is that of
    the data set, for the message. Returns, for each term, the name of a split and a range of its
    examples.

    Raises:
        NoSuchSplit: if there are no such examples.
    """
    found: list[tuple[str, range]] = []
    unknown = None
    try:
        for term in re.split(r"\s*\+\s*", split):
            match = _TERM.fullmatch(term)
            if term == ALL:
                found += [(key, range(sum(n))) for key, n in shards.items()]
            elif match and match[1] in shards:
                found.append((match[1], _range(match, shards[match[1]])))
            else:
                raise ValueError(f"Unknown split {term!r} among {list(shards)}.")
    except ValueError as error:
        unknown = error
    if unknown or not any(part for _, part in found):
        sizes = {key: sum(lengths) for key, lengths in shards.items()}
        raise NoSuchSplit(
            f"There are no examples in split {split!r} of {name!r}. Its "
            f"splits are {sizes} (examples); parts such as 'train[:90%]' and "
            "sums such as 'train+test' are understood.",
            sizes,
        ) from unknown
    return found


def _range(match: re.Match, shards: Sequence[int]) -> range:
    """Evaluates a match of `_TERM`."""
    _, brackets, start, start_unit, colon, stop, stop_unit = match.groups()
    size, unit = sum(shards), start_unit or stop_unit
    if not brackets:
        return range(size)
    if not colon and (unit != "shard" or stop) or not (start or stop):
        raise ValueError(f"Not a slice: {match[0]!r}.")
    if not colon:
        stop = int(start) + 1
    if unit == "%":
        percent = [float(start or 0), float(stop or 100)]
        if max(map(abs, percent)) > 100:
            raise ValueError(f"Not percentages: {match[0]!r}.")
        first, last = (round(value * size / 100) for value in percent)
    elif unit == "shard":
        last = len(shards) if stop is None else int(stop)
        last = sum(shards[: last + len(shards) if last <= 0 else last])
        first = sum(shards[: int(start or 0)])
    else:
        first, last = int(start or 0), size if stop is None else int(stop)
    if max(abs(first), abs(last)) > size:
        raise ValueError(f"{match[0]!r} exceeds {size} examples.")
    first, last = (n + size if n < 0 else n for n in (first, last))
    return range(first, last)


def select(split: str, sizes: Mapping[str, int], name: str) -> np.ndarray:
    """Evaluates a split expression: numbers of examples, int64.

    They count through the splits of `sizes`, laid end to end.

    Raises:
        NoSuchSplit: if there are no such examples.
    """
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    found = ranges(split, {key: [size] for key, size in sizes.items()}, name)
    return np.concatenate([starts[key] + np.arange(part.start, part.stop) for key, part in found])


def is_held_out(name: str) -> bool:
    """Tells if an example is one of the tenth that is split "test".

    A hash of the name alone decides, so that examples that are added later move no other from one
    split to the other.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0
