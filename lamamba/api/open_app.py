"""lamamba.open_app: a page in the browser to sample with a model."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import socket
from dataclasses import dataclass, field
from typing import Any

from lamamba.options.app import AppOptions
from lamamba.options.base import verb

logger = logging.getLogger("lamamba.app")


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
        OSError: when the port is taken, or the host is not this computer.
        RuntimeError: when gradio is not installed.
    """
    options = options or AppOptions()
    _check_free(options.host, options.port)
    if importlib.util.find_spec("gradio") is None:                              # an optional extra
        raise RuntimeError("the page needs gradio: pip install 'lamamba-diff[app]'")
    from lamamba.app.page import serve
    from lamamba.app.session import open_session

    session = open_session(options.model, options.autoencoder, options.device)
    logger.info("%s: %.2f M parameters, on %s", session.title, session.num_parameters / 1e6, session.device)
    page = serve(session, host=options.host, port=options.port, share=options.share, browser=options.open)
    result = AppResult(page.local_url, page.share_url, page)
    logger.info("%s%s", result, "" if in_background else "  (Ctrl-C ends it)")
    if not in_background:
        page.block_thread()
    return result


def _check_free(host: str, port: int | None) -> None:
    """Refuse an address that is not this computer's, or a port that is taken, before a network is read."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            if os.name != "nt":                                                 # as servers do: one just closed is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is taken: give another with --port, or leave it out") from error
        raise OSError(f"the page cannot be at {host}: {error.strerror}; 127.0.0.1 is this computer alone") from error
