"""Names of classes: those of ImageNet, and labels from numbers and names."""

from __future__ import annotations

import difflib
import functools
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files

from lamamba.utils.text import shown


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """The 1000 classes of ImageNet in the order of their labels; synonyms are separated by commas."""
    text = (files("lamamba") / "data" / "imagenet_classes.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(line.split(" ", 1)[1] for line in lines)


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """The first synonym of each name ("tabby" of "tabby, tabby cat"), or the whole name where that is ambiguous."""
    first = [name.split(", ")[0] for name in names]
    return tuple(word if first.count(word) == 1 else name for word, name in zip(first, names, strict=True))


def as_names(id2label: Mapping[int | str, str] | Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """One name per class from diffusers' id2label or a sequence; () for None or an empty one.

    Raises:
        ValueError: when there is not exactly one name for each of 0 .. num_classes - 1.
    """
    if not id2label:
        return ()
    if isinstance(id2label, str) or not isinstance(id2label, Mapping | Sequence):
        raise ValueError(f"id2label={shown(id2label)} must be names by class number, or a list of them")
    if isinstance(id2label, Mapping):
        try:
            numbered = {int(key): str(name) for key, name in id2label.items()}
        except ValueError as error:
            raise ValueError(f"the keys of id2label must be class numbers, 0 .. {num_classes - 1} ({error})") from error
        missing = sorted(set(range(num_classes)) - numbered.keys())
        if missing or len(numbered) != num_classes:
            raise ValueError(
                f"id2label has {len(numbered)} names for {num_classes} classes; "
                f"{'class ' + str(missing[0]) + ' has none' if missing else 'there are too many'}"
            )
        return tuple(numbered[k] for k in range(num_classes))
    if len(id2label) != num_classes:
        raise ValueError(f"{len(id2label)} names came for {num_classes} classes; give one for each")
    return tuple(map(str, id2label))


def find_label(wanted: int | str, names: Sequence[str], num_classes: int) -> int:
    """The label of a class number, a name, or a synonym in a name ("tabby" of "tabby, tabby cat").

    A whole number, also one in text, is always a class number, never a name. Case matters only where two names differ
    by nothing else; how accents are composed (NFC, NFD) never does.

    Raises:
        ValueError: for a number out of range, an unknown name (near ones are named), or a synonym of several classes.
    """
    if isinstance(wanted, bool) or not (isinstance(wanted, str) or hasattr(wanted, "__index__")):
        raise ValueError(f"label {shown(wanted)} is neither a class number nor a name")
    if not isinstance(wanted, str):
        wanted = operator.index(wanted)                                         # NumPy's whole numbers, too
    if isinstance(wanted, str) and not _is_number(wanted):
        return _by_word(composed(wanted), [composed(name) for name in names], num_classes)
    if not 0 <= int(wanted) < num_classes:
        called = list(names).index(str(wanted)) if str(wanted) in names else None
        hint = "" if called is None else f"; the class that is called {wanted} has the number {called}"
        raise ValueError(f"label {wanted} is out of range; this model knows 0 .. {num_classes - 1}{hint}")
    return int(wanted)


def texts_for(names: Sequence[str]) -> tuple[str, ...]:
    """A text for each class that `find_label` takes for it: its name, or its number where the name is another's."""
    counts = Counter(map(composed, names))
    return tuple(
        str(label) if _is_number(name) or counts[composed(name)] > 1 else name for label, name in enumerate(names)
    )


def composed(text: str) -> str:
    """Text with composed accents (NFC): macOS writes names of files decomposed."""
    return unicodedata.normalize("NFC", text)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?\d+\s*", text) is not None


def _by_word(wanted: str, names: Sequence[str], num_classes: int) -> int:
    if not names:
        raise ValueError(
            f"label {shown(wanted)} is a name, but this model's classes have none: use 0 .. {num_classes - 1}")
    if names.count(wanted) == 1:
        return names.index(wanted)
    words: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        for word in {name, *name.split(", ")}:
            words.setdefault(word.lower(), []).append(label)
    found = words.get(wanted.strip().lower(), [])
    first = [label for label in found if names[label].split(", ")[0].lower() == wanted.strip().lower()]
    if len(found) == 1 or len(first) == 1:
        return (first or found)[0]
    if found:
        raise ValueError(
            f"label {shown(wanted)} is several classes: {', '.join(f'{label} ({names[label]})' for label in found)}; "
            "give the number"
        )
    spelled = {word.lower(): word for name in names for word in (name, *name.split(", "))}
    near = [spelled[word] for word in difflib.get_close_matches(wanted.lower(), words, n=3)]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    several = f"{num_classes} classes, 0: {names[0]!r} to {num_classes - 1}: {names[-1]!r}"
    known = several if len(names) > 20 else "known: " + "; ".join(names)        # too many to list
    raise ValueError(f"label {shown(wanted)} is unknown{hint} ({known})")
