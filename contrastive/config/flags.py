# SPDX-License-Identifier: Apache-2.0
"""Command-line flags, their help and their table, made from the schema."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import flags

from contrastive.config import resolve as resolve_lib, schema
from contrastive.config.fields import Derived, shown
from contrastive.config.tables import Flag, Tables

_WIDTH = 79
_MANY = 12  # choices that fit into a help text


class _Parser(flags.ArgumentParser[Any]):
    """Parses the text of a flag as its field does."""

    def __init__(self, parse: Callable[[str], Any], syntax: str) -> None:
        super().__init__()
        self._parse = parse
        self.syntactic_help = syntax

    def parse(self, argument: Any) -> Any:
        """Returns the value of a text; raises ValueError if it has none."""
        return self._parse(str(argument))


def define(tables: Tables, registry: flags.FlagValues) -> None:
    """Defines all flags."""
    for flag in tables.flags().values():
        text = f"{flag.item.info.help} {default_text(flag, tables)}"
        # None: `resolve` knows the defaults.
        if flag.item.kind is bool and not flag.item.is_tuple:
            flags.DEFINE_bool(flag.name, None, text, flag_values=registry)
            continue
        parser = _Parser(flag.parse, _syntax(flag))
        flags.DEFINE(parser, flag.name, None, text, flag_values=registry)
    flags.DEFINE_alias("loss_type", "objective", flag_values=registry)


def given(registry: flags.FlagValues, tables: Tables) -> dict[str, Any]:
    """Returns the values of the flags on the command line by name."""
    return {name: registry[name].value for name in tables.flags() if registry[name].present}


def default_text(flag: Flag, tables: Tables) -> str:
    """Returns a sentence about the default of a flag."""
    default = flag.item.default
    if flag.owners:
        own = {k: item.default for k, item in flag.owners.items()}
        return _by_objective(own)
    own = {
        name: cls.defaults[flag.name]
        for name, cls in tables.objectives.items()
        if flag.name in cls.defaults
    }
    text = "" if default in (None, ()) else f"Default: {shown(default)}."
    if isinstance(default, Derived):
        text = f"Unset: {default.text}."
    return f"{text} {_by_objective(own) if own else ''}".strip()


def _by_objective(defaults: Mapping[str, Any]) -> str:
    """Returns defaults by objective, equal ones together."""
    names: dict[str, list[str]] = {}
    for objective, value in defaults.items():
        names.setdefault(_shown(value), []).append(objective)
    parts = (f"{text} ({', '.join(who)})" for text, who in names.items())
    return f"Default by objective: {'; '.join(parts)}."


def _shown(default: Any) -> str:
    return default.text if isinstance(default, Derived) else shown(default)


def _syntax(flag: Flag) -> str:
    """Returns the syntax of a flag's value, such as `<a|b>`."""
    if flag.choices:
        names = sorted(flag.choices)
        return f"<{'|'.join(names)}>" if len(names) <= _MANY else "NAME"
    name = {int: "INTEGER", float: "NUMBER", str: "TEXT"}[flag.item.kind]
    return f"{name},{name}" if flag.item.is_tuple else name


def help_page(tables: Tables, given: Mapping[str, Any], about: str) -> str:
    """Returns the help for a command line.

    Args:
        tables: of the program.
        given: values on the command line; with a mode, a train mode or an objective, only the flags
            that can apply beside it are shown.
        about: text at the top.
    """
    mode = given.get("mode")
    lines = [about.strip(), ""]
    if mode is None:
        lines.append("Modes (--mode=NAME --help shows the flags of one):")
        for name, command in tables.commands.items():
            lines += _entry(name, getattr(command, "help", ""))
    else:
        lines += [f"--mode={mode}: {tables.commands[mode].help}"]
    topics: dict[str, list[Flag]] = {}
    for flag in _shown_flags(tables, given):
        topics.setdefault(flag.item.topic, []).append(flag)
    for topic, members in topics.items():
        lines += ["", f"{topic}:"]
        for flag in members:
            lines += _flag_entry(flag, tables, given)
    return "\n".join(lines) + "\n"


def _shown_flags(tables: Tables, given: Mapping[str, Any]) -> Iterable[Flag]:
    """Yields the flags that can apply beside the mode and the objective."""
    narrowing = {"mode", "train_mode", "objective", "use_siglip", "preset"}
    base = {name: given[name] for name in narrowing & set(given)}
    if not base:
        yield from tables.flags().values()
        return
    command = tables.commands[base.get("mode", "train")]
    if schema.ObjectiveChoice not in command.groups:
        base = {"mode": base["mode"]}
    base.setdefault("checkpoint", resolve_lib.FROM_SCRATCH)
    view = resolve_lib.conditions_view(resolve_lib.resolve(base, tables, {}))
    # Conditions on other flags can still be met.
    decided = ["mode"]
    if len(base) > 2 or "mode" not in base:
        decided.append("train_mode")
    if "objective" in base:
        decided.append("objective")
    for flag in tables.flags().values():
        of_any = view
        if flag.owners and "objective" not in base:
            of_any = {**view, "objective": next(iter(flag.owners))}
        reason = resolve_lib.reason_without_effect(flag, of_any, tables, tuple(decided))
        if reason is None:
            yield flag


def _flag_entry(flag: Flag, tables: Tables, given: Mapping[str, Any]) -> list[str]:
    """Returns the lines of one flag."""
    is_switch = flag.item.kind is bool and not flag.item.is_tuple
    name = f"--[no]{flag.name}" if is_switch else f"--{flag.name}={_syntax(flag)}"
    objective = str(given.get("objective"))
    item = flag.owners.get(tables.aliases.get(objective, objective))
    if item:
        return _entry(name, f"{item.info.help} Default: {_shown(item.default)}.")
    owners: dict[str, list[str]] = {}  # by help text, equal ones together
    for objective, item in flag.owners.items():
        owners.setdefault(item.info.help, []).append(objective)
    texts = [flag.item.info.help]
    if len(owners) > 1:
        texts = [f"{', '.join(who)}: {text}" for text, who in owners.items()]
    return _entry(name, " ".join([*texts, default_text(flag, tables)]))


def _entry(name: str, text: str) -> list[str]:
    """Returns a name, and a text below it."""
    indent = " " * 6
    return [
        f"  {name}",
        *textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent),
    ]
