# SPDX-License-Identifier: Apache-2.0
"""The protocol of commands: what `run.py` asks of a mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from contrastive.config.fields import Values
from contrastive.config.resolve import Resolved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A mode of the program.

    Attributes:
        help: what it does, in one sentence.
        groups: the configuration groups that it reads.
        prepare: checks all that can be refused and returns the work to do. Raises ValueError,
            OSError or an error of TensorFlow.
        inherits: from the values on the command line to values of the run that is continued or
            evaluated, by name.
    """

    help: str
    groups: tuple[type, ...]
    prepare: Callable[[Resolved], Callable[[], None]]
    inherits: Callable[[Values], dict[str, Any]] = lambda _: {}
