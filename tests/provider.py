"""A model provider on this machine that misbehaves on purpose: OpenAI's streaming chat API."""

import json
import socket
import threading
from collections.abc import Iterator
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


def tool_calls(*calls: tuple[str, str]) -> Iterator[str]:
    """Stream an answer that calls tools, given as (name, arguments)."""
    deltas: list[dict[str, Any]] = [
        {
            "tool_calls": [
                {
                    "index": index,
                    "id": f"call_{index}_{name}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
            ]
        }
        for index, (name, arguments) in enumerate(calls)
    ]
    for delta, reason in [*((delta, None) for delta in deltas), ({}, "tool_calls")]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        yield json.dumps(
            {
                "id": "chat_1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "gpt-6-luna",
                "choices": [choice],
                "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
                if reason
                else None,
            }
        )
    yield "[DONE]"


BOTH_TOOLS = (
    ("fetch_company_overview", json.dumps(COMPANY)),
    ("fetch_financial_metrics", json.dumps(COMPANY)),
)


class Provider(ThreadingHTTPServer):
    """Answers each request by the next word of its script, and well when the script is over."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[str] = []
        self.requests: list[dict[str, Any]] = []
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
        word = self.server.script.pop(0) if self.server.script else "answer"
        if word.isdigit():
            self.fail(int(word))
        elif word == "drop":
            self.drop()
        elif word == "hang":
            self.server.closing.wait(60)
        elif word == "garbage":
            self.send_text("text/event-stream", "data: {not json\n\n")
        elif word == "drop in stream":
            self.start_stream()
            self.send_chunk(next(tool_calls(*BOTH_TOOLS)))
            self.drop()
        elif word == "malformed arguments":
            self.stream(tool_calls(("fetch_company_overview", '{"company": ')))
        elif word == "unfit report":
            self.stream(tool_calls(("final_result", json.dumps({**REPORT, "risks": []}))))
        elif word == "both tools":
            self.stream(tool_calls(*BOTH_TOOLS))
        elif any(message["role"] == "tool" for message in body["messages"]):
            self.stream(tool_calls(("final_result", json.dumps(REPORT))))
        else:
            self.stream(tool_calls(*BOTH_TOOLS))

    def fail(self, status: int) -> None:
        # Worse than real providers: it quotes the whole key.
        message = f"failure {status} for {self.headers['Authorization']}"
        text = json.dumps({"error": {"message": message, "type": "error", "code": str(status)}})
        self.send_text("application/json", text, status)

    def send_text(self, kind: str, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def drop(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_chunk(self, text: str) -> None:
        event = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def stream(self, chunks: Iterator[str]) -> None:
        self.start_stream()
        for chunk in chunks:
            self.send_chunk(chunk)
        self.wfile.write(b"0\r\n\r\n")
