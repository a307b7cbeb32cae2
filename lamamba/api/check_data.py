"""lamamba.check_data: decode every image of a data set and name the bad ones; verify latents."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lamamba.data.latents import Index, check_latents, is_latents
from lamamba.data.manifest import CheckedFile, Manifest, check_files, make_manifest, manifest_path
from lamamba.data.sources import open_source
from lamamba.options.base import verb
from lamamba.options.check_data import CheckDataOptions
from lamamba.utils.files import check_target
from lamamba.utils.progress import Progress, ProgressOption, Report, reporting
from lamamba.utils.text import counted

NAMED = 20
"""Bad files in the text of a result; the manifest has all of them."""
NAMED_CONVERTED = 3
"""Converted files of each kind in the text of a result; the manifest has the first thousand."""


@dataclass(frozen=True)
class CheckDataResult:
    """Files of a folder, of tars or of a data set of Hugging Face, each decoded once."""

    manifest: Manifest = field(repr=False)
    """As it was written."""
    path: Path
    """Of the manifest."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files that are not looked at, by ending or reason."""

    @property
    def num_files(self) -> int:
        """Files checked."""
        return self.manifest.images

    @property
    def num_good(self) -> int:
        """Files that training uses."""
        return self.num_files - len(self.manifest.bad)

    @property
    def classes(self) -> dict[str, int]:
        """Number of files of each class, bad ones included; empty where there are no classes."""
        return dict(zip(self.manifest.label_names, self.manifest.images_per_class, strict=False))

    @property
    def bad(self) -> dict[str, tuple[str, ...]]:
        """Names of the bad files of each kind: "truncated", "too small", ..."""
        kinds = Counter(file.kind for file in self.manifest.bad)
        return {kind: tuple(file.file for file in self.manifest.bad if file.kind == kind) for kind in kinds}

    def __str__(self) -> str:
        left_out = [f"left out  {number:,} {reason}" for reason, number in self.left_out.items()]
        return "\n".join([*_summary(self.manifest), *left_out, f"manifest  {self.path}"])


@dataclass(frozen=True)
class CheckLatentsResult:
    """A folder of latents, each shard of which has its recorded hash."""

    folder: Path
    index: Index = field(repr=False)

    def __str__(self) -> str:
        plan = self.index.plan
        kind = "means and deviations" if plan.parts == 2 else "latents"
        return f"""\
{self.folder}: {counted(len(self.index.shards), 'shard')}, all as they were written
images        {plan.images:,} of {plan.source}, {counted(len(plan.label_names), 'class')}
image size    {plan.image_size} x {plan.image_size}
latents       {plan.shape[0]} x {plan.shape[1]} x {plan.shape[2]}, {kind}, {plan.storage}, \
{'with' if plan.views == 2 else 'without'} mirror images
autoencoder   {plan.codec.autoencoder} ({str(plan.codec.autoencoder_sha256)[:12]}), scale {plan.codec.scale:g}, shift \
{plan.codec.shift:g}"""


@verb
def check_data(options: CheckDataOptions, *, progress: ProgressOption = "auto") -> CheckDataResult | CheckLatentsResult:
    """Decode every image and write a manifest of the bad ones; for a folder of latents, verify every shard.

    Args:
        options: the source, and what counts as bad.
        progress: "auto", a function of Progress values, or None.

    Raises:
        FileNotFoundError, ValueError: when there is no such source, or a shard of latents is damaged.
        OSError: when the manifest cannot be written.
        RuntimeError: when a decoding process dies, as it does when memory runs out.
    """
    folder = Path(options.source)
    with reporting(progress) as report:
        if is_latents(folder):
            return CheckLatentsResult(folder, check_latents(folder, report))
        return _check_images(options, report)


def _check_images(options: CheckDataOptions, report: Report) -> CheckDataResult:
    source = open_source(options.source)
    path = options.manifest or manifest_path(source.name)
    try:
        check_target(path)
    except (OSError, ValueError) as error:
        raise type(error)(f"{error}; name a path that can be written as manifest") from error
    found: list[CheckedFile] = []
    bad = 0
    for done, file in enumerate(check_files(source, options.workers, options.min_side), 1):
        if file.kind or file.conversion:
            found.append(file)
            bad += bool(file.kind or options.strict)
        report(Progress("checking", done, len(source), note=f"{bad} bad" if bad else ""))
    manifest = make_manifest(source, found, options.min_side, strict=options.strict)
    manifest.save(path)
    return CheckDataResult(manifest, path, dict(source.left_out.counts))


def _summary(manifest: Manifest) -> list[str]:
    counts = manifest.images_per_class
    classes = f"{counted(len(manifest.label_names), 'class')} with {min(counts)} to {max(counts)} files" \
        if manifest.label_names else "no classes"
    good = manifest.images - len(manifest.bad)
    lines = [f"{manifest.source}: {counted(manifest.images, 'file')}, {classes}", f"good      {good:,}"]
    for kind, number in manifest.converted.items():
        files = [found.file for found in manifest.converted_files if found.kind == kind]
        more = ", ..." if number > NAMED_CONVERTED else ""
        lines.append(f"  of them {kind:<7} {number:,} (converted): {', '.join(files[:NAMED_CONVERTED])}{more}")
    lines.append(f"bad       {len(manifest.bad):,}")
    lines += [f"  {kind:<18}{number:,}" for kind, number in Counter(bad.kind for bad in manifest.bad).most_common()]
    lines += [f"  {bad.file}: {bad.kind} ({bad.detail})" for bad in manifest.bad[:NAMED]]
    if len(manifest.bad) > NAMED:
        lines.append(f"  ... and {len(manifest.bad) - NAMED} more in the manifest")
    empty = [name for name, number in zip(manifest.label_names, counts, strict=False) if not number]
    if empty:
        lines.append(f"warning: {counted(len(empty), 'class')} without a file: {', '.join(empty[:5])}")
    return lines
