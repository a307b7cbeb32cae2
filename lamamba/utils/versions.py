"""Versions of what results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from lamamba._version import __version__


def version_of(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_versions(*packages: str) -> dict[str, str | None]:
    """Of lamamba, Python and packages, by name."""
    return {
        "lamamba": __version__, "python": platform.python_version(), **{name: version_of(name) for name in packages},
    }
