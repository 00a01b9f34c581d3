# SPDX-License-Identifier: Apache-2.0
"""Values that a run takes over from the one that it starts from."""

from __future__ import annotations

from typing import Any, Literal

from contrastive import run_record, storage
from contrastive.commands import networks
from contrastive.config import schema
from contrastive.config.fields import Field, Values, fields_of
from contrastive.config.resolve import FROM_SCRATCH
from contrastive.encoders.architecture import Architecture

_SETS = {"networks": ("networks",), "data": ("networks", "data")}


def recorded(run: dict[str, Any], which: Literal["networks", "data"]) -> dict[str, Any]:
    """Returns values of a run's record, the content of `run.json`.

    `which` is as `contrastive.config.fields.Info.inherit`.
    """
    if "flags" in run:
        values = run["flags"]
    else:  # an export
        architecture = Architecture.from_record(run["architecture"])
        values = run["architecture"] | networks.architecture_flags(architecture)
    return {
        name: _typed(item, values[name])
        for group in schema.GROUPS
        for name, item in fields_of(group).items()
        if item.info.inherit in _SETS[which] and name in values
    }


def _typed(item: Field, value: Any) -> Any:
    """Returns a value read from JSON in the type of its field."""
    if value is None or not item.is_tuple:
        return value
    return tuple(item.kind(element) for element in value)


def from_checkpoint(
    given: Values, which: Literal["networks", "data"] = "networks"
) -> dict[str, Any]:
    """Returns values of the run or weights that --checkpoint names.

    Raises:
        ValueError: if a weights file holds no encoder that is known.
    """
    path = given.get("checkpoint")
    if not path or path == FROM_SCRATCH:
        return {}
    # A dry run says so, and plans without it.
    if given.get("dry_run") and storage.why_unreachable(path):
        return {}
    if not _exists(path):
        return {}  # Commands refuse it, but for a dry run.
    run = run_record.read_run(path)
    if run is not None and "flags" in run:
        return recorded(run, which)
    from contrastive.weights import loading

    found = loading.read_published(path, target=given.get("evaluate_target", False))
    if found:
        flags = networks.architecture_flags(found.architecture)
        return recorded({"flags": flags}, which)
    return recorded(run, which) if run else {}


def _exists(path: str) -> bool:
    """Returns whether there is a directory, a file or a prefix of files."""
    return any(map(storage.exists, (path, f"{path}.index")))


def check_checkpoint(path: str) -> None:
    """Raises ValueError if there is nothing at the path of a checkpoint."""
    if not _exists(path):
        raise ValueError(
            f"No checkpoint at {path!r}. There is neither such a directory nor such a file."
        )
