# SPDX-License-Identifier: Apache-2.0
"""Fields of configuration dataclasses: default, bounds, help, applicability.

A configuration dataclass declares each of its values once:

    @group("Optimization")
    class Optimization:
        momentum: float = field(0.9, "Momentum.", minimum=0, maximum=1)

The command-line flag, its help text, its parser, the check of its bounds and the warning about a
flag without effect are all made from that declaration. Instead of by an argument, the help may be
given by the class's docstring: under "Attributes:", or, of a class with one field, as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, dataclass_transform

_INFO = "info"  # key of a dataclass field's metadata
_GROUP = "__config_group__"  # attribute of a configuration dataclass

T = TypeVar("T")
# Values of fields by name, as far as they are known.
Values = Mapping[str, Any]
Inheritance = Literal["never", "networks", "data"]


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition under which a field has an effect.

    Attributes:
        text: completes the sentence "It applies only ...".
        holds: returns whether the condition holds, from the values of all fields by name and, as
            "objective_type", the class of the objective.
        on: names of the fields that it depends on.
    """

    text: str
    holds: Callable[[Values], bool]
    on: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Derived:
    """The default of a field that is computed from the data or other fields.

    Attributes:
        text: completes the sentence "Unset: ..." of the help.
    """

    text: str


# Declares the default of a field as `Derived`; the field keeps its own type.
derived: Callable[[str], Any] = Derived


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What a field declares beside its type and default.

    Attributes:
        help: what the field is, in complete sentences.
        minimum: smallest value of each element, as `maximum` is the largest.
        positive: whether each element must be greater than 0.
        choices: allowed values, as on the command line; empty: all.
        table: name of the attribute of `tables.Tables` with the allowed values.
        length: number of elements of a tuple; 0: any number.
        ascending: whether the elements of a tuple must not decrease.
        check: raises ValueError for an element that is no value.
        applies: conditions, all of which must hold for an effect.
        inherit: whether a run that starts from another one takes over the value: "never";
            "networks", for all that start from its networks; "data", for those that also evaluate
            on its data; None: as the group says.
    """

    help: str = ""
    minimum: float | None = None
    maximum: float | None = None
    positive: bool = False
    choices: Sequence[str] = ()
    table: str = ""
    length: int = 0
    ascending: bool = False
    check: Callable[[Any], None] | None = None
    applies: tuple[Condition, ...] = ()
    inherit: Inheritance | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One field of one configuration dataclass, which is also a flag.

    Attributes:
        kind: bool, int, float or str; that of each element of a tuple.
        is_optional: whether None is a value.
        default: value, or `Derived`.
        info: the declaration.
        group: class that declares it.
        topic: title of the group.
    """

    name: str
    kind: type
    is_tuple: bool
    is_optional: bool
    default: Any
    info: Info
    group: type
    topic: str

    def parse(self, text: str) -> Any:
        """Returns the value of a command-line text.

        Raises:
            ValueError: if the text is no value of this field.
        """
        parts = [part.strip() for part in text.split(",") if part.strip()]
        texts = parts if self.is_tuple else [text]
        values = tuple(map(self._parse_one, texts))
        value = values if self.is_tuple else values[0]
        self.check(value)
        return value

    def check(self, value: Any) -> None:
        """Raises ValueError if a value is out of the field's bounds."""
        if value is None and self.is_optional:
            return
        elements = value if self.is_tuple else (value,)
        info = self.info
        if info.choices and not elements:
            raise ValueError(f"must be one of {', '.join(info.choices)}.")
        if info.length and len(elements) != info.length:
            raise ValueError(f"must be {info.length} values, such as a,b.")
        for element in elements:
            self._check_one(element)
        if info.ascending and list(elements) != sorted(elements):
            raise ValueError("must be a smallest and a largest value.")

    def _parse_one(self, text: str) -> Any:
        if self.kind is str:
            return text
        if self.kind is bool:
            word = text.lower()
            if word not in ("true", "t", "1", "false", "f", "0"):
                raise ValueError("must be true or false.")
            return word in ("true", "t", "1")
        try:
            return self.kind(text)
        except ValueError:
            noun = "an integer" if self.kind is int else "a number"
            raise ValueError(f"must be {noun}.") from None

    def _check_one(self, value: Any) -> None:
        info = self.info
        if info.choices and str(value) not in info.choices:
            raise ValueError(f"must be one of {', '.join(info.choices)}.")
        if info.check:
            info.check(value)
        if self.kind not in (int, float):
            return
        if not math.isfinite(value):
            raise ValueError("must be a finite number.")
        if info.positive and value <= 0:
            raise ValueError("must be greater than 0.")
        if info.minimum is not None and value < info.minimum:
            raise ValueError(f"must be at least {info.minimum:g}.")
        if info.maximum is not None and value > info.maximum:
            raise ValueError(f"must be at most {info.maximum:g}.")


