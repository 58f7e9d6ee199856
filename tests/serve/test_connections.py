"""Connections of clients, by raw sockets."""

import asyncio
import json
import socket
import struct
from contextlib import asynccontextmanager

import pytest
import uvicorn

from asking import until
from featnorm.serve import Limits
from featnorm.serve.connections import Connection, connection_type
from featnorm.serve.server import _Server, bind

GET = b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Echo:
    """An application that echoes and records its requests."""

    def __init__(self):
        self.seen = []
        self.left = 0
        self.go = asyncio.Event()

    async def __call__(self, scope, receive, send):
        path = scope["path"]
        body, more = b"", path != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            body += message["body"]
            more = message["more_body"]
        self.seen.append(path)
        if path == "/hold":
            leaving = asyncio.create_task(receive())
            going = asyncio.create_task(self.go.wait())
            await asyncio.wait({leaving, going}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            if not going.done():
                going.cancel()
                return
        sizes = {"/big": 2**25, "/page": 2**17}
        content = json.dumps([scope["method"], path, body.decode()]).encode()
        content = b"x" * sizes[path] if path in sizes else content
        close = [(b"connection", b"close")] if path == "/early" else []
        headers = [(b"content-length", b"%d" % len(content)), *close]
        self.headers = scope["headers"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


class Listening:
    """An application that is served on a socket."""

    def __init__(self, limits):
        self.app = Echo()
        self.bound = bind("127.0.0.1", 0)
        http = connection_type(limits)
        config = uvicorn.Config(self.app, http=http, ws="none", lifespan="off", log_config=None, log_level="error")
        self.server = _Server(config, lambda: None, limits.grace)
        self.address = self.bound.getsockname()

    @property
    def connections(self):
        return self.server.server_state.connections

    async def connect(self, *said):
        reader, writer = await asyncio.open_connection(*self.address, limit=2**12)
        writer.write(b"".join(said))
        return reader, writer

    async def ask(self, *said):
        """Return all data until the service closes the connection."""
        reader, writer = await self.connect(*said)
        try:
            return await asyncio.wait_for(reader.read(), 30)
        finally:
            writer.close()

    async def answers(self, *said):
        """Return the contents of the responses to some requests, the last of which closes the connection."""
        return contents(await self.ask(*said))


def contents(answer):
    found = []
    while answer:
        head, _, rest = answer.partition(b"\r\n\r\n")
        if b" 100 " in head.splitlines()[0]:
            answer = rest
            continue
        (length,) = [int(line.split(b":")[1]) for line in head.lower().splitlines() if b"content-length" in line]
        found.append(json.loads(rest[:length] or b"null"))
        answer = rest[length:]
    return found


def serving(test, limits=None):
    """Run a test, which is a coroutine, with a service."""

    @asynccontextmanager
    async def service():
        listening = Listening(limits or Limits())
        task = asyncio.create_task(listening.server.serve([listening.bound]))
        await until(lambda: listening.server.started)
        try:
            yield listening
        finally:
            listening.app.go.set()
            listening.server.should_exit = True
            await task

    async def main():
        async with service() as listening:
            await test(listening)

    asyncio.run(main())


AMBIGUOUS = {
    "length and chunks": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "the same length twice": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a list of lengths": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "a signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "a negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "a hexadecimal length": POST + b"Content-Length: 0x3\r\n\r\nabc",
    "an empty length": POST + b"Content-Length:\r\n\r\nabc",
    "a huge length": POST + b"Content-Length: 99999999999999999999\r\n\r\nabc",
    "an unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunks that are coded": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunks twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no coding": POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a signed chunk": CHUNKED + b"+1\r\na\r\n0\r\n\r\n",
    "a negative chunk": CHUNKED + b"-1\r\na\r\n0\r\n\r\n",
    "a chunk with 0x": CHUNKED + b"0x1\r\na\r\n0\r\n\r\n",
    "a chunk with a space": CHUNKED + b"1 \r\na\r\n0\r\n\r\n",
    "an empty chunk size": CHUNKED + b"\r\na\r\n0\r\n\r\n",
    "a chunk beyond 64 bits": CHUNKED + b"10000000000000001\r\na\r\n0\r\n\r\n",
    "a chunk that is longer": CHUNKED + b"1\r\nab\r\n0\r\n\r\n",
    "a chunk size with LF": CHUNKED + b"1\na\r\n0\r\n\r\n",
    "a chunk with LF": CHUNKED + b"1\r\na\n0\r\n\r\n",
    "an extension with LF": CHUNKED + b"1;a\na\r\n0\r\n\r\n",
    "a length after the chunks": CHUNKED + b"0\r\nContent-Length: 5\r\n\r\nhello",
    "a request line with LF": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "a header with LF": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "an end with LF": b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\rc\r\n\r\n",
    "a NUL": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\0c\r\n\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "another host in the target": b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "a tunnel": b"CONNECT b:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "no path": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}  # fmt: skip


def test_ambiguous_requests_are_rejected_and_the_connection_closed():
    async def test(service):
        for name, request in AMBIGUOUS.items():
            answer = await service.ask(request, GET % b"second")
            assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n"), name
            assert answer.count(b"HTTP/1.1 ") == 1, name
            assert b"connection: close" in answer, name
            assert set(contents(answer)[0]) == {"error", "request_id"}
        for version in (b"0.9", b"2.0"):
            request = b"GET / HTTP/%s\r\nHost: a\r\n\r\n" % version
            assert (await service.ask(request, GET % b"second")).startswith(b"HTTP/1.1 505 ")
        assert service.app.seen == []

    serving(test)


def test_regular_requests_are_answered():
    async def test(service):
        last = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        end = ["GET", "/last", ""]
        for request, answer in (
            (POST + b"Content-Length: 3\r\n\r\nabc", ["POST", "/", "abc"]),
            (CHUNKED + b"1\r\na\r\n2;name=value\r\nbc\r\n0\r\n\r\n", ["POST", "/", "abc"]),
            (CHUNKED + b"3\r\nabc\r\n0\r\nX-Trailer: b\r\n\r\n", ["POST", "/", "abc"]),
            (b"\r\n" + GET % b"a%20b?c", ["GET", "/a b", ""]),
            (POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc", ["POST", "/", "abc"]),
            # Java's client requests an upgrade to HTTP/2 with its first request.
            (
                POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n"
                b"Content-Length: 3\r\n\r\nabc",
                ["POST", "/", "abc"],
            ),
            (
                POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"3\r\nabc\r\n0\r\n\r\n",
                ["POST", "/", "abc"],
            ),
            (b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", ["GET", "/a", ""]),
        ):
            # All at once, and byte by byte.
            assert await service.answers(request, last) == [answer, end]
            reader, writer = await service.connect()
            for byte in request:
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            writer.write(last)
            assert contents(await asyncio.wait_for(reader.read(), 30)) == [answer, end]
            writer.close()
        assert await service.answers(b"GET / HTTP/1.0\r\n\r\n") == [["GET", "/", ""]]
        assert await service.answers(*[GET % b"%d" % i for i in range(20)], last) == [
            *[["GET", f"/{i}", ""] for i in range(20)],
            end,
        ]

    serving(test)


def test_trailers_are_not_headers():
    async def test(service):
        reader, writer = await service.connect(CHUNKED + b"1\r\na\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"]"), 30)
        writer.close()
        assert [name for name, _ in service.app.headers] == [b"host", b"transfer-encoding"]

    serving(test)


def test_chunks_of_a_byte_are_rejected_but_lines_are_not():
    async def test(service):
        answer = await service.ask(CHUNKED, b"1\r\na\r\n" * 100_000)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert "chunks of less than 64 bytes" in contents(answer)[0]["error"]
        await until(lambda: service.app.left == 1)
        for size, count in ((1, 4000), (77, 20_000)):
            chunks = b"%x\r\n%s\r\n" % (size, b"a" * size) * count
            _, writer = await service.connect(CHUNKED, chunks, b"0\r\n\r\n")
            writer.close()
            await until(lambda: service.app.seen == ["/"])
            service.app.seen.clear()

    serving(test)


@pytest.mark.parametrize(
    ("start", "endless", "status"),
    [
        (b"GET /", b"a" * 1000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"a" * 1000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"A: b\r\n" * 100, 431),
        (b"", b"\r\n" * 500, 431),
        (CHUNKED + b"1;", b"a" * 1000, 400),
        (CHUNKED + b"0\r\n", b"A: b\r\n" * 100, 431),
    ],
)
def test_endless_requests_are_rejected(start, endless, status):
    async def test(service):
        reader, writer = await service.connect(start)
        answer = asyncio.create_task(reader.read())
        while not answer.done():
            writer.write(endless)
            await asyncio.wait({answer}, timeout=0.0001)
        writer.close()
        assert answer.result().startswith(b"HTTP/1.1 %d " % status)
        assert service.app.seen == []

    serving(test)


def test_the_number_of_pipelined_requests_is_limited():
    async def test(service):
        answers = await service.answers(GET % b"a" * 5000)
        assert answers == [["GET", "/a", ""]] * len(answers)
        assert 1 <= len(answers) < 5000
        assert len(service.app.seen) == len(answers)

    serving(test)


def test_a_bad_request_does_not_affect_those_before_it():
    async def test(service):
        reader, writer = await service.connect(GET % b"hold", GET % b"next", b"GET / NONSENSE\r\n\r\n", GET % b"b")
        await until(lambda: service.app.seen == ["/hold"])
        service.app.go.set()
        answer = await asyncio.wait_for(reader.read(), 30)
        assert contents(answer) == [["GET", "/hold", ""], ["GET", "/next", ""]]
        assert answer.endswith(b"]")
        writer.close()

    serving(test)


def test_a_response_before_the_end_of_the_body_arrives():
    async def test(service):
        reader, writer = await service.connect(
            b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 16000000\r\n\r\n"
        )
        for _ in range(100):
            writer.write(b"a" * 100_000)
            await asyncio.sleep(0)
        assert contents(await asyncio.wait_for(reader.read(), 30)) == [["POST", "/early", ""]]
        writer.close()

    serving(test)


def test_a_client_that_resets_at_an_early_answer_is_no_fault(monkeypatch, caplog):
    linger, lingered = Connection._linger, []

    async def test(listening):
        client = socket.create_connection(listening.address)
        # As a client does that closes and has not read all.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def reset_first(connection):
            client.close()
            linger(connection)
            lingered.append(connection)

        monkeypatch.setattr(Connection, "_linger", reset_first)
        client.sendall(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12")
        await until(lambda: listening.app.seen == ["/early"] and not listening.connections)

    serving(test)
    assert lingered
    assert not caplog.records


def test_an_idle_connection_is_closed():
    async def test(service):
        slow = await service.connect(GET % b"a", b"GET /b")
        silent = await service.connect()
        assert await asyncio.wait_for(silent[0].read(), 30) == b""
        assert contents(await asyncio.wait_for(slow[0].read(), 30)) == [["GET", "/a", ""]]
        for _, writer in (slow, silent):
            writer.close()

    serving(test, Limits(seconds=0.3))


@pytest.mark.parametrize("closing", [b"", b"Connection: close\r\n"])
def test_a_client_that_does_not_read_is_disconnected(closing):
    async def test(service):
        # More than fits into the buffers of both systems.
        _, writer = await service.connect(b"GET /big HTTP/1.1\r\nHost: a\r\n" + closing + b"\r\n")
        await until(lambda: service.app.seen)
        await until(lambda: not service.connections and not service.server.server_state.tasks)
        writer.close()

    serving(test, Limits(seconds=0.5))


def test_a_client_that_never_reads_gets_few_responses():
    async def test(service):
        _, writer = await service.connect()
        while not writer.is_closing() and (service.connections or not service.app.seen):
            writer.write(GET % b"page")
            await asyncio.sleep(0.001)
        # The size of the buffers of both systems, which is much less than all responses.
        assert len(service.app.seen) < 200
        writer.close()

    serving(test, Limits(seconds=0.5))


def test_the_oldest_incomplete_request_is_evicted():
    async def test(service):
        clients = [await service.connect(GET % b"hold")]
        await until(lambda: service.app.seen == ["/hold"])
        clients.append(await service.connect(POST + b"Content-Length: 3\r\n\r\n"))
        clients.append(await service.connect(b"GET /"))
        await until(lambda: len(service.connections) == 3)
        # First the one with an incomplete head, then the one with an incomplete body.
        for i in (2, 1):
            clients.append(await service.connect(GET % b"hold"))
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(clients[i][0].readexactly(1), 30)
        assert service.app.left == 1
        await until(lambda: len(service.app.seen) == 3)
        answer = await service.ask(GET % b"late")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
        assert contents(answer)[0]["error"] == "3 connections are already open: try again later"
        service.app.go.set()
        for i in (0, 3, 4):
            assert (await asyncio.wait_for(clients[i][0].readuntil(b"]"), 30)).startswith(b"HTTP/1.1 200 ")
        for _, writer in clients:
            writer.close()

    serving(test, Limits(connections=3))


def test_the_service_shuts_down_whatever_its_clients_do():
    async def test(service):
        said = (b"", b"GET /", POST + b"Content-Length: 3\r\n\r\n", GET % b"big", GET % b"hold", GET % b"done")
        clients = [await service.connect(text) for text in said]
        await until(lambda: {*service.app.seen} == {"/big", "/hold", "/done"})
        service.server.should_exit = True
        half, unread, held, done = [await asyncio.wait_for(clients[i][0].read(2**26), 30) for i in (2, 3, 4, 5)]
        assert half.startswith(b"HTTP/1.1 503 ")
        assert held.startswith(b"HTTP/1.1 503 ")
        assert contents(held)[0]["error"] == "the service is shutting down: try again later"
        assert unread.startswith(b"HTTP/1.1 200 ")
        assert done.startswith(b"HTTP/1.1 200 ")
        await until(lambda: not service.connections and not service.server.server_state.tasks)
        for _, writer in clients:
            writer.close()

    serving(test, Limits(grace=1.0))
