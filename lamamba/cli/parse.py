"""From the words of a command line to options: tyro, with errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from typing import Any, TypeVar, get_type_hints

import tyro

T = TypeVar("T")


def parse(
    cls: type[T], arguments: list[str], verb: str, description: str, default: T | None = None,
    aliases: tuple[str, ...] = (),
) -> T:
    """Fill options from arguments. Prints help and exits where that is asked for.

    Args:
        cls: of the options.
        arguments: the words after the verb.
        verb, description: for the help.
        default: values of what is not given; by default the class's own.
        aliases: further names of options, from their tyro.conf.arg.

    Raises:
        ValueError: in one line, naming the nearest option for an unknown one, or the value that does not fit.
    """
    extra: dict[str, Any] = {} if default is None else {"default": default}
    errors, hint = io.StringIO(), f"(lamamba {verb} --help lists all options)"
    known = [*_names(cls), *aliases, "--help"]
    for word in arguments:
        if word.startswith("--") and (name := word.split("=")[0].replace("_", "-")) not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"Unrecognized options: {name}; did you mean {near}? {hint}")
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                cls, args=arguments, prog=f"lamamba {verb}", description=description,
                config=(tyro.conf.HelptextFromCommentsOff,), **extra,
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
    raise ValueError(f"{_one_line(errors.getvalue())} {hint}")


def _one_line(message: str) -> str:
    """tyro's message without its box, its title and the hints below its rule."""
    lines = [line.strip("│╭╮╰╯ ") for line in message.splitlines()]
    rules = [number for number, line in enumerate(lines) if line and line.strip("-─") == ""]
    first = 1 if "╭" in message else rules[0] + 1
    last = next((number for number in rules if number > first), len(lines))
    return re.sub(r"^Error parsing [A-Z]\w*: ", "", " ".join(lines[first:last]))


def _names(cls: Any, prefix: str = "") -> list[str]:
    """The options of a dataclass as the command line writes them."""
    names = []
    for field, hint in get_type_hints(cls).items():
        name = prefix + field.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            names += _names(hint, f"{name}.")
        else:
            names += [f"--{name}"] + ([f"--{prefix}no-{field.replace('_', '-')}"] if hint is bool else [])
    return names
