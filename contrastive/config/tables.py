# SPDX-License-Identifier: Apache-2.0
"""The tables that names on the command line are looked up in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from contrastive.config import recipes, schema
from contrastive.config.fields import Field, Values, fields_of


class ObjectiveType(Protocol):
    """The attributes of an objective's class that the configuration reads."""

    multi_view: bool
    uses_labels: bool
    differentiates_twice: bool
    defaults: Values
    small_images: Values
    without_target: Values
    synonyms: Mapping[str, str]

    @classmethod
    def derive(cls, values: Values) -> Values: ...  # noqa: D102
    @classmethod
    def check(cls, values: Values) -> None: ...  # noqa: D102


class CommandType(Protocol):
    """The attributes of a command that the configuration reads."""

    @property
    def help(self) -> str: ...  # noqa: D102
    @property
    def groups(self) -> tuple[type, ...]: ...  # noqa: D102
    @property
    def inherits(self) -> Callable[[Values], Values]: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Flag:
    """One command-line flag.

    Attributes:
        item: its field; of several objectives' fields, the first one.
        owners: fields by objective; empty for a field that is common to all.
        choices: allowed values; empty: no restriction.
    """

    name: str
    item: Field
    owners: dict[str, Field]
    choices: Sequence[str]

    def field_of(self, objective: str) -> Field | None:
        """Returns the field under an objective; None if it has none."""
        return self.owners.get(objective) if self.owners else self.item

    def parse(self, text: str) -> Any:
        """Returns the value of a command-line text.

        Bounds that only some objectives have are checked once the objective is known.

        Raises:
            ValueError: if the text is no value of this flag.
        """
        if self.choices and not self.item.is_tuple and (text not in self.choices):
            known = ", ".join(sorted(self.choices))
            raise ValueError(f"must be one of {known}.")
        errors = []
        for item in self.owners.values() or [self.item]:
            try:
                return item.parse(text)
            except ValueError as error:
                errors.append(error)
        raise errors[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables that the names of flags' values are looked up in.

    Commands are listed by their modes; aliases are other names of objectives.
    """

    commands: Mapping[str, CommandType]
    objectives: Mapping[str, Any]
    aliases: Mapping[str, str]
    encoders: Iterable[str]

    @property
    def presets(self) -> list[str]:
        """Names of all presets."""
        return sorted({**recipes.PRETRAINING, **recipes.EVALUATION})

    def choices(self, item: Field) -> list[str]:
        """Returns the allowed values of a field; none if it has no table."""
        if item.info.table == "objectives":
            return [*self.objectives, *self.aliases]
        if item.info.table:
            return list(getattr(self, item.info.table))
        return list(item.info.choices)

    def flags(self) -> dict[str, Flag]:
        """Returns every flag by name, in the order of the help."""
        found = {
            name: Flag(name, item, {}, self.choices(item))
            for group in schema.GROUPS
            for name, item in fields_of(group).items()
        }
        common = set(found)
        for objective, cls in self.objectives.items():
            for name, item in fields_of(cls).items():
                if name in common:
                    raise ValueError(f"{name} is the name of two fields.")
                new = Flag(name, item, {}, item.info.choices)
                found.setdefault(name, new).owners[objective] = item
        return found

    def modes_that_read(self, group: type) -> list[str]:
        """Returns the modes whose commands read a group."""
        return [k for k, v in self.commands.items() if group in v.groups]
