"""Whoever is told by `stream-xp notify`: a receiver on loopback, and the file of targets that leads to it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY = "whsec_Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5"


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what each path was sent; a path answers as told, and 204 after that."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.answers: dict[str, list[int]] = {}
        self.dead: set[str] = set()

    def taken(self, path: str) -> list[str]:
        return [identity for one, identity in self.got if one == path]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = self.server.answers.get(self.path)
        status = 503 if self.path in self.server.dead else answers.pop(0) if answers else 204
        self.server.bodies.append(body)
        self.server.got.append((self.path, f"{body['id']} {status}"))
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver for the block."""
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def targets_file(receiver: Receiver, folder: Path, *names: str, secret: str) -> Path:
    """A file of targets, each a path of the receiver; `secret` is the field that says where the key is."""
    lines = [
        f"- {{name: {name}, url: 'http://127.0.0.1:{receiver.server_address[1]}/{name}', {secret}, "
        "allow_http: true, allow_private: true}"
        for name in names
    ]
    path = folder / "targets.yaml"
    path.write_text("\n".join(["targets:", *lines]))
    return path
