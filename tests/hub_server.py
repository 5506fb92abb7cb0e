"""A Hugging Face hub on this machine, with what `snapshot_download` asks of it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Repositories = dict[tuple[str, str, str], dict[str, bytes]]
"""(kind, repository, commit) -> its files."""

_TREE = re.compile(r"/api/(model|dataset)s/(.+)/tree/([0-9a-f]{40})")
_FILE = re.compile(r"/(datasets/)?(.+)/resolve/([0-9a-f]{40})/(.+)")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        if match := _TREE.fullmatch(path):
            files = self.repositories.get((match[1], match[2], match[3]))
            if files is not None:
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": _git(data)}
                    for name, data in files.items()
                ]
                self._send(200, json.dumps(entries).encode(), body)
                return
        elif match := _FILE.fullmatch(path):
            kind = "dataset" if match[1] else "model"
            data = self.repositories.get((kind, match[2], match[3]), {}).get(match[4])
            if data is not None:
                headers = {"ETag": f'"{_git(data)}"', "X-Repo-Commit": match[3]}
                self._send(200, data, body, headers)
                return
        known = any(f"/{repository}/" in path for _, repository, _ in self.repositories)
        self._send(404, b"", body, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

    def _send(
        self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(repositories: Repositories) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories; yield the address and the list of what has been asked so far."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"repositories": repositories, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
