"""Which HTTP requests the page answers: those of its own origin that call its functions. An ASGI middleware."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

MAX_BODY = 100_000
"""Bytes of a request; the page's own have some hundreds."""
CALL = re.compile(r"/(?:queue/join|(?:call|run|api)/(?P<name>[^/]+))/?$")
OTHERS = re.compile(r"/(?:cancel|reset|stream/[^/]+(?:/close)?)/?$")
"""Posts that end a call."""


class RequestFilter:
    """Refuses requests of other origins, uploads, large bodies, and calls of functions that the page does not have.

    Args:
        app: the ASGI application behind it.
        functions: the page's: dictionaries with "id", "api_name", and "inputs", as many as the function has values.
    """

    def __init__(self, app: Any, functions: Sequence[dict[str, Any]]):
        self._app = app
        self._inputs = {key: len(each["inputs"]) for each in functions for key in (each["id"], each["api_name"])}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = _refusal(scope)
        match = CALL.search(scope["path"])
        if refusal is None and scope["type"] == "http" and scope["method"] == "POST" and match:
            body = b""
            while True:
                message = await receive()
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
            refusal, pending = self._misfit(body, match["name"]), [{"type": "http.request", "body": body}]
            rest = receive

            async def receive() -> Any:
                return pending.pop() if pending else await rest()

        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, text = refusal
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"detail": [{"msg": text}]}).encode()})

    def _misfit(self, body: bytes, name: str | None) -> tuple[int, str] | None:
        """Status and text for a call that the page has no function for, or with values of no kind that it takes."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return 422, "the body is no JSON"
        named = call.get("fn_index") if isinstance(call, dict) else None
        key = name if named is None else named
        if type(key) not in (int, str) or key not in self._inputs:
            return 404, f"there is no function {key!r}; /call/draw samples"
        values, count = call.get("data") if isinstance(call, dict) else None, self._inputs[key]
        if not isinstance(values, list) or len(values) != count:
            return 422, f"\"data\" must be a list of {count} values for this function"
        if '"meta":' in json.dumps(values):                                     # gradio would fetch and copy it
            return 422, "the values of this page are no files"
        return None


def _refusal(scope: Any) -> tuple[int, str] | None:
    """Status and text for a request that is refused for its headers or its address."""
    headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
    origin, own = headers.get(b"origin"), {headers.get(b"host"), headers.get(b"x-forwarded-host")}
    if scope["type"] == "websocket":
        return 403, "this page has no websockets"
    if origin is not None and urlsplit(origin).netloc not in own:
        return 403, f"the origin {origin} is not this page's: open the page itself"
    if scope["method"] == "POST" and not (CALL.search(scope["path"]) or OTHERS.search(scope["path"])):
        return 403, "this page takes no files, and no posts but calls of its functions"
    length = headers.get(b"content-length", "0")
    if b"transfer-encoding" in headers or not length.isdecimal() or int(length) > MAX_BODY:
        return 413, f"a request to this page says its length and has at most {MAX_BODY:,} bytes"
    return None
