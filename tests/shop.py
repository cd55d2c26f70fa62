"""The shop of docs/your-agent.md: a server in the tests' process, or in one of its own."""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Shop(ThreadingHTTPServer):
    """It honours idempotency keys, and keeps a bill."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.bill: list[tuple[str, str]] = []
        """Key, and what was done: "refunded", or "answered from the record"."""
        self.looked_up: list[str] = []
        self.acted = threading.Event()
        """Set when a refund was made, before the answer is sent."""
        self.may_answer = threading.Event()
        """Not set: refunds are made, and not answered."""
        self.may_answer.set()
        self.deciding = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def refunds(self) -> list[str]:
        """Return the keys for which money was paid."""
        return [key for key, done in self.bill if done == "refunded"]


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Shop

    def do_GET(self) -> None:
        number = self.path.rpartition("/")[2]
        self.server.looked_up.append(number)
        if number == "unknown":
            self.send_error(404)
        else:
            self.answer({"number": number, "item": "lamp", "cents": 1999})

    def do_POST(self) -> None:
        key = self.headers["Idempotency-Key"]
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.deciding:
            known = key in self.server.refunds()
            done = "answered from the record" if known else "refunded"
            self.server.bill.append((key, done))
            if __name__ == "__main__":
                with open(os.environ["DEMO_BILL"], "a") as bill:
                    bill.write(f"{key} {done}\n")
        self.server.acted.set()
        self.server.may_answer.wait()
        self.answer(asked)

    def answer(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        except OSError:
            pass  # who has asked was killed

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""


if __name__ == "__main__":
    Shop(int(sys.argv[1]))
    threading.Event().wait()
