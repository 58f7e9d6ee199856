"""`create_app`: the routes of a detector's service."""

import asyncio
import dataclasses
import math
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import featnorm
from featnorm.image_scorer import ImageScorer, ImageVerdict
from featnorm.records import row_of
from featnorm.runtime import Runtime
from featnorm.serve.batching import Batcher, Waiting
from featnorm.serve.bodies import DESCRIPTION, read_body, read_uploads
from featnorm.serve.hosts import HostCheck, allowed_name
from featnorm.serve.limits import RETRY, BodyBound, Limits
from featnorm.serve.metrics import Metrics
from featnorm.serve.page import render_page
from featnorm.serve.requests import RequestLog, Tally, problem
from featnorm.serve.workers import Workers

_BINS = 12, 40


class Result(BaseModel):
    """What is said of one image."""

    name: str = Field(description="Its file name, or `image N` where the request gives none.")
    score: float | None = Field(
        description="Higher is more in-distribution. Null where the image cannot be read, and where the score is "
        "infinite, which JSON has no number for: p-value and verdict then hold all the same."
    )
    p_value: float | None = Field(description="Conformal; small is out-of-distribution.")
    verdict: Literal["ID", "OOD"] | None = Field(description="ID where the score reaches the threshold.")
    predicted: str | None = Field(description="The class, where the detector was fitted on labels.")
    error: str | None = Field(description="Why the image cannot be judged.")
    why: list[tuple[str, str]] | None = Field(
        default=None, description="With `explain=true`: rows of what, and how it is."
    )


class Results(BaseModel):
    """What is said of the images of a request, in their order."""

    results: list[Result]


class Problem(BaseModel):
    """Why a request is refused as a whole."""

    error: str
    request_id: str


class Counts(BaseModel):
    """A histogram: n counts between n + 1 edges. What lies beyond an end is counted into the bar there."""

    edges: list[float]
    counts: list[int]


class Detector(BaseModel):
    """What judges the images."""

    detector: str
    backbone: str
    facts: dict[str, str]
    classes: list[str] | None
    threshold: float | None = Field(description="A score from here on is ID; null where it is infinite.")
    tpr: float = Field(description="The share of images like those it was fitted on that it accepts, at least.")
    calibration: Counts = Field(description="The scores of held-out images, which the p-values are of.")
    explains: bool = Field(description="Whether it can say why.")
    limits: dict[str, int | float]