def field(
    default: T,
    help: str = "",  # noqa: A002
    *,
    applies: Condition | tuple[Condition, ...] = (),
    **options: Any,
) -> T:
    """Declares a field; the arguments are the attributes of `Info`."""
    conditions = (applies,) if isinstance(applies, Condition) else applies
    info = Info(help=help, applies=conditions, **options)
    made: T = dataclasses.field(default=default, metadata={_INFO: info})
    return made


def redeclared(cls: type, name: str, default: T) -> T:
    """Declares a field of a base class again, with another default."""
    (item,) = (x for x in dataclasses.fields(cls) if x.name == name)
    made: T = dataclasses.field(default=default, metadata=item.metadata)
    return made


@dataclass_transform(frozen_default=True, kw_only_default=True)
def group(
    topic: str,
    *,
    applies: tuple[Condition, ...] = (),
    inherit: Inheritance = "never",
) -> Callable[[type[T]], type[T]]:
    """Makes a class a frozen configuration dataclass.

    The topic is the title of its flags in the help. All its fields have the conditions, and
    `inherit` unless they have their own; see `Info`.
    """

    def decorate(cls: type[T]) -> type[T]:
        made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        setattr(made, _GROUP, (topic, applies, inherit))
        return made

    return decorate


@functools.cache
def fields_of(cls: type) -> dict[str, Field]:
    """Returns the declared fields of a configuration dataclass by name."""
    topic, conditions, inherit = getattr(cls, _GROUP, (cls.__name__, (), None))
    found, texts = {}, _texts(cls)
    for item in dataclasses.fields(cls):
        info: Info = item.metadata[_INFO]
        kind, is_tuple, is_optional = _kind(_hint(cls, item.name))
        found[item.name] = Field(
            name=item.name,
            kind=kind,
            is_tuple=is_tuple,
            is_optional=is_optional,
            default=item.default,
            info=dataclasses.replace(
                info,
                help=info.help or texts[item.name],
                applies=(*conditions, *info.applies),
                inherit=info.inherit or inherit,
            ),
            group=cls,
            topic=topic,
        )
    return found


def _texts(cls: type) -> dict[str, str]:
    """Returns what the docstring of a class says about its attributes."""
    about, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\n\nAttributes:\n")
    parts = re.split(r"^ {4}(\w+): ", attributes, flags=re.MULTILINE)[1:]
    texts = parts or [item.name for item in dataclasses.fields(cls)] + [about]
    return {
        name: " ".join(text.split()) for name, text in zip(texts[::2], texts[1::2], strict=False)
    }


def _hint(cls: type, name: str) -> Any:
    """Evaluates the annotation of one field.

    Those of class variables may need TensorFlow and are not evaluated.
    """
    owner = next(c for c in cls.__mro__ if name in vars(c).get("__annotations__", {}))
    scope = vars(sys.modules[owner.__module__])
    holder = type(name, (), {"__annotations__": {name: owner.__annotations__[name]}})
    return typing.get_type_hints(holder, scope)[name]


def _kind(hint: Any) -> tuple[type, bool, bool]:
    """Returns element type, whether it is a tuple, whether None is a value."""
    is_optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (x for x in typing.get_args(hint) if x is not type(None))
        is_optional = True
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, is_optional
    return hint, False, is_optional


def build(cls: type[T], values: Values) -> T:
    """Returns a configuration dataclass filled from values by name.

    Raises:
        ValueError: if a value is out of its bounds; the message names the flag.
        KeyError: if a value is missing.
        TypeError: if a value is still to be derived.
    """
    taken = {}
    for name, item in fields_of(typing.cast(Any, cls)).items():
        value = values[name]
        if isinstance(value, Derived):
            raise TypeError(f"{name} has not been derived yet.")
        try:
            item.check(value)
        except ValueError as error:
            raise ValueError(f"--{name}={shown(value)} {error}") from None
        taken[name] = value
    return cls(**taken)


def shown(value: Any) -> str:
    """Returns a value as one would write it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
