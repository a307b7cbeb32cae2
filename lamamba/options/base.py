"""How options are declared: frozen dataclasses, checked when made, in Python, from TOML, JSON or a command line.

What files hold is a `@record`, or a dataclass with `@checked` above it, and is checked by `from_dict` when it is read.

    @options
    class Resize:
        image_size: Annotated[int, Ge(1)] = 256
        \"\"\"Side in pixels.\"\"\"

    Resize(image_size=0)                    ValueError: image_size=0 must be at least 1
    from_dict(Train, {"data": {"x": 1}})    ValueError: option 'data.x' is unknown ...

pydantic does the checking; its reports become one line with the path of the field.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import tyro
from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    ConfigDict,
    Strict,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic.dataclasses import dataclass as validated_dataclass
from typing_extensions import dataclass_transform
from tyro.constructors import PrimitiveConstructorSpec

from lamamba.config import unknown_name
from lamamba.utils.files import check_current_folder, read_json, read_text
from lamamba.utils.progress import check_progress
from lamamba.utils.text import shown

T = TypeVar("T")


def not_empty(value: Any) -> Any:
    """An empty path would be the current folder."""
    if value == "":
        raise ValueError("an empty path; leave it out, or give . for the current folder")
    return value


def one_word(
    metavar: str, kind: type, read: Callable[[str], Any] = str, write: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec[Any]:
    """How the command line reads an option from one word, which is checked later, and writes its default."""
    return PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, kind), str_from_instance=lambda value: [write(value)],
    )


# the command line leaves text, so that not_empty sees it: Path("") is the current folder
FilePath = Annotated[Path, Strict(False), BeforeValidator(not_empty), one_word("PATH", Path)]
"""A Path; text is taken for one."""
Name = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else not_empty(value))]
"""A name or a path as text, such as a folder or a hub id; a Path is taken for one."""
Positive = Annotated[int, Ge(1)]
Above0 = Annotated[float, Gt(0)]
"""Whole numbers from 1, and numbers above 0."""
MAX_THREADS = 1024
Threads = Annotated[int, Ge(1), Le(MAX_THREADS)]
"""Of a process: thousands end it where the system starts no more."""
OrInfinity = Annotated[float, AllowInfNan(True), BeforeValidator(lambda value: math.inf if value == "inf" else value)]
"""A number that may be infinite; JSON files hold "inf"."""


def _split(item: type, value: Any) -> Any:
    """Tuples of "1,2" and of 1."""
    if isinstance(value, str):
        try:
            return tuple(item(word.strip()) for word in value.split(","))
        except ValueError:
            kind = {int: "whole numbers", float: "numbers"}[item]
            raise ValueError(f"{value!r} is not a list of {kind} with commas, as in 1,2") from None
    return (value,) if isinstance(value, int | float) else value


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """Each name once, and none empty."""
    for name in names:
        if not name.strip():
            raise ValueError(f"{','.join(names)!r} has an empty name; leave it out")
        if names.count(name) > 1:
            raise ValueError(f"{','.join(names)!r} has {name} twice; once is enough")
    return names


def _splits(item: type) -> BeforeValidator:
    return BeforeValidator(functools.partial(_split, item))


def _word(item: type) -> PrimitiveConstructorSpec[Any]:
    """On the command line: one word with commas."""
    name = {int: "INT", float: "FLOAT", str: "NAME"}[item]
    return one_word(
        f"{name},{name},..", tuple, functools.partial(_split, item), lambda value: ",".join(map(str, value)))


PositiveInts = Annotated[tuple[Positive, ...], _splits(int), Strict(False), _word(int)]
Numbers = Annotated[tuple[float, ...], _splits(float), Strict(False), _word(float)]
Words = Annotated[tuple[str, ...], _splits(str), Strict(False), AfterValidator(_distinct), _word(str)]
Labels = Annotated[tuple[int | str, ...], _splits(str), Strict(False), _word(str)]
"""Several values; the command line reads them from one word with commas: 256,512."""

Quantization = Literal["int8", "int8-dynamic", "fp8"]
"""Weights in eight bits; of the last two activations, too."""

__all__ = [
    "MAX_THREADS", "Above0", "FilePath", "Ge", "Gt", "Labels", "Le", "Lt", "Name", "Numbers", "OrInfinity",
    "Positive", "PositiveInts", "Quantization", "Threads", "Words", "checked", "from_dict", "joint_checks_later",
    "options", "read_record", "read_toml", "record", "verb",
]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass whose fields are checked when it is made.

    Types are strict (True is no number, "3" is no 3), but lists serve as tuples, NumPy numbers as Python's, and whole
    numbers as floats. Numbers are finite. Ranges are annotations: Annotated[int, Ge(1)].

    Raises (the class, when called):
        ValueError: in one line: field, what came, what fits.
    """
    _show_plainly(cls)
    if "__post_init__" in vars(cls):
        cls.__post_init__ = _unless_later(cls.__post_init__)  # type: ignore[attr-defined]
    made: Any = validated_dataclass(
        cls, frozen=True, kw_only=True,
        config=ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False),
    )
    check = made.__init__

    @functools.wraps(check)
    def __init__(self: Any, **values: Any) -> None:
        plain = {name: _plain(value) for name, value in values.items()}
        _check_whole_numbers(plain)
        try:
            check(self, **plain)
        except ValidationError as error:
            raise ValueError(_explain(made, error)) from None

    made.__init__ = __init__
    return made


