"""lamamba data: look at data before training on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lamamba.cli.parse import parse
from lamamba.config import unknown_name

if TYPE_CHECKING:
    from lamamba.data.manifest import Manifest

DESCRIPTION = """Check data before training on it: lamamba data check SOURCE [options].

  lamamba data check photos/                      a folder: one subfolder per class, or images side by side
  lamamba data check 'shards/train-{000..146}.tar'   WebDataset tars, or a folder of them
  lamamba data check datasets:owner/name@train    a Hugging Face data set by id or folder (@SPLIT: train by default)
  lamamba data check latents/                     latents of lamamba encode: every shard is compared with its hash

Every image is decoded, by several processes. Bad files are named by kind and written into a manifest
(SOURCE/lamamba-manifest.json), by which lamamba train and lamamba encode leave them out:
  empty, not an image, truncated, damaged, unreadable (the disk's fault); too small (below --min-side), too narrow (over
  64 times as long as wide), decompression bomb (over 179 million pixels), 32-bit (its white is unknown)

Some files are good after a conversion, and only named; with --strict they are bad, too:
  CMYK     R = (1 - C)(1 - K) and so on, without a colour profile
  16-bit   grey levels divided by 257, of colours the upper byte"""

NAMED = 20
"""Bad files that are printed; the manifest has all of them."""
NAMED_CONVERTED = 3
"""Files of each kind of conversion that are printed; the manifest has the first thousand."""


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    source: Annotated[str, tyro.conf.Positional]
    """Folder, tars, datasets:ID, or latents."""
    manifest: Path | None = None
    """Where to write what was found; by default SOURCE/lamamba-manifest.json (beside tars; here, for a hub id)."""
    workers: int | None = None
    """Processes that decode; by default one per core."""
    min_side: int = 2
    """Images with fewer pixels on their short side are bad."""
    strict: bool = False
    """CMYK and 16-bit files are bad, too, instead of being converted."""


def main(arguments: list[str]) -> None:
    task, *rest = arguments or ["--help"]
    if task not in ("check", "-h", "--help"):
        raise unknown_name("task of lamamba data", task, ["check"])
    chosen = parse(CheckArguments, rest if task == "check" else arguments, "data check", DESCRIPTION)
    if (chosen.workers or 1) < 1 or chosen.min_side < 1:
        raise ValueError(f"--workers {chosen.workers} and --min-side {chosen.min_side} must be at least 1")
    folder = Path(chosen.source)
    if (folder / "index.json").is_file() or (folder / ".encoding").is_dir():
        _check_latents(folder)
    else:
        _check_images(chosen)


def _check_images(chosen: CheckArguments) -> None:
    from lamamba.data.manifest import Verdict, check_files, make_manifest, manifest_place
    from lamamba.data.sources import open_source
    from lamamba.utils.bars import WorkBar

    source = open_source(chosen.source)
    place = chosen.manifest or manifest_place(source.name)
    verdicts: list[Verdict] = []
    with WorkBar("checking", len(source)) as bar:
        bad = 0
        for done, verdict in enumerate(check_files(source, chosen.workers, chosen.min_side), 1):
            if verdict[1] or verdict[3]:
                verdicts.append(verdict)
                bad += bool(verdict[1] or chosen.strict)
            bar(done, f"{bad} bad" if bad else "")
    manifest = make_manifest(source, verdicts, chosen.min_side, strict=chosen.strict)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        manifest.save(place)
    except OSError as error:
        raise OSError(f"{error}; name a place that can be written with --manifest") from error
    print(_summary(manifest, place))
    if empty := getattr(source, "empty_folders", ()):
        named = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        print(f"warning: {len(empty)} subfolders hold no images and are no classes, so that later ones have lower "
              f"numbers: {named}")


def _summary(manifest: Manifest, place: Path) -> str:
    counts = manifest.images_per_class
    classes = f"{len(manifest.label_names)} classes with {min(counts)} to {max(counts)} files" \
        if manifest.label_names else "no classes"
    good = manifest.images - len(manifest.bad)
    lines = [f"{manifest.source}: {manifest.images:,} files, {classes}", f"good      {good:,}"]
    for kind, number in manifest.converted.items():
        files = [found.file for found in manifest.converted_files if found.kind == kind]
        more = ", ..." if number > NAMED_CONVERTED else ""
        lines.append(f"  of them {kind:<8}{number:,} (converted): {', '.join(files[:NAMED_CONVERTED])}{more}")
    lines.append(f"bad       {len(manifest.bad):,}")
    lines += [f"  {kind:<18}{number:,}" for kind, number in Counter(bad.kind for bad in manifest.bad).most_common()]
    lines += [f"  {bad.file}: {bad.kind} ({bad.detail})" for bad in manifest.bad[:NAMED]]
    if len(manifest.bad) > NAMED:
        lines.append(f"  ... and {len(manifest.bad) - NAMED} more in the manifest")
    empty = [name for name, number in zip(manifest.label_names, counts, strict=False) if not number]
    if empty:
        lines.append(f"warning: {len(empty)} classes have no file: {', '.join(empty[:5])}")
    lines.append(f"manifest  {place}")
    return "\n".join(lines)


def _check_latents(folder: Path) -> None:
    from lamamba.data.latents import Index, check_latents
    from lamamba.utils.progress import reporting

    shards = len(Index.load(folder).shards)
    with reporting() as report:
        plan = check_latents(folder, report).plan
    kind = "means and deviations" if plan.parts == 2 else "latents"
    print(f"""{folder}: {shards} shards, all as they were written
images        {plan.images:,} of {plan.source}, {len(plan.label_names) or 'no'} classes
image size    {plan.image_size} x {plan.image_size}
latents       {plan.shape[0]} x {plan.shape[1]} x {plan.shape[2]}, {kind}, {plan.storage}, \
{'with' if plan.views == 2 else 'without'} mirror images
autoencoder   {plan.codec.autoencoder} ({str(plan.codec.autoencoder_sha256)[:12]}), scale {plan.codec.scale:g}, shift \
{plan.codec.shift:g}""")
