"""Serving of an application on a socket, with uvicorn: `run_server`."""

import asyncio
import math
import os
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from featnorm.serve.connections import Connection, connection_type
from featnorm.serve.limits import Limits

# Maximum number of connections that the system accepts in advance. With those of `Limits`, they must stay below
# the usual limit of 1,024 open files.
_BACKLOG = 128
# Share of the grace period in which requests are still answered. The rest is for closing connections.
_ANSWER_SHARE = 0.7


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, but not listening yet.

    Raises
    ------
    OSError
        If the address is in use, or not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            # So that the port can be reused at once after an earlier run. On Windows it can be without, and this
            # option would let two services share a port.
            if os.name != "nt":
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from None
    return bound


def run_server(
    app: FastAPI,
    bound: socket.socket,
    limits: Limits,
    on_start: Callable[[], None],
    on_hangup: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT.

    Pending requests that are not answered within 70 % of the grace period get 503.

    Parameters
    ----------
    app : FastAPI
        The application, from `create_app`.
    bound : socket.socket
        The socket, from `bind`.
    limits : Limits
        The limits of the application.
    on_start : callable
        Called once clients can connect.
    on_hangup : callable
        Called on SIGHUP, which Windows does not have.
    """
    config = uvicorn.Config(
        app,
        http=connection_type(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=math.ceil(limits.grace),
    )
    # At its end, uvicorn raises the signal again, which would make a regular exit look like a kill.
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: None)}
    if hasattr(signal, "SIGHUP"):
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: on_hangup())
    try:
        _Server(config, on_start, limits.grace).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """A server with a callback for its start, and with a limited time for its end.

    Parameters
    ----------
    config : uvicorn.Config
        Settings. If ``http`` is not from `connection_type`, pending requests are awaited as by uvicorn.
    on_start : callable
        Called once clients can connect.
    grace : float
        Seconds from the signal to the end.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None], grace: float) -> None:
        super().__init__(config)
        self._on_start = on_start
        self._grace = grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_ANSWER_SHARE * self._grace, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.cut_off()
