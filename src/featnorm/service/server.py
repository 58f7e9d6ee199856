"""An application behind a socket, with uvicorn: `run_server`."""

import asyncio
import math
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from featnorm.service.limits import Limits


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
    """Serve until SIGTERM or SIGINT; requests that are under way are answered first.

    Parameters
    ----------
    app : what `create_app` returned.
    bound : what `bind` returned.
    limits : the application's.
    on_start : called once it can be connected to.
    """
    config = uvicorn.Config(
        app,
        http=_protocol(limits.seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.seconds) + 1,
    )
    # uvicorn ends by raising the signal once more, which would make an orderly end look like a kill.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config, on_start).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """A server that says when it can be connected to."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()


def _protocol(seconds: float) -> type[asyncio.Protocol]:
    class Prompt(H11Protocol):
        """HTTP/1.1 from clients that send the head of a request in time; uvicorn itself waits for ever."""

        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_head()

        def on_response_complete(self) -> None:
            self._await_head()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._late is not None:
                self._late.cancel()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            if self._late is not None:
                self._late.cancel()
            self._late = self.loop.call_later(seconds, self._hang_up)

        def _hang_up(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Prompt
