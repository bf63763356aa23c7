"""A small Hugging Face hub on this machine: one repository protocol, any bytes, any accident.

It answers as the hub does for large files: a HEAD on the resolve address tells commit, size and
SHA-256 and points to another host (the CDN); a GET is sent there, and the CDN serves ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Hub:
    """What the server holds, how it fails, and what it was asked.

    Attributes:
        files: ``owner/name/path`` -> content.
        error: Status and error code of every answer of the hub, such as (404, "EntryNotFound").
        breaks_at: Bytes of the content after which the CDN drops every connection.
        ignores_ranges: Whether the CDN always sends the whole content.
        damaged: Whether the CDN sends other bytes than announced.
        etag: What the hub announces instead of the SHA-256.
        commit: What it announces as the commit; empty for none.
        seen: Every request: method, host (hub or cdn), range or "".
        tokens: Which hosts were sent a token.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    error: tuple[int, str] | None = None
    breaks_at: int | None = None
    ignores_ranges: bool = False
    damaged: bool = False
    etag: str | None = None
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ranges(self) -> list[str]:
        """The ranges that the CDN was asked for; "" for a whole file."""
        return [asked for method, host, asked in self.seen if (method, host) == ("GET", "cdn")]


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A running hub."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_HEAD(self) -> None:
        self._note("hub")
        self._resolve()

    def do_GET(self) -> None:
        if not self.path.startswith("/cdn/"):
            self._note("hub")
            self._resolve()
            return
        self._note("cdn")
        name = unquote(self.path.removeprefix("/cdn/"))
        content = self.state.files[name]
        if self.state.damaged:
            content = bytes(byte ^ 1 for byte in content)
        asked = "" if self.state.ignores_ranges else self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-") or 0)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) if self.state.breaks_at is None else self.state.breaks_at
        self.wfile.write(content[start:end])
        self.close_connection = True

    def _note(self, host: str) -> None:
        self.state.seen.append((self.command, host, self.headers.get("Range", "")))
        if self.headers.get("Authorization"):
            self.state.tokens.add(host)

    def _resolve(self) -> None:
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        name = f"{repository}/{unquote(rest.partition('/')[2])}"
        error = self.state.error
        if error is None and name not in self.state.files:
            error = (404, "EntryNotFound")
        if error is not None:
            self.send_response(error[0])
            self.send_header("X-Error-Code", error[1])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.state.files[name]
        etag = self.state.etag or hashlib.sha256(content).hexdigest()
        self.send_response(302)
        if self.state.commit:
            self.send_header("X-Repo-Commit", self.state.commit)
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Location", f"http://localhost:{self.state.port}/cdn/{name}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""
