"""Checks of the host and the origin of requests."""

import asyncio

import pytest
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse

from featnorm.serve import create_app
from featnorm.serve.hosts import HostCheck, allowed_name

ADDRESSES = "127.0.0.1", "10.1.2.3", "::1"


def status(host, *, server="127.0.0.1", allowed=(), bound=None, origin=None, method="POST"):
    """Return the status of the response to a request."""
    headers = [("host", host), ("origin", origin), ("content-length", "5")]
    scope = {
        "type": "http",
        "method": method,
        "path": "/",
        "server": (server, 8000),
        "headers": [(name.encode(), value.encode()) for name, value in headers if value is not None],
        "state": {"request_id": "me"},
    }
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        raise AssertionError("the body was read")

    app = HostCheck(PlainTextResponse("yes"), [allowed_name(name) for name in allowed], bound)
    asyncio.run(app(scope, receive, send))
    if sent[0]["status"] != 200:
        assert (b"connection", b"close") in sent[0]["headers"]
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("host", "server", "allowed", "answer"),
    [
        ("127.0.0.1:8000", "127.0.0.1", (), 200),
        ("127.0.0.1", "127.0.0.1", (), 200),
        ("localhost:8000", "127.0.0.1", (), 200),
        ("LOCALHOST.", "127.0.0.1", (), 200),
        ("[::1]:8000", "::1", (), 200),
        ("localhost", "::1", (), 200),
        ("127.0.0.1:9", "::ffff:127.0.0.1", (), 200),
        (None, "127.0.0.1", (), 200),  # HTTP/1.0, which no browser uses
        ("evil.example", "127.0.0.1", (), 421),
        ("evil.example:8000", "127.0.0.1", (), 421),
        ("127.0.0.1.evil.example", "127.0.0.1", (), 421),
        ("localhost.evil.example", "127.0.0.1", (), 421),
        ("10.1.2.3", "127.0.0.1", (), 421),
        ("", "127.0.0.1", (), 421),
        ("127.0.0.1@evil.example", "127.0.0.1", (), 421),
        ("evil.example, localhost", "127.0.0.1", (), 421),
        ("localhost", "10.1.2.3", (), 421),
        ("10.1.2.3:8000", "10.1.2.3", (), 200),
        ("photos.example", "10.1.2.3", ("photos.example",), 200),
        ("PHOTOS.example:443", "10.1.2.3", ("Photos.Example",), 200),
        ("other.example", "10.1.2.3", ("photos.example",), 421),
        ("10.1.2.3", "10.1.2.3", ("photos.example",), 200),
        # All addresses of the machine: a probe of a pod or through a published port.
        ("192.168.1.5:9000", "172.17.0.2", ("0.0.0.0",), 200),
        ("[fe80::1]", "172.17.0.2", ("::",), 200),
        ("localhost:9000", "172.17.0.2", ("0.0.0.0",), 200),
        ("evil.example", "172.17.0.2", ("0.0.0.0",), 421),
        ("featnorm.default.svc", "172.17.0.2", ("0.0.0.0", "featnorm.default.svc"), 200),
        ("evil.example", "127.0.0.1", ("*",), 200),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_hosts(host, server, allowed, answer, method):
    assert status(host, server=server, allowed=allowed, method=method) == answer


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "answer"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", (), 200),
        ("http://localhost:8000", "localhost:8000", (), 200),
        ("http://localhost:3000", "localhost:8000", (), 403),
        ("http://localhost", "localhost:8000", (), 403),
        ("http://localhost", "localhost:80", (), 200),
        ("http://localhost:8000", "127.0.0.1:8000", (), 403),
        ("http://evil.example", "127.0.0.1:8000", (), 403),
        ("http://evil.example:8000", "127.0.0.1:8000", (), 403),
        ("http://127.0.0.1.evil.example", "127.0.0.1", (), 403),
        ("null", "127.0.0.1", (), 403),
        ("", "127.0.0.1", (), 403),
        # Behind a proxy with TLS, which keeps or replaces the name.
        ("https://photos.example", "photos.example", ("photos.example",), 200),
        ("https://photos.example", "127.0.0.1:8000", ("photos.example",), 200),
        ("https://evil.example", "photos.example", ("photos.example",), 403),
        ("http://evil.example", "localhost", ("*",), 403),
        ("http://192.168.1.6", "192.168.1.5", ("0.0.0.0",), 403),
    ],
)  # fmt: skip
def test_origins(origin, host, allowed, answer):
    assert status(host, origin=origin, allowed=allowed) == answer
    assert status(host, origin=origin, allowed=allowed, method="GET") == 200


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0", "photos.example"])
def test_only_given_names_may_come_from_any_port(bound):
    host = "127.0.0.1" if bound == "0.0.0.0" else bound
    for allowed, answer in (((), 403), (("given.example",), 403), ((host,), 200)):
        how = {"bound": bound, "allowed": allowed}
        assert status(f"{host}:8000", origin=f"http://{host}:8000", **how) == 200
        assert status(f"{host}:8000", origin=f"http://{host}:9999", **how) == answer
    assert status("127.0.0.1:8000", origin="http://0.0.0.0:9999", bound="0.0.0.0", allowed=["0.0.0.0"]) == 403
    assert status("other.example", bound=bound) == 421


@pytest.mark.parametrize("host", ["http://a.example", "a.example/", "a.example:80", "a b", "", "user@a"])
def test_an_allowed_host_is_a_name(host):
    with pytest.raises(ValueError, match="is not a host name: omit scheme, port and path"):
        allowed_name(host)


def test_an_application_checks_its_hosts(scorer):
    app = create_app(scorer, allowed_hosts=["photos.example"])
    with TestClient(app, "http://photos.example") as client:
        assert client.get("/healthz").status_code == 200
        foreign = client.get("/healthz", headers={"Host": "evil.example"})
        assert foreign.status_code == 421
        assert "is not configured for the host 'evil.example'" in foreign.json()["error"]
        assert foreign.json()["request_id"] == foreign.headers["x-request-id"]
        posted = client.post("/v1/score", content=b"", headers={"Origin": "http://evil.example"})
        assert posted.status_code == 403
        assert "a page of another origin, 'http://evil.example'" in posted.json()["error"]
    with pytest.raises(ValueError, match="is not a host name"):
        create_app(scorer, allowed_hosts=["http://photos.example"])