def create_app(
    scorer: ImageScorer,
    limits: Limits | None = None,
    token: str | None = None,
    *,
    allowed_hosts: Sequence[str] = (),
    bound_host: str | None = None,
    runtime: Runtime | None = None,
) -> FastAPI:
    """Return a service that judges images over HTTP, as an ASGI application.

    Its log goes to the logger ``featnorm.serve``. It starts with the server, or, where it is mounted in another
    application, with the first request to ``/readyz`` or ``/v1/score``.

    Parameters
    ----------
    scorer : a calibrated image scorer.
    limits : the bounds; those of `Limits` without it.
    token : what a client must send as ``Authorization: Bearer TOKEN`` to be served; anybody is without it.
    allowed_hosts : host names to answer to, beside the address at which a connection arrives; behind a proxy, or
        mounted in another application, those under which clients reach it. ``0.0.0.0`` or ``::`` stands for any IP
        address and ``localhost``, ``*`` for every host. Other hosts get 421, and a POST from a page of another
        origin gets 403. Pages of these names may come from any port.
    bound_host : the address or name that the server listens on, which is answered to as well; pages of it must
        come from the same port.
    runtime : precision; the scorer stays on the device where it is. Default: 32-true.

    Raises
    ------
    ValueError
        The scorer is not calibrated, the token is empty or holds what no header can, or an allowed host is no host
        name.
    """
    limits = limits or Limits()
    calibration = scorer.scorer.calibration
    if calibration is None:
        raise ValueError("the scorer is not calibrated: without a threshold it gives no verdict")
    if token is not None and not (token.isascii() and token.isprintable() and token.split() == [token]):
        raise ValueError("the token must be printable ASCII without spaces, and not empty")
    hosts = [allowed_name(host) for host in allowed_hosts]
    bound = None if bound_host is None else allowed_name(bound_host)
    metrics = Metrics(calibration.scores, limits.batch_size)
    workers: dict[asyncio.AbstractEventLoop, Workers] = {}
    metrics.watch_queue(lambda: sum(some.batcher.waiting for some in workers.values()))

    def start() -> Workers:
        """Return the workers of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in workers:
            for ended in [other for other in workers if other.is_closed()]:
                del workers[ended]
            predict = partial(_predict, scorer, runtime)
            workers[loop] = Workers(Batcher(scorer.transform, predict, limits, metrics.batch))
        return workers[loop]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        workers.pop(asyncio.get_running_loop(), None)
        mine = start()
        try:
            yield
        finally:
            mine.stop()

    app = FastAPI(
        title="featnorm",
        version=featnorm.__version__,
        description="Does the model know this image? Out-of-distribution detection, image by image.",
        lifespan=lifespan,
        # Their pages load scripts from a host that is not this one.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyBound, limits=limits)
    app.add_middleware(HostCheck, allowed=hosts, bound=bound)
    app.add_middleware(RequestLog, metrics=metrics)  # the last is the outermost
    bearer = HTTPBearer(auto_error=False)

    async def allowed(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        assert token is not None
        if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(
                401, "this service wants a token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    guarded = [] if token is None else [Depends(allowed)]
    refusals: dict[int | str, dict[str, Any]] = {
        400: {"model": Problem, "description": "The body cannot be read, or holds no image."},
        401: {"model": Problem, "description": "The service wants another token."},
        403: {"model": Problem, "description": "The request comes from a page of another origin."},
        408: {"model": Problem, "description": "The request body did not arrive in time."},
        413: {"model": Problem, "description": "The body is too long, or holds too many images or pixels."},
        415: {"model": Problem, "description": "The body is of a type that is not read, or is compressed."},
        421: {"model": Problem, "description": "The service does not answer to this host."},
        422: {"model": Results, "description": "None of the images could be judged."},
        503: {"model": Problem, "description": "Too much waits already, or it took too long; see Retry-After."},
    }

    @app.post(
        "/v1/score",
        summary="Judge one image or several",
        response_model=Results,
        responses=refusals,
        openapi_extra={"requestBody": DESCRIPTION},
        dependencies=guarded,
    )
    async def score(
        request: Request, explain: Annotated[bool, Query(description="Say why, too.")] = False
    ) -> Response:
        if explain and scorer.statistics is None:
            raise HTTPException(400, "this detector's file keeps no statistics to explain by: fit it again")
        mine = start()
        if mine.stopped:
            raise HTTPException(503, "the service is shutting down: try again later", RETRY)
        body = await read_body(request)

        async def judged() -> list[ImageVerdict]:
            return await mine.batcher.score(await read_uploads(body, limits, mine.parser), explain)

        verdicts = await _while_there(request, judged(), limits)
        tally: Tally = request.state.tally
        for verdict in verdicts:
            metrics.image(verdict)
            tally.images += 1
            tally.flagged += verdict.is_id is False
            tally.unreadable += verdict.error is not None
        status = 422 if tally.unreadable == tally.images else 200
        return JSONResponse({"results": [_result(verdict, explain) for verdict in verdicts]}, status)

    @app.get(
        "/v1/detector", summary="What judges the images", response_model=Detector, dependencies=guarded,
        responses={401: refusals[401]},
    )  # fmt: skip
    @app.head("/v1/detector", include_in_schema=False, dependencies=guarded)
    async def detector() -> Detector:
        assert calibration is not None
        return Detector(
            detector=repr(scorer.scorer.detector),
            backbone=scorer.backbone,
            facts=scorer.facts,
            classes=scorer.class_names,
            threshold=_finite(float(calibration.threshold)),
            tpr=calibration.tpr,
            calibration=histogram(calibration.scores, float(calibration.threshold)),
            explains=scorer.statistics is not None,
            limits=dataclasses.asdict(limits),
        )

    @app.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 401: refusals[401]},
        dependencies=guarded,
    )
    @app.head("/metrics", include_in_schema=False, dependencies=guarded)
    async def counters() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz", summary="Whether the process is alive")
    @app.head("/healthz", include_in_schema=False)
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="Whether images are judged", responses={503: {"model": Problem}})
    @app.head("/readyz", include_in_schema=False)
    async def is_ready() -> dict[str, str]:
        if not start().ready:
            raise HTTPException(503, "the service is not ready: it is starting, or shutting down", RETRY)
        return {"status": "ready"}

    page, policy = render_page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    @app.head("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, error.detail, request.state.request_id, error.headers)

    @app.exception_handler(RequestValidationError)
    async def misspelt(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(400, f"{first['loc'][-1]}: {first['msg']}", request.state.request_id)

    return app


async def _while_there(request: Request, work: Any, limits: Limits) -> list[ImageVerdict]:
    """Return what becomes of some work, unless the time is up or the client goes away; it is then cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    left = request.state.deadline - asyncio.get_running_loop().time()
    try:
        await asyncio.wait({working, leaving}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientDisconnect
        raise HTTPException(503, f"there was no verdict within {limits.seconds:g} seconds: try again later", RETRY)
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _predict(scorer: ImageScorer, runtime: Runtime | None, images: Sequence[Waiting]) -> list[ImageVerdict]:
    return scorer.predict_batch(
        torch.stack([image.tensor for image in images]),
        [image.upload.name for image in images],
        explain=[i for i, image in enumerate(images) if image.explain],
        runtime=runtime,
    )


def _result(verdict: ImageVerdict, explain: bool) -> dict[str, Any]:
    row = row_of(verdict)
    result = {"name": row.pop("path"), **row, "score": _finite(row["score"])}
    return {**result, "why": verdict.why and verdict.why.rows()} if explain else result


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value


def histogram(scores: torch.Tensor, threshold: float) -> Counts:
    """Return the histogram of calibration scores (n,), over the range that holds all but a hundredth of them."""
    values = scores.cpu().numpy()
    finite = values[np.isfinite(values)]
    if not len(finite):
        finite = np.zeros(1)
    low = float(np.quantile(finite, 0.005, method="lower"))
    high = float(np.quantile(finite, 0.995, method="higher"))
    if math.isfinite(threshold):
        low, high = min(low, threshold), max(high, threshold)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = 0.05 * abs(low) or 0.5
        low, high = low - pad, high + pad
    edges = np.linspace(low, high, int(np.clip(math.sqrt(len(values)), *_BINS)) + 1)
    counts, _ = np.histogram(np.clip(values, low, high), edges)
    return Counts(edges=edges.tolist(), counts=counts.tolist())
