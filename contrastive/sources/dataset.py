# SPDX-License-Identifier: Apache-2.0
"""A split of a data set, and the protocol of the storage behind it."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from absl import logging

from contrastive.sources import facts

if TYPE_CHECKING:
    import tensorflow as tf

    from contrastive.sources.order import Plan


class UndecodableImages(ValueError):
    """Too many images of a dataset do not decode."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `data.load` that say what is to be opened."""

    name: str
    split: str = "train"
    data_dir: str | None = None
    channels: int | None = None
    memory_limit: int = facts.MEMORY_LIMIT

    @property
    def path(self) -> str:
        """The name as a path, with "~" replaced."""
        return os.path.expanduser(self.name)


class Source(abc.ABC):
    """Storage of the N examples of a split; the id of each is its number.

    A source that is not encoded holds `images`, uint8 `[N, H, W, C]`, and `read` yields batches.
    Otherwise `read` yields rows, dictionaries of `id`, `epoch` and what `open_row` needs, which are
    decoded and cropped one by one.
    """

    kind: ClassVar[str]  # in words, for reports
    is_encoded: ClassVar[bool] = True
    has_random_access: ClassVar[bool] = True  # any example can be read alone
    images: Any
    labels: Any

    @abc.abstractmethod
    def read(self, plan: Plan, masks: np.ndarray | None) -> tf.data.Dataset:
        """Yields batches, with their masks if given, or rows; see above."""

    def open_row(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """Returns the encoded image and the label, int32, of a row."""
        raise NotImplementedError

    def read_labels(self) -> np.ndarray:
        """Returns the labels, int32 `[N]`, -1 where there is none."""
        return self.labels

    def has_label(self, ids: np.ndarray) -> bool:
        """Tells if some of the examples `ids` have a label."""
        return bool((self.read_labels()[ids] >= 0).any())

    def read_names(self) -> Sequence[str]:
        """Returns the name of each example; () where they have none."""
        return ()

    def path(self, example_id: int) -> str:
        """Returns the file of an example; "" where it has none of its own."""
        del example_id
        return ""

    @abc.abstractmethod
    def identity(self, ids: np.ndarray) -> tuple[list[Any], list[np.ndarray]]:
        """Returns JSON values and arrays that change when the examples do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One split of one dataset.

    Attributes:
        ids: int64 `[num_examples]`, ascending, where these are only some of the examples of
            `source`; None: all. They keep their ids.
        masks: foreground (1) and background (0): uint8 `[N, H, W]` of images in memory; otherwise a
            function from images, uint8 `[b, h, w, c]`, and their ids to uint8 `[b, h, w]`. None:
            unknown.
        undecodable: names of images a stream failed to decode; grows while streams run. A grey
            image of label -1 and weight 0 replaces them.
    """

    name: str  # or path, as given by the user
    split: str  # as given by the user, e.g. "train[:90%]"
    source: Source
    num_examples: int
    class_names: tuple[str, ...]  # one per label; () without labels
    channels: int  # of the images that streams yield
    image_size: tuple[int, int] | None  # height, width in pixels; None: varies
    ids: np.ndarray | None = None
    file_names: tuple[str, ...] = ()  # of `source`, relative to its folder
    masks: Any = None
    notes: tuple[str, ...] = ()  # for the user: images skipped, layout, ...
    unreadable: tuple[str, ...] = ()  # files left out, which do not decode
    undecodable: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def of(cls, request: Request, **fields: Any) -> Dataset:
        """Makes the dataset of a request; `class_names` is any iterable."""
        fields["class_names"] = tuple(fields["class_names"])
        return cls(name=request.name, split=request.split, **fields)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where there are no labels."""
        return len(self.class_names)

    @property
    def example_ids(self) -> np.ndarray:
        """Ids of the examples, int64 `[num_examples]`, ascending."""
        return np.arange(self.num_examples) if self.ids is None else self.ids

    @property
    def is_encoded(self) -> bool:
        """Whether streams decode and crop on the host."""
        return self.source.is_encoded

    def labels(self) -> np.ndarray:
        """Reads the labels, int32, -1 for none; of TFRecords, all records."""
        return self.source.read_labels()[self.example_ids]

    def has_labels(self) -> bool:
        """Tells if any example has a label; reads the start of TFRecords.

        The labels of some public test sets are all -1, although the names of the classes are known.
        """
        ids = self.example_ids
        return bool(self.num_classes) and self.source.has_label(ids)

    def names(self) -> list[str]:
        """Reads the file names; of a folder of images, relative paths.

        Raises:
            ValueError: if the examples have no names.
        """
        names = self.file_names or self.source.read_names()
        if not names:
            reason = "have no file names; list their ids."
            raise ValueError(f"The examples of {self.name!r} {reason}")
        return [names[i] for i in self.example_ids]

    def fingerprint(self) -> str:
        """Hashes what determines images and labels; see `Source.identity`."""
        digest = hashlib.blake2b(digest_size=16)
        values, arrays = self.source.identity(self.example_ids)
        for array in (self.example_ids, *arrays):
            digest.update(array.tobytes())
        known = [self.name, self.split, self.channels, self.num_examples]
        digest.update(json.dumps([*known, *values]).encode())
        return digest.hexdigest()

    def report_undecodable(self, example_id: int) -> None:
        """Names, once, an image that does not decode.

        Raises:
            UndecodableImages: if it is one of more than 1 % (at least 10) of all; see
                `data.undecodable_images_message`.
        """
        name = self.source.path(example_id)
        name = name or f"{self.name} {self.split}, example {example_id}"
        if name in self.undecodable:
            return
        self.undecodable.add(name)
        logging.warning("%s does not decode; a grey image replaces it.", name)
        count = len(self.undecodable)
        if count > max(10, self.num_examples // 100):
            raise UndecodableImages(
                f"Of {self.num_examples} images of {self.name!r}, {count} did "
                f"not decode, the last of them {name!r}. The log has the "
                "reasons."
            )


def some(names: Sequence[str], shown: int = 5) -> str:
    """Joins the first few of `names`, and says how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
