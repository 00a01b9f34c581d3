# SPDX-License-Identifier: Apache-2.0
"""The table of the kinds of data: a new kind is one file and one line here."""

from typing import Protocol

from contrastive.sources import folder, npz, photo_patches, tfds_sets
from contrastive.sources.dataset import Dataset, Request


class Opener(Protocol):
    """A module, or an object, that opens one kind of data.

    Each function raises a ValueError if the data, or the file system on which they lie, cannot be
    reached or read; `load` raises NoSuchSplit, a ValueError, if the split does not exist or is
    empty.
    """

    def owns(self, request: Request, /) -> bool:
        """Tells if the name is of this kind; looks at files if need be."""

    def load(self, request: Request, /) -> Dataset:
        """Opens a split, and decodes it if it is small."""

    def outline(self, request: Request, /) -> Dataset:
        """Describes what is known of a split without any download."""


# Asked from the last to the first: the first ones take what is left.
OPENERS: dict[str, Opener] = {
    "tfds": tfds_sets,
    "folder": folder,
    "npz": npz,
    "photo_patches": photo_patches,
}


def opener_of(request: Request) -> Opener:
    """Finds the opener of a data set; raises as `Opener.owns`."""
    return next(o for o in reversed(OPENERS.values()) if o.owns(request))
