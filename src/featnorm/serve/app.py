"""The routes of a service: `create_app`."""

import asyncio
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

import featnorm
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.serve.batching import Batcher, Scored
from featnorm.serve.hosts import HostCheck, allowed_name
from featnorm.serve.limits import MAX_PICTURED, RETRY, BodyLimit, Limits
from featnorm.serve.metrics import Metrics
from featnorm.serve.page import home_page, not_found
from featnorm.serve.requests import InputCounts, RequestLog, problem
from featnorm.serve.responses import Detector, Problem, Results, Scorers, result_of
from featnorm.serve.scorers import ScorerFile, ServedScorer, ServedScorers
from featnorm.serve.uploads import DESCRIPTION, read_body, read_uploads
from featnorm.serve.workers import Workers

_ROOT_PATH = re.compile(r"(/[^/?#\s]+)*")


def create_app(
    scorers: Scorer | Mapping[str, Scorer | ScorerFile],
    limits: Limits | None = None,
    token: str | None = None,
    *,
    allowed_hosts: Sequence[str] = (),
    bound_host: str | None = None,
    root_path: str = "",
    runtime: Runtime | None = None,
) -> FastAPI:
    """Create an ASGI application that scores images, texts or rows over HTTP.

    It logs to the logger ``featnorm.serve``. It starts with the server; mounted in another application, it starts
    with the first request to ``/readyz`` or for a score.

    Parameters
    ----------
    scorers : Scorer, or mapping of str to Scorer or ScorerFile
        Calibrated scorers by name. Each is at ``/v1/{name}/score`` and ``/v1/{name}/detector``; a single one is at
        ``/v1/score`` and ``/v1/detector`` too, and needs no name. A `ScorerFile` is loaded again when it is
        replaced: the new scorer is loaded beside the old one, and requests in progress finish on the old one.
    limits : Limits, optional
        Limits on what a client may send. Default: those of `Limits`.
    token : str, optional
        Token that a client must send as ``Authorization: Bearer TOKEN``. Default: no token is needed.
    allowed_hosts : sequence of str
        Host names of the service, besides the address at which a connection arrives: behind a proxy, or mounted
        in another application, those under which clients reach it. ``0.0.0.0`` or ``::`` means any IP address and
        ``localhost``, ``*`` every host. Requests for other hosts get 421, and a POST from a page of another origin
        gets 403. Pages of these names may come from any port.
    bound_host : str, optional
        Address or name that the server listens on. It is a host name of the service as well, but its pages must
        come from the same port.
    root_path : str
        Path under which a proxy serves the application, such as ``/ood``, whether or not the proxy removes it from
        the requests. Mounted in another application, the service knows its path.
    runtime : Runtime, optional
        Precision to score in. Default: 32-true. The scorers stay on their devices.

    Raises
    ------
    ValueError
        If there is no scorer, a name is empty or contains ``/``, a scorer is not calibrated or has no preprocess,
        the token is empty or has characters that a header cannot have, an allowed host is not a host name, or the
        root path does not start with ``/`` or ends with it.
    """
    limits = limits or Limits()
    if not _ROOT_PATH.fullmatch(root_path):
        raise ValueError(f"the root path {root_path!r} must start with / and not end with it, such as /ood")
    if token is not None and not (token.isascii() and token.isprintable() and token.split() == [token]):
        raise ValueError("the token must be printable ASCII without spaces, and not empty")
    hosts = [allowed_name(host) for host in allowed_hosts]
    bound = None if bound_host is None else allowed_name(bound_host)
    served = ServedScorers(scorers, limits, runtime)
    workers: dict[asyncio.AbstractEventLoop, Workers] = {}

    def pending() -> Counter[str]:
        return sum((running.batcher.pending for running in workers.values()), Counter())

    metrics = Metrics(served, pending, limits.batch_size)

    def start() -> Workers:
        """Return the workers of the running event loop, and start them if necessary."""
        loop = asyncio.get_running_loop()
        if loop not in workers:
            for closed in [other for other in workers if other.is_closed()]:
                del workers[closed]
            workers[loop] = Workers(Batcher(limits, metrics.batch), served)
        return workers[loop]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        workers.pop(asyncio.get_running_loop(), None)
        running = start()
        try:
            yield
        finally:
            running.stop()

    app = FastAPI(
        title="featnorm",
        version=featnorm.__version__,
        description="Does the model know this image, text or row? Out-of-distribution detection, item by item.",
        lifespan=lifespan,
        # These pages would load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(HostCheck, allowed=hosts, bound=bound)
    app.add_middleware(RequestLog, metrics=metrics)
    if root_path:
        app.add_middleware(_RootPath, path=root_path)  # the last is the outermost
    bearer = HTTPBearer(auto_error=False)

    async def authenticate(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        assert token is not None
        if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(
                401, "this service requires a token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    authenticated = [] if token is None else [Depends(authenticate)]
    rejections: dict[int | str, dict[str, Any]] = {
        400: {"model": Problem, "description": "The body cannot be read, or contains no input."},
        401: {"model": Problem, "description": "The token is missing or wrong."},
        403: {"model": Problem, "description": "The request comes from a page of another origin."},
        404: {"model": Problem, "description": "The service has no scorer of this name."},
        408: {"model": Problem, "description": "The request body did not arrive in time."},
        413: {"model": Problem, "description": "The body is too long, or contains too many inputs or pixels."},
        415: {
            "model": Problem,
            "description": "The type of the body is not supported, or the body is compressed.",
        },
        421: {"model": Problem, "description": "The request is for another host."},
        422: {"model": Results, "description": "None of the inputs could be scored."},
        503: {"model": Problem, "description": "The queue is full, or scoring took too long; see Retry-After."},
    }

    def selected(request: Request) -> ServedScorer:
        """Return the scorer that a request is for, by its path."""
        name = request.path_params.get("name", next(iter(served)) if len(served) == 1 else "")
        if name not in served:
            raise HTTPException(404)
        request.state.scorer = name
        return served[name]

    async def score(
        request: Request,
        explain: Annotated[
            bool,
            Query(
                description="Whether to explain the verdicts. The explanations of flagged images, at most "
                f"{MAX_PICTURED} per request, those with the lowest scores, have pictures: thumbnails of similar "
                "images that the detector was fitted to, and a heat map; those of texts and rows have none. Each "
                "of these counts as another image in the queue, and takes as long as several images. If the "
                "service is busy, there are no pictures, and `no_heat` says so."
            ),
        ] = False,
        group: Annotated[
            str | None,
            Query(description="Group of the inputs, for a scorer with thresholds by group other than `class`."),
        ] = None,
    ) -> Response:
        scorer = selected(request)
        if group not in (scorer.groups or [None]):
            has = (
                f"must be one of {', '.join(scorer.groups)}"
                if scorer.groups
                else "must be omitted: the scorer has no thresholds by group"
            )
            raise HTTPException(400, f"the parameter group {has}")
        if explain and not scorer.description.explains:
            raise HTTPException(400, "the detector's file has no statistics for explanations: fit it again")
        running = start()
        if running.stopped:
            raise HTTPException(503, "the service is shutting down: try again later", RETRY)
        body = await read_body(request, scorer.kind)

        async def scored() -> Scored:
            uploads = await read_uploads(body, scorer.kind, limits, running.parser)
            return await running.batcher.score(uploads, scorer, explain=explain, group=group)

        verdicts, whys = await _unless_disconnected(request, scored(), limits)
        counts: InputCounts = request.state.input_counts
        for verdict in verdicts:
            metrics.verdict(scorer, verdict)
            counts.inputs += 1
            counts.flagged += verdict.is_id is False
            counts.unreadable += verdict.error is not None
        status = 422 if counts.unreadable == counts.inputs else 200
        results = [result_of(verdict) for verdict in verdicts]
        if explain:
            for i, result in enumerate(results):
                result["why"] = whys[i].model_dump() if i in whys else None
        return JSONResponse({"results": results, "digest": scorer.description.digest}, status)

    async def detector(request: Request) -> Detector:
        return selected(request).current

    of_name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": [*served]}}
    for prefix, parameters, documented in (("/v1", [], len(served) == 1), ("/v1/{name}", [of_name], True)):
        app.post(
            f"{prefix}/score",
            summary="Score one or more images, texts or rows",
            response_model=Results,
            responses=rejections,
            openapi_extra={"requestBody": DESCRIPTION, "parameters": parameters},
            dependencies=authenticated,
            include_in_schema=documented,
        )(score)
        app.get(
            f"{prefix}/detector",
            summary="The detector that scores the images, texts or rows",
            response_model=Detector,
            responses={401: rejections[401], 404: rejections[404]},
            openapi_extra={"parameters": parameters},
            dependencies=authenticated,
            include_in_schema=documented,
        )(detector)
        app.head(f"{prefix}/detector", include_in_schema=False, dependencies=authenticated)(detector)

    @app.get(
        "/v1/scorers",
        summary="The scorers by name",
        response_model=Scorers,
        responses={401: rejections[401]},
        dependencies=authenticated,
    )
    @app.head("/v1/scorers", include_in_schema=False, dependencies=authenticated)
    async def list_scorers() -> dict[str, Any]:
        return {"scorers": [scorer.description for scorer in served.values()]}

    @app.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 401: rejections[401]},
        dependencies=authenticated,
    )
    @app.head("/metrics", include_in_schema=False, dependencies=authenticated)
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz", summary="Whether the process is alive")
    @app.head("/healthz", include_in_schema=False)
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="Whether inputs can be scored", responses={503: {"model": Problem}})
    @app.head("/readyz", include_in_schema=False)
    async def is_ready() -> dict[str, str]:
        if not start().ready:
            raise HTTPException(503, "the service is not ready: it is starting, or shutting down", RETRY)
        return {"status": "ready"}

    page = home_page({scorer.kind for scorer in served.values()})

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    @app.head("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return page

    @app.exception_handler(HTTPException)
    async def rejected(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return not_found(request, [*served])
        return problem(error.status_code, error.detail, request.state.request_id, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(400, f"{first['loc'][-1]}: {first['msg']}", request.state.request_id)

    return app


class _RootPath:
    """Middleware that sets the root path, which need not be a part of the path of the request."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        self.app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "root_path": self._path}, receive, send)


async def _unless_disconnected(request: Request, work: Any, limits: Limits) -> Scored:
    """Await some work, but cancel it if the time is up or the client disconnects."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    left = request.state.deadline - asyncio.get_running_loop().time()
    try:
        await asyncio.wait({working, leaving}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientDisconnect
        raise HTTPException(
            503, f"the inputs were not scored within {limits.seconds:g} seconds: try again later", RETRY
        )
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
