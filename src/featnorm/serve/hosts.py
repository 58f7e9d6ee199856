"""Checks of the host and the origin of requests: `HostCheck`."""

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from featnorm.serve.limits import closing, has_body
from featnorm.serve.requests import problem

_EVERY = "*"
_AUTHORITY = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/?#@\\,]+)(?::(?P<port>[0-9]{1,5}))?")
_PORTS = {"http": "80", "https": "443"}
# Methods without side effects. A page of another origin cannot read their responses.
_SAFE = {"GET", "HEAD", "OPTIONS"}


class HostCheck:
    """Middleware that rejects requests for other hosts (421), and those from pages of other origins (403).

    Without it, a page on the internet could use a service that is reachable only from this machine: by pointing
    its own name to the address of this machine (DNS rebinding), or by sending a form to it.

    Parameters
    ----------
    app : ASGIApp
        The application.
    allowed : collection of str
        Host names of the service, each from `allowed_name`, besides the address at which a connection arrives, and
        ``localhost`` if that is a loopback address. ``0.0.0.0`` or ``::`` means any IP address and ``localhost``:
        nobody else can serve a page under these. ``*`` means every host. A page of one of these names may come
        from any port, since a proxy may listen on another.
    bound : str, optional
        The host that the server listens on, from `allowed_name`. It is a host name of the service as well, but its
        pages must come from the port of the service: other services may run on the same host.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str], bound: str | None = None) -> None:
        self.app = app
        self._names = {name for name in allowed if not _is_unspecified(name)}
        self._every = _EVERY in allowed
        self._bound = bound
        self._addresses = any(_is_unspecified(name) for name in (*allowed, bound or ""))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or reject it with a reason."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            rejection = self._rejection(scope, headers)
            if rejection is not None:

                async def last(message: Message) -> None:
                    # The body is not read, so the connection cannot be used again.
                    start = message["type"] == "http.response.start" and has_body(headers)
                    await send(closing(message) if start else message)

                await problem(*rejection, scope["state"]["request_id"])(scope, receive, last)
                return
        await self.app(scope, receive, send)

    def _rejection(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        hosts = headers.getlist("host")
        if any(not self._is_allowed(host, scope.get("server")) for host in hosts):
            return 421, (
                f"this service is not configured for the host {', '.join(hosts)!r}: if clients reach it under "
                "this name, start it with --allowed-host NAME, or create_app(allowed_hosts=[NAME])"
            )
        origin = headers.get("origin")
        if origin is None or scope["method"] in _SAFE or self._is_own(origin, hosts):
            return None
        return 403, (
            f"the request comes from a page of another origin, {origin!r}: if that is this service under another "
            "name, start it with --allowed-host NAME, or create_app(allowed_hosts=[NAME])"
        )

    def _is_allowed(self, host: str, server: tuple[str, int | None] | None) -> bool:
        name = host_name(host)
        if self._every or name is None:
            return self._every
        own = None if server is None else _canonical(server[0])
        any_address = self._addresses and (name == "localhost" or _address(name) is not None)
        own_address = own is not None and (name == own or (name == "localhost" and _is_loopback(own)))
        return name in self._names or name == self._bound or any_address or own_address

    def _is_own(self, origin: str, hosts: list[str]) -> bool:
        scheme, _, authority = origin.partition("://")
        name = host_name(authority)
        if name is None:
            return False
        if name in self._names:
            return True
        return any((name, _port(authority, scheme)) == (host_name(host), _port(host, scheme)) for host in hosts)


def host_name(authority: str) -> str | None:
    """Return the host of ``host:port`` in canonical form, or None if it is malformed."""
    match = _AUTHORITY.fullmatch(authority)
    return match and _canonical(match["name"])


def allowed_name(host: str) -> str:
    """Return a host name in canonical form; ``*`` as it is.

    Raises
    ------
    ValueError
        If it is not a host name.
    """
    if host == _EVERY:
        return host
    name = _canonical(host) if _address(host) is not None else host_name(host)
    match = _AUTHORITY.fullmatch(host)
    if name is None or (match is not None and match["port"] is not None):
        raise ValueError(f"the allowed host {host!r} is not a host name: omit scheme, port and path")
    return name


def _is_unspecified(name: str) -> bool:
    address = _address(name)
    return address is not None and address.is_unspecified


def _canonical(name: str) -> str:
    address = _address(name)
    return name.lower().removesuffix(".") if address is None else str(address)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    # A socket for both families maps IPv4 addresses to IPv6.
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return address is not None and address.is_loopback


def _port(authority: str, scheme: str) -> str | None:
    match = _AUTHORITY.fullmatch(authority)
    return match and (match["port"] or _PORTS.get(scheme))