_later = ContextVar("later", default=False)


@contextmanager
def joint_checks_later() -> Iterator[None]:
    """Options that are made here are checked one by one only, not whether they go together (`__post_init__`).

    For those of a file which others are still to replace: what is made of both is checked.
    """
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


def _unless_later(check: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(check)
    def __post_init__(self: Any) -> None:
        if not _later.get():
            check(self)

    return __post_init__


def _show_plainly(cls: type) -> None:
    """Help of the command line: "--width INT" for an int that may be None; no "(default: None)"."""
    hints = get_type_hints(cls, include_extras=True)
    for name in inspect.get_annotations(cls):
        more = getattr(hints[name], "__metadata__", ())
        if getattr(cls, name, ...) is None and not any(getattr(item, "metavar", None) for item in more):
            shown = tyro.conf.arg(metavar=_metavar(hints[name]), help_behavior_hint="")
            cls.__annotations__[name] = Annotated[hints[name], shown]


def _metavar(hint: Any) -> str:
    """A type in the words of the command line: INT, FLOAT FLOAT, {all,first-three}."""
    if given := [item.metavar for item in getattr(hint, "__metadata__", ()) if getattr(item, "metavar", None)]:
        return given[0]
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Annotated:
        return _metavar(hint.__origin__)
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if get_origin(hint) is tuple:
        return " ".join(_metavar(part) for part in parts)
    return "|".join(_metavar(part) for part in parts) if parts else hint.__name__.upper()


checked = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
"""Of a dataclass that files hold: `from_dict` refuses unknown entries, other types and infinities, at any depth."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def record(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass that files hold, `checked`."""
    return checked(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


def from_dict(cls: type[T], values: Any, where: str | Path = "") -> T:
    """Options or a record from nested plain values, as TOML and JSON files hold them; missing ones keep their defaults.

    Args:
        cls: made by `options` or `record`, or `checked`.
        values: lists serve as tuples, whole numbers as floats.
        where: the file that they come from, for messages.

    Raises:
        ValueError: for an unknown entry (the nearest is named) or a value that does not fit, with its path.
    """
    try:
        _check_whole_numbers(values)
        return _adapter(cls).validate_json(json.dumps(values, default=_jsonable))
    except RecursionError:
        raise ValueError(f"{where or cls.__name__} is nested too deeply") from None
    except _TooLarge as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(cls, error)}" if where else _explain(cls, error)) from None


def read_record(cls: type[T], path: Path, newest_version: int | None = None) -> T:
    """A record from a JSON file; its version is compared with the newest that the caller can read.

    Raises:
        OSError: when the file may not be read.
        ValueError: when it is missing, damaged, of a newer format, or a value does not fit.
    """
    return from_dict(cls, read_json(path, newest_version), path)


class _TooLarge(ValueError):
    """A whole number that no option and no file holds."""


def _check_whole_numbers(values: Any, path: str = "") -> None:
    """Check that whole numbers, at any depth, have 64 bits at most: others are in nobody's reach, and no floats."""
    if isinstance(values, dict):
        for key, value in values.items():
            _check_whole_numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            if not isinstance(value, str):                                      # of which a set has a million
                _check_whole_numbers(value, f"{path}[{number}]")
    elif isinstance(values, int) and not -(2**63) <= values < 2**64:
        digits = str(values) if values.bit_length() < 10_000 else f"a number of {values.bit_length():,} bits"
        given = digits if len(digits) < 40 else f"{digits[:20]}..."
        raise _TooLarge(f"{path}={given} is too large: whole numbers are below 2^64 here")


_adapter: Any = functools.cache(TypeAdapter)

P = ParamSpec("P")


def verb(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function of `options` refuse what is not of its annotation, and a `progress` that cannot be reported to.

    Raises (the function, when called):
        TypeError: naming the options that fit.
        ValueError: for the progress.
        FileNotFoundError: when the current folder was removed.
    """
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        hint, bound = get_type_hints(function)["options"], inspect.signature(function).bind(*args, **kwargs)
        if "options" in bound.arguments and not isinstance(given := bound.arguments["options"], hint):
            name, kind = function.__name__, (get_args(hint) or (hint,))[0].__name__
            raise TypeError(f"lamamba.{name} takes {kind}, not {shown(given)}: lamamba.{name}(lamamba.{kind}(...))")
        check_progress(bound.arguments.get("progress"))
        check_current_folder()
        return function(*args, **kwargs)

    return call


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ValueError: when it is none.
    """
    try:
        import tomllib
    except ModuleNotFoundError:                                                 # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error


def _plain(value: Any) -> Any:
    """Lists and NumPy's rows as tuples, NumPy's numbers as Python's."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    dimensions = getattr(value, "ndim", None) if type(value).__module__ == "numpy" else None
    return value.item() if dimensions == 0 else tuple(value.tolist()) if dimensions == 1 else value


def _jsonable(value: Any) -> Any:
    """NumPy's numbers as Python's, anything else that JSON does not know as text."""
    plain = _plain(value)
    return plain if isinstance(plain, int | float) else str(value)


_KINDS = {
    "int": "a whole number", "float": "a number", "string": "text", "bool": "true or false", "path": "a path",
    "tuple": "a list", "dict": "named values", "dataclass": "a section with options of its own",
}


def _explain(cls: Any, error: ValidationError) -> str:
    """The first fault of a report in one line; an unknown name before the one that is missing for it."""
    faults = error.errors(include_url=False)
    fault = next((each for each in faults if each["type"] == "unexpected_keyword_argument"), faults[0])
    kind, value, limits = fault["type"], fault["input"], fault.get("ctx", {})
    given = shown(value, 100)
    owner, path = _follow(cls, fault["loc"])
    if kind == "unexpected_keyword_argument":
        prefix = f"{path}." if path else ""
        known = [prefix + field.name for field in dataclasses.fields(owner)]
        return str(unknown_name("option", f"{prefix}{fault['loc'][-1]}", known))
    if kind == "value_error":                                                   # of a check of ours
        return f"{path}: {limits['error']}" if path else str(limits["error"])
    if kind == "literal_error":
        known = _words(get_type_hints(owner)[path.rpartition(".")[2].split("[")[0]])
        return str(unknown_name(path, f"{value!s:.100}", known))
    if kind == "missing":
        return f"{path} is missing"
    if kind == "finite_number":
        return f"{path}={given} must be finite"
    for limit, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if limit in limits:
            return f"{path}={given} must be {words} {limits[limit]:g}"
    expected = next((words for name, words in _KINDS.items() if kind.startswith(name)), None)
    return f"{path}={given} must be {expected}" if expected else f"{path}={given}: {fault['msg']}"


def _follow(cls: Any, location: tuple[int | str, ...]) -> tuple[Any, str]:
    """The dataclass that a path of pydantic's ends in, and the path of its field: "data.image_size", "betas[1]"."""
    owner, path = cls, ""
    for step in location:
        hints = get_type_hints(owner)
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in hints:                                                     # others name members of a union
            path += f".{step}" if path else step
            owner = _dataclass_in(hints[step]) or owner
    return owner, path


def _dataclass_in(hint: Any) -> Any:
    """The dataclass of a hint, or of what it holds: an item, a section; None where it has none."""
    return hint if dataclasses.is_dataclass(hint) else next(filter(None, map(_dataclass_in, get_args(hint))), None)


def _words(hint: Any) -> list[str]:
    """What a Literal takes, alone or in a union or tuple."""
    return [word for part in get_args(hint) for word in ([str(part)] if isinstance(part, str | int) else _words(part))]
