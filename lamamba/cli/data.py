"""lamamba data check: every image of a folder, looked at before training does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lamamba.cli.arguments import parse
from lamamba.config import unknown_name

DESCRIPTION = """Decode every image of a folder, count classes, name what cannot be trained on, and remember it.

  lamamba data check photos/

The folder holds images, or one subfolder per class. What is found is written to lamamba-check.json inside it; training
skips the files that are named there as bad. Nothing is changed or deleted. The exit status is 1 when there are bad
files."""

SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    folder: Annotated[Path, tyro.conf.Positional]
    """Images, or one subfolder of images per class."""
    workers: int | None = None
    """Processes that decode; by default one for each processor."""
    write: bool = True
    """Write lamamba-check.json into the folder."""


def main(arguments: list[str]) -> None:
    if arguments and not arguments[0].startswith("-"):
        action, *arguments = arguments
        if action != "check":
            raise unknown_name("action", action, ["check"])
    elif not {"-h", "--help"} & set(arguments):
        raise ValueError("say what to do with which folder, as in lamamba data check photos/")
    chosen = parse(CheckArguments, arguments, "data check", DESCRIPTION)
    if chosen.workers is not None and chosen.workers < 1:
        raise ValueError(f"--workers {chosen.workers} must be at least 1")

    from lamamba.cli.observers import StepBar
    from lamamba.data.check import KINDS, MANIFEST, check_folder
    from lamamba.training.state import write_atomically

    with StepBar("decoding") as bar:
        found = check_folder(chosen.folder, workers=chosen.workers, on_progress=bar)
    good = found.images - len(found.bad)
    print(f"{chosen.folder}: {found.images:,} images, {good:,} good, {len(found.classes) or 'no'} classes")
    if found.classes:
        few = sorted(found.classes.items(), key=lambda item: item[1])
        print(f"images of a class: {few[0][1]:,} ({few[0][0]}) to {few[-1][1]:,} ({few[-1][0]})")
        for name in (name for name, count in few if count == 0):
            print(f"warning: class {name} has no good image")
    for kind, count in found.kinds.most_common():
        print(f"\n{kind}: {count} ({KINDS[kind]})")
        names = [name for name, (own, _) in found.bad.items() if own == kind]
        print("\n".join(f"  {name}: {found.bad[name][1]}" for name in names[:SHOWN]))
        if count > SHOWN:
            print(f"  and {count - SHOWN} more, in {MANIFEST}")
    if chosen.write:
        write_atomically(chosen.folder / MANIFEST, json.dumps(found.to_dict(), indent=2) + "\n")
        print(f"\nwrote {chosen.folder / MANIFEST}" + ("; training will skip the bad files" if found.bad else ""))
    if found.bad:
        raise SystemExit(1)
