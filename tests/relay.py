"""What may stand between the app and a PostgreSQL server: a relay that falls silent, a pooler."""

import contextlib
import queue
import random
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO, Self, cast

from sqlalchemy import make_url

READY = b"Z\0\0\0\5I"
"""The server is ready for a query, and not in a transaction."""


class Between(socketserver.ThreadingTCPServer):
    """Something that listens for clients on a port of this machine, and talks to the server."""

    request_queue_size = 100

    def __init__(self, server_url: str) -> None:
        between = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                between.clients.append(self.request)
                with contextlib.suppress(OSError, EOFError):  # either side may go at any time
                    between.handle(self.request)

        self.clients: list[socket.socket] = []

        super().__init__(("127.0.0.1", 0), Handler)
        url = make_url(server_url)
        self.server = ("127.0.0.1", url.port or 5432)
        own_url = url.set(host="127.0.0.1", port=self.server_address[1])
        self.url = own_url.render_as_string(hide_password=False)

    def handle(self, client: socket.socket) -> None:
        """Serve one client, in a thread of its own."""
        raise NotImplementedError

    def come_back(self) -> None:
        """Forward what was held back."""

    @contextlib.contextmanager
    def serve(self) -> Iterator[Self]:
        """Work in the background, and hang up on all clients at the end."""
        thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.come_back()
            for client in self.clients:
                hang_up(client)
            self.server_close()


class Relay(Between):
    """A network that can fall silent: it keeps all connections, and forwards nothing."""

    def __init__(self, server_url: str) -> None:
        super().__init__(server_url)
        self.forwards = threading.Event()
        self.forwards.set()
        self.to_server: list[socket.socket] = []

    def fall_silent(self) -> None:
        self.forwards.clear()

    def come_back(self) -> None:
        """Forward what was held back; those whose server side is gone hear of it now."""
        self.forwards.set()

    def cut(self) -> None:
        """Hang up on the server alone, which clients do not hear of before the relay comes back.

        After 30 seconds of a real silence the server's keepalive does this. It cannot do so here:
        this machine's kernel goes on answering it, whatever the relay forwards.
        """
        for server in self.to_server:
            hang_up(server)

    def handle(self, client: socket.socket) -> None:
        self.forwards.wait()
        with socket.create_connection(self.server) as server:
            self.to_server.append(server)
            back = threading.Thread(target=self.pump, args=(server, client))
            back.start()
            self.pump(client, server)
            back.join()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.forwards.wait()
                sink.sendall(data)
        self.forwards.wait()
        for end in (source, sink):
            hang_up(end)


class Pooler(Between):
    """A pooler in transaction mode: each transaction gets one of a few connections to the server.

    It is a stand-in for PgBouncer, with its two ways to choose among the idle ones, the one used
    last or (`server_round_robin`) the one used longest ago, and a third, which is any of them.
    """

    def __init__(self, server_url: str, size: int, idle: type[queue.Queue[Any]]) -> None:
        super().__init__(server_url)
        self.size, self.idle = size, idle
        self.lock = threading.Lock()
        self.pools: dict[bytes, tuple[bytes, queue.Queue[BinaryIO]]] = {}
        """Database to how the server greets there, and the idle connections."""

    def handle(self, client: socket.socket) -> None:
        with open_stream(client) as stream:
            startup = read_startup(stream)
            fields = startup[8:].split(b"\0")  # name, value, name, value, and so on
            database = fields[fields.index(b"database") + 1]
            with self.lock:
                if database not in self.pools:
                    greeting, first = self.connect(startup)
                    if not greeting.endswith(READY):  # there is no such database
                        stream.write(greeting)
                        first.close()
                        return
                    more = [self.connect(startup)[1] for _ in range(self.size - 1)]
                    self.pools[database] = greeting, self.idle()
                    for server in (first, *more):
                        self.pools[database][1].put(server)
            greeting, pool = self.pools[database]
            stream.write(greeting)
            stream.flush()
            while (message := read_message(stream))[:1] != b"X":  # the client says goodbye
                server = pool.get()
                try:
                    while forward(message, stream, server) != READY:
                        message = read_message(stream)
                    pool.put(server)
                except (OSError, EOFError):  # the client died in a transaction, which is undone
                    server.close()
                    pool.put(self.connect(startup)[1])
                    raise

    def connect(self, startup: bytes) -> tuple[bytes, BinaryIO]:
        """Open a connection to the server; return how the server greeted, and the connection."""
        with socket.create_connection(self.server) as plain:
            server = open_stream(plain)
        server.write(startup)
        server.flush()
        greeting = b""
        while not greeting.endswith(READY):
            message = read_message(server)
            greeting += message
            if message[:1] == b"E":
                break
        return greeting, server

    def server_close(self) -> None:
        super().server_close()
        for _, pool in self.pools.values():
            while not pool.empty():
                pool.get().close()


class AnyQueue(queue.Queue[Any]):
    """One that gives out any of its items."""

    def _get(self) -> Any:
        self.queue.rotate(random.randrange(len(self.queue)))
        return self.queue.popleft()


def hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        end.shutdown(socket.SHUT_RDWR)


def open_stream(end: socket.socket) -> BinaryIO:
    return cast(BinaryIO, end.makefile("rwb"))


def read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def read_startup(stream: BinaryIO) -> bytes:
    """Read a client's first message, which alone has no type, and turn encryption down."""
    while True:
        length = read(stream, 4)
        body = read(stream, struct.unpack("!i", length)[0] - 4)
        if struct.unpack("!i", body[:4])[0] == 3 << 16:  # the protocol's version
            return length + body
        stream.write(b"N")
        stream.flush()


def read_message(stream: BinaryIO) -> bytes:
    head = read(stream, 5)
    return head + read(stream, struct.unpack("!i", head[1:])[0] - 4)


def forward(message: bytes, client: BinaryIO, server: BinaryIO) -> bytes:
    """Forward a message, and the answers if some are due, of which the last is returned."""
    server.write(message)
    if message[:1] not in b"QS":  # only a query and a "sync" are answered
        return b""
    server.flush()
    while True:
        answer = read_message(server)
        client.write(answer)
        if answer[:1] == b"Z":
            client.flush()
            return answer
