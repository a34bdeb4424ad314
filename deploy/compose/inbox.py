"""Prints the messages of `stream-xp notify` and takes them all: `python inbox.py PORT`."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_BYTES = 1_000_000


def say(what: object) -> None:
    """One line: as JSON, so that a message cannot write lines of its own."""
    sys.stdout.write(json.dumps(what, ensure_ascii=False) + "\n")
    sys.stdout.flush()


class Inbox(BaseHTTPRequestHandler):
    """One message a request."""

    timeout = 10

    def do_POST(self) -> None:
        """Print its text; what is no message of a chat is printed as it came."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BYTES:
            self.send_error(411)
            return
        body = self.rfile.read(int(length))
        try:
            shown = json.loads(body)["text"]
        except (ValueError, TypeError, KeyError):
            shown = body.decode(errors="replace")
        say(shown)
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name that the standard library calls it)
        """Say nothing: what came is printed."""


def main() -> None:
    """Serve until killed."""
    with ThreadingHTTPServer(("", int(sys.argv[1])), Inbox) as server:
        say(f"listening on {server.server_address[1]}")
        server.serve_forever()


if __name__ == "__main__":
    main()
