"""Options from the command line (tyro, with errors in one line), and results on standard output."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import tyro

T = TypeVar("T")


def parse(cls: type[T], arguments: list[str], verb: str, description: str | None, default: T | None = None) -> T:
    """Parse arguments into options. For --help, print it and exit with status 0.

    Args:
        cls: class of the options.
        arguments: the words after the verb.
        verb, description: for the help.
        default: options whose values replace the defaults of the class.

    Raises:
        ValueError: in one line: the nearest option for an unknown one, or the value that does not fit.
    """
    extra: dict[str, Any] = {} if default is None else {"default": default}
    errors, hint = io.StringIO(), f"(lamamba {verb} --help lists all options)"
    known = [*_names(cls), "--help"]
    for word in arguments:
        if word.startswith("--") and (name := word.split("=")[0].replace("_", "-")) not in known:
            raise ValueError(f"Unrecognized options: {name}{_suggestion(name, known)} {hint}")
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


def show(result: object) -> None:
    """Print a result, on rank 0 of the processes that a launcher has started."""
    from lamamba.utils.distributed import is_rank_zero

    if is_rank_zero():
        print(result)


def _one_line(message: str) -> str:
    """tyro's message without its box, its title and the hints below its rule. (tyro has no public error events.)"""
    lines = [line.strip("│╭╮╰╯ ") for line in message.splitlines()]
    rules = [number for number, line in enumerate(lines) if line and line.strip("-─") == ""]
    first = 1 if "╭" in message else rules[0] + 1
    last = next((number for number in rules if number > first), len(lines))
    text = re.sub(r"^Error parsing [A-Z]\w*: ", "", " ".join(lines[first:last]))
    text = re.sub(r"^Error parsing ([\w.]+): (?=\w+(\[\d+\])?=)", r"\1.", text)    # of a section
    wrong = "no type matching .*"                                               # of X | None and of tuples
    text = re.sub(wrong + r"float: (\S+) - typing\.Literal\[(.*?)\].*", r"\1 is neither a number nor \2", text)
    text = re.sub(wrong + r"input length (\d+) did not match expected argument count (\d+).*",
                  r"takes \2 values with spaces between them, not \1", text)
    text = re.sub(r"Argument (--\S+): expected (\d+) arguments?", r"\1 takes \2 values with spaces between them", text)
    text = re.sub(wrong + r"Could not parse arguments \[(.*?)\] into tuple.*", r"\1 are not all numbers", text)
    text = re.sub(wrong + r"(?=invalid literal for int|could not convert string)", "", text)
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text)
    text = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)
    return text.removeprefix("Error parsing ")


def _suggestion(unknown: str, names: list[str]) -> str:
    """The most similar name, in whatever order its words are: --data.no-labels for --no-data.labels. Or nothing."""
    def similarity(name: str) -> float:
        one, other = (" ".join(sorted(re.findall(r"[^-._]+", text))) for text in (unknown, name))
        return difflib.SequenceMatcher(None, one, other).ratio()

    nearest = max(names, key=similarity)
    return f"; did you mean {nearest}?" if similarity(nearest) >= 0.5 else ""


def _names(cls: Any, prefix: str = "") -> list[str]:
    """Names of a dataclass's options on the command line, with their aliases."""
    names = []
    for field, hint in get_type_hints(cls, include_extras=True).items():
        kind, *more = (hint.__origin__, *hint.__metadata__) if get_origin(hint) is Annotated else (hint,)
        name = field.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            names += _names(kind, f"{prefix}{name}.")
        else:
            names += [f"--{prefix}{name}"] + ([f"--{prefix}no-{name}"] if kind is bool else [])
        names += [alias for item in more for alias in getattr(item, "aliases", None) or ()]
    return names
