"""Clients of an application: one that waits until it is ready, and one whose body comes in parts and may end."""

import asyncio
import json
import time
from contextlib import asynccontextmanager, contextmanager

from fastapi.testclient import TestClient

from apart import command
from featnorm import scorer_file
from featnorm.scorer import Scorer


class Asking:
    """One pending request to an application."""

    def __init__(self, app, *, method="POST", path="/v1/score", **headers):
        headers = {"content-type": "image/png", "transfer-encoding": "chunked"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self._inbox = asyncio.Queue()
        self._sent = []
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._take))

    async def _take(self, message):
        self._sent.append(message)

    def say(self, body, *, more=False):
        self._inbox.put_nowait({"type": "http.request", "body": body, "more_body": more})
        return self

    def leave(self):
        self._inbox.put_nowait({"type": "http.disconnect"})
        return self

    async def answer(self):
        """Return status, headers and content once the application has finished."""
        await asyncio.wait_for(self.task, 30)
        start, *parts = self._sent
        headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return start["status"], headers, json.loads(b"".join(part["body"] for part in parts))


@contextmanager
def client_of(app, **options):
    """Start an application, wait until it is ready, and return a client of it."""
    with TestClient(app, **options) as client:
        end = time.monotonic() + 30
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < end, "it never was ready"
            time.sleep(0.002)
        yield client


@asynccontextmanager
async def running(app):
    """Start an application, and wait until it is ready."""
    async with app.router.lifespan_context(app):
        end = time.monotonic() + 30
        while (await Asking(app, method="GET", path="/readyz").say(b"").answer())[0] != 200:
            assert time.monotonic() < end, "it never was ready"
            await asyncio.sleep(0.005)
        yield app


async def until(condition):
    """Wait until a condition is true."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        await asyncio.sleep(0.002)


def serve_what_never_returns(*arguments):
    """Serve scorers whose models never return, to the end of the process. The warm-up image is enough."""
    load = scorer_file.load

    def loaded(*files, **options):
        scorer = load(*files, **options)
        Scorer.predict_batch = lambda *_, **__: print("begun", flush=True) or time.sleep(600)
        return scorer

    scorer_file.load = loaded
    command("serve", *arguments)
