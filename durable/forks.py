"""What a forked child must not keep: the sessions of its parent on the database server.

A tool may start a child by `os.fork()`, as `multiprocessing` and `ProcessPoolExecutor` do on Linux
up to Python 3.13. The child inherits the sockets of its parent. If the child outlived the parent,
the server would keep the parent's sessions with their locks, and the dead parent would count as
alive. So the child closes these sockets and sends nothing through them.

The lock files of SQLite need nothing here, because filelock closes them in a forked child.
"""

import os
from contextlib import suppress
from functools import cache
from weakref import WeakSet

import psycopg

sessions: WeakSet[psycopg.Connection] = WeakSet()
"""The connections of this process to the server."""


def keep_from_children(session: psycopg.Connection) -> None:
    """Let no child that is forked from now on keep this connection open."""
    _register()
    sessions.add(session)


@cache  # a hook cannot be taken back, so there is one for all connections
def _register() -> None:
    os.register_at_fork(after_in_child=_abandon_sessions)


def _abandon_sessions() -> None:
    # psycopg closes no connection in a forked child. `connection.close()` would tell the server to
    # end the parent's session. A closed descriptor's number would be given to the next file that
    # the child opens, while libpq takes that number for its socket. So each number is kept, and
    # stands for /dev/null.
    nothing = os.open(os.devnull, os.O_RDWR)
    for session in sessions:
        with suppress(psycopg.OperationalError):  # the connection has been closed, or is lost
            os.dup2(nothing, session.fileno(), inheritable=False)
    os.close(nothing)
