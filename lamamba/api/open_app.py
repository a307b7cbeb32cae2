"""lamamba.open_app: a page in the browser to sample with a model."""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib.util
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lamamba.options.app import AppOptions
from lamamba.options.base import verb

logger = logging.getLogger("lamamba.app")

FIRST_PORTS = range(7860, 7960)
"""Tried one after the other, where none is given."""


@dataclass(frozen=True)
class AppResult:
    """A page that is served."""

    url: str
    """On this computer."""
    share_url: str | None
    """For everybody, with options.share."""
    page: Any = field(repr=False)
    """The gradio Blocks."""

    def close(self) -> None:
        """End the server."""
        self.page.close(verbose=False)

    def __str__(self) -> str:
        return f"the page was at {self.url}" if not self.page.is_running else f"the page: {self.share_url or self.url}"


@verb
def open_app(options: AppOptions | None = None, *, in_background: bool = False) -> AppResult:
    """Serve a page on which to choose classes and settings, watch the denoising and save the pictures.

    Args:
        options: of model and address; by default the digits that come with the package.
        in_background: return at once, with the page open until its close() is called or the process ends; else serve
            until Ctrl-C.

    Raises:
        FileNotFoundError, ValueError: when there is no such model, or it is damaged.
        OSError: when the port is taken (or all of FIRST_PORTS), or the host is not this computer.
        RuntimeError: when gradio is not installed.
    """
    options = options or AppOptions()
    port = _free_port(options.host, options.port)
    if importlib.util.find_spec("gradio") is None:                              # an optional extra
        raise RuntimeError("the page needs gradio: pip install 'lamamba-diff[app]'")
    from lamamba.app.session import open_session

    session = open_session(options.model, options.autoencoder, options.device, options.lora)
    logger.info("%s: %.2f M parameters, on %s", session.title, session.num_parameters / 1e6, session.device)
    if "GRADIO_TEMP_DIR" not in os.environ:                                     # gradio's own may be another user's
        os.environ["GRADIO_TEMP_DIR"] = folder = tempfile.mkdtemp(prefix="lamamba-app-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with _direct_connections(options.host, options.share):                      # gradio's import reads both, too
        from lamamba.app.page import serve

        page = serve(session, host=options.host, port=port, share=options.share, browser=options.open)
    result = AppResult(page.local_url, page.share_url, page)
    logger.info("%s%s", result, "" if in_background else "  (Ctrl-C ends it)")
    if not in_background:
        page.block_thread()
    return result


@contextlib.contextmanager
def _direct_connections(host: str, share: bool) -> Iterator[None]:
    """Whatever the environment's proxies, gradio asks this computer for the page. A public link needs the proxies."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    own = ["localhost", "127.0.0.1", host, *filter(None, [before["no_proxy"] or before["NO_PROXY"]])]
    os.environ.update(dict.fromkeys(before, ",".join(own) if share else "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _free_port(host: str, port: int | None) -> int:
    """The port, or the first free one; an address that is not this computer's is refused before a network is read."""
    for candidate in FIRST_PORTS if port is None else [port]:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                if os.name != "nt":                                             # as servers do: one just closed is free
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
            return candidate
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                why = getattr(error, "strerror", None) or error
                raise OSError(
                    f"the page cannot be at {host}, port {candidate}: {why}; 127.0.0.1 is this computer alone"
                ) from error
    taken = f"port {port} is" if port is not None else f"ports {FIRST_PORTS[0]} to {FIRST_PORTS[-1]} are all"
    raise OSError(f"{taken} taken: give another with --port" + (", or leave it out" if port is not None else ""))
