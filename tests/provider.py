"""A model provider on this machine that misbehaves on purpose: OpenAI's chat API."""

import json
import re
import socket
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPORT = {
    "company_name": "Acme",
    "revenue_usd_millions": 1.5,
    "revenue_growth_percent": 2.0,
    "net_margin_percent": 3.0,
    "industry": "anvils",
    "summary": "It makes anvils.",
    "strengths": ["gravity"],
    "risks": ["coyotes"],
}
COMPANY = {"company_name": "Acme"}


def completion(message: dict[str, Any], finish_reason: str = "stop") -> dict[str, Any]:
    """Return an answer of the API."""
    return {
        "id": "chat_1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-6-luna",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500},
    }


def tool_calls(*calls: tuple[str, str]) -> dict[str, Any]:
    """Return an answer that calls tools, given as (name, arguments)."""
    parts = [
        {"id": f"call_{i}_{name}", "type": "function", "function": {"name": name, "arguments": a}}
        for i, (name, a) in enumerate(calls)
    ]
    return completion({"role": "assistant", "content": None, "tool_calls": parts}, "tool_calls")


BOTH_TOOLS = (
    ("fetch_company_overview", json.dumps(COMPANY)),
    ("fetch_financial_metrics", json.dumps(COMPANY)),
)


WRONG_NAME = ("functions.fetch_company_overview", json.dumps(COMPANY))
"""Models sometimes write this, and the provider lets them."""


def called(messages: list[dict[str, Any]]) -> list[str]:
    """Return the names of the tools that the model has called in this history."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    return [call["function"]["name"] for call in calls]


BROKEN = {
    "empty": "",
    "garbage": "{not json",
    "html": "<html>busy</html>",
    "null": "null",
    "no choices": json.dumps({**completion({}), "choices": []}),
    "choices of another shape": json.dumps({**completion({}), "choices": "x"}),
}
"""Bodies that come with status 200 and hold nothing usable."""


class Provider(ThreadingHTTPServer):
    """Answers each request by the next word of its script, and well when the script is over."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        """When each request came, in seconds of a clock that nobody sets."""
        self.custom: dict[str, Any] = {}
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What makes the app talk to it."""
        return {
            "MODEL": "openai-chat:gpt-6-luna",
            "OPENAI_API_KEY": "sk-secret-key",
            "OPENAI_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}/v1",
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet about connections that are dropped, here or there."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Provider
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Stay quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.times.append(time.monotonic())
        word = self.server.script.pop(0) if self.server.script else "answer"
        status, _, wait = word.partition(" after ")  # "429 after 3": it asks to wait 3 seconds
        if wait.endswith(" s, as a date"):
            wait = formatdate(time.time() + int(wait.split()[0]), usegmt=True)
        if not all(re.fullmatch("[a-zA-Z0-9_-]+", name) for name in called(body["messages"])):
            self.fail(400)  # as OpenAI does: the model's own answer is refused in the history
        elif status.isdigit():
            self.fail(int(status), wait=wait)
        elif word == "too long":
            self.fail(400, code="context_length_exceeded")
        elif word == "drop":
            self.drop()
        elif word == "hang":
            self.server.closing.wait(60)
        elif word == "cut":
            self.send_text('{"id": "chat_1"', length=1000)
            self.drop()
        elif word in BROKEN:
            self.send_text(BROKEN[word])
        elif word == "wrong name":
            self.answer(tool_calls(WRONG_NAME, BOTH_TOOLS[1]))
        elif word == "custom":
            self.answer(self.server.custom)
        elif word == "filter":
            self.answer(completion({"role": "assistant", "content": None}, "content_filter"))
        elif word == "malformed arguments":
            self.answer(tool_calls(("fetch_company_overview", '{"company": ')))
        elif word == "unfit report":
            self.answer(tool_calls(("final_result", json.dumps({**REPORT, "risks": []}))))
        elif (
            any(message["role"] == "tool" for message in body["messages"]) and word != "both tools"
        ):
            self.answer(tool_calls(("final_result", json.dumps(REPORT))))
        else:
            self.answer(tool_calls(*BOTH_TOOLS))

    def fail(self, status: int, *, wait: str = "", code: str = "") -> None:
        # Worse than real providers: it quotes the whole key.
        message = (
            f"failure {status} for {self.headers['Authorization'] or self.headers['x-api-key']}"
        )
        error = {"message": message, "type": "error", "code": code or str(status)}
        self.send_text(json.dumps({"error": error}), status, wait=wait)

    def answer(self, completion: dict[str, Any]) -> None:
        self.send_text(json.dumps(completion))

    def send_text(
        self, text: str, status: int = 200, length: int | None = None, wait: str = ""
    ) -> None:
        self.send_response(status)
        if wait:
            self.send_header("Retry-After", wait)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def drop(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
