"""Open a page on which to choose classes and settings, watch the denoising, and keep the pictures.

  lamamba app                                   the digits that come with the package
  lamamba app runs/photos

It needs an extra: pip install 'lamamba-diff[app]'. The page answers this computer alone unless --host says otherwise,
and loads nothing from the internet. Requests wait for their turn."""

from __future__ import annotations

from lamamba.cli.parse import parse
from lamamba.options.app import AppOptions


def main(arguments: list[str]) -> None:
    chosen = parse(AppOptions, arguments, "app", __doc__)

    from lamamba.api.open_app import open_app

    open_app(chosen)
