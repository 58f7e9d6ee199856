"""An application behind a socket, with uvicorn: `run_server`."""

import asyncio
import math
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from featnorm.serve.connections import Connection, connection_type
from featnorm.serve.limits import Limits

# Connections that the system may have accepted for us at once. Together with those of `Limits` they have to stay
# below the usual bound of 1,024 open files.
_BACKLOG = 128
# The share of the grace period in which requests are still answered. The rest is for connections to end.
_ANSWERED = 0.7


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, which nobody can connect to yet.

    Raises
    ------
    OSError
        It is taken, or not of this machine, by name.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            # Not to wait until the system has forgotten the connections of an earlier run.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from None
    return bound


def run_server(app: FastAPI, bound: socket.socket, limits: Limits, on_start: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Requests that are under way then have 70 % of the grace period to be answered; the others get 503.

    Parameters
    ----------
    app : what `create_app` returned.
    bound : what `bind` returned.
    limits : the application's.
    on_start : called once it can be connected to.
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
    # uvicorn ends by raising the signal once more, which would make an orderly end look like a kill.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config, on_start, limits.grace).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """A server that says when it can be connected to, and that ends in time.

    Parameters
    ----------
    config : its settings; where ``http`` is not of `connection_type`, requests are awaited as uvicorn does.
    on_start : called once it can be connected to.
    grace : seconds from the signal to the end.
    """

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None], grace: float) -> None:
        super().__init__(config)
        self._on_start = on_start
        self._grace = grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_ANSWERED * self._grace, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.cut_off()
