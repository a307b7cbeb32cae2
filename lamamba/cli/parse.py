"""From words on the command line to a dataclass: tyro, with our habits."""

from __future__ import annotations

import contextlib
import io
import re
from difflib import SequenceMatcher
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(cls: type[T], arguments: list[str], verb: str, description: str, default: T | None = None) -> T:
    """Fill a dataclass from arguments. Prints help and exits where that is asked for.

    Raises:
        ValueError: in one line, naming the nearest option for an unknown one, or the value that does not fit.
    """
    extra: dict[str, Any] = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                cls, args=arguments, prog=f"lamamba {verb}", description=description,
                config=(tyro.conf.HelptextFromCommentsOff,), **extra,
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
    raise ValueError(_one_line(errors.getvalue(), verb))


def _one_line(box: str, verb: str) -> str:
    """The gist of tyro's error message: a title, the gist, a rule, hints; in a box where the output is UTF-8."""
    lines = [stripped for line in box.splitlines() if (stripped := re.sub(r"[╭╮╰╯│]", "", line).strip())]
    lines = lines[1 if "╭" in box else 2 :]                                     # without a box, the title has a rule
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"─+|-+", line)] or [len(lines)]
    gist = " ".join(lines[: rules[0]])
    gist = re.sub(r"^Error parsing [A-Z]\w*: ", "", gist).replace("[bold]", "").replace("[/bold]", "").rstrip(" .:")
    near = [line for line in lines[rules[0]:] if line.startswith("--") and line[2:3].isalpha()]
    if gist.startswith("Unrecognized options:") and near:
        names = re.findall(r"--[A-Za-z][\w.-]*", near[0])                       # --x, and --no-x where it is a switch
        wanted = _words(gist.removeprefix("Unrecognized options:").split()[0])
        gist += f"; did you mean {max(names, key=lambda name: SequenceMatcher(None, wanted, _words(name)).ratio())}?"
    return f"{gist} (lamamba {verb} --help lists all options)"


def _words(option: str) -> str:
    """An option's words in the order of the alphabet, so that --no-x.y is near --x.no-y."""
    return " ".join(sorted(re.split(r"[-.]+", option)))
