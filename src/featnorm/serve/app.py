"""The routes of a detector's service: `create_app`."""

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
from featnorm._utils.ranks import shown_scores
from featnorm.drift import DriftMonitor
from featnorm.records import row_of
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.serve.batching import Batcher, Pending
from featnorm.serve.hosts import HostCheck, allowed_name
from featnorm.serve.limits import RETRY, BodyLimit, Limits
from featnorm.serve.metrics import Metrics
from featnorm.serve.page import render_page
from featnorm.serve.requests import ImageCounts, RequestLog, problem
from featnorm.serve.uploads import DESCRIPTION, read_body, read_uploads
from featnorm.serve.workers import Workers
from featnorm.verdict import ItemVerdict

_MIN_BINS, _MAX_BINS = 12, 40


class Result(BaseModel):
    """The result for one image."""

    name: str = Field(description="File name of the image, or `image N` if the request has none.")
    score: float | None = Field(
        description="Score; higher is more in-distribution. Null if the image cannot be read, or if the score is "
        "infinite, which JSON cannot represent; p-value and verdict are then valid all the same."
    )
    p_value: float | None = Field(description="Conformal p-value; a small one means out-of-distribution.")
    verdict: Literal["ID", "OOD"] | None = Field(description="ID if the score reaches the threshold, else OOD.")
    predicted: str | None = Field(description="Predicted class, if the detector was fitted on labels.")
    error: str | None = Field(description="Why the image cannot be scored.")
    why: list[tuple[str, str]] | None = Field(
        default=None, description="With `explain=true`: rows of a property and its value."
    )


class Results(BaseModel):
    """The results for the images of a request, in their order."""

    results: list[Result]


class Problem(BaseModel):
    """Why a request is rejected as a whole."""

    error: str
    request_id: str


class Histogram(BaseModel):
    """A histogram: n counts between n + 1 edges. Values beyond an end are counted in the bin at that end."""

    edges: list[float]
    counts: list[int]


class Drift(BaseModel):
    """Whether the images scored since the service started have drifted from the calibration images as a whole."""

    images: int = Field(description="Number of images scored so far.")
    log10_evidence: float = Field(description="Evidence for drift, as a base-10 logarithm; 0 at the start.")
    highest: float = Field(description="Maximum of `log10_evidence` so far.")
    alarm_level: float = Field(description="The evidence at which the alarm is raised.")
    alarmed_at: int | None = Field(description="Number of the image at which it was, from 1; null before.")


class Detector(BaseModel):
    """The detector that scores the images."""

    detector: str
    model: str | None = Field(description="Specification of the model; null if it is not known.")
    facts: dict[str, str]
    classes: list[str] | None
    threshold: float | None = Field(description="Scores at or above this are ID; null if it is infinite.")
    tpr: float = Field(description="Minimum share of in-distribution images that are accepted.")
    calibration: Histogram = Field(description="Scores of the held-out images on which p-values are based.")
    explains: bool = Field(description="Whether it can explain its verdicts.")
    limits: dict[str, int | float]
    drift: Drift | None = Field(
        description="Null if the detector was calibrated by leaving images out of its fit in turn: there are no "
        "calibration scores to compare others with."
    )


def create_app(
    scorer: Scorer,
    limits: Limits | None = None,
    token: str | None = None,
    *,
    allowed_hosts: Sequence[str] = (),
    bound_host: str | None = None,
    runtime: Runtime | None = None,
) -> FastAPI:
    """Create an ASGI application that scores images over HTTP.

    It logs to the logger ``featnorm.serve``. It starts with the server; mounted in another application, it starts
    with the first request to ``/readyz`` or ``/v1/score``.

    Parameters
    ----------
    scorer : Scorer
        A calibrated scorer.
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
    runtime : Runtime, optional
        Precision to score in. Default: 32-true. The scorer stays on its device.

    Raises
    ------
    ValueError
        If the scorer is not calibrated or has no preprocess, the token is empty or has characters that a header
        cannot have, or an allowed host is not a host name.
    """
    limits = limits or Limits()
    calibration = scorer.calibration
    if calibration is None:
        raise ValueError("the scorer is not calibrated: it has no threshold for a verdict")
    preprocess = scorer.require_preprocess()
    if token is not None and not (token.isascii() and token.isprintable() and token.split() == [token]):
        raise ValueError("the token must be printable ASCII without spaces, and not empty")
    hosts = [allowed_name(host) for host in allowed_hosts]
    bound = None if bound_host is None else allowed_name(bound_host)
    metrics = Metrics(calibration.scores, limits.batch_size)
    workers: dict[asyncio.AbstractEventLoop, Workers] = {}
    metrics.set_queue(lambda: sum(running.batcher.pending for running in workers.values()))

    def start() -> Workers:
        """Return the workers of the running event loop, and start them if necessary."""
        loop = asyncio.get_running_loop()
        if loop not in workers:
            for closed in [other for other in workers if other.is_closed()]:
                del workers[closed]
            predict = partial(_predict, scorer, runtime)
            workers[loop] = Workers(Batcher(preprocess, predict, limits, metrics.batch))
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
        description="Does the model know this image? Out-of-distribution detection, image by image.",
        lifespan=lifespan,
        # These pages would load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(HostCheck, allowed=hosts, bound=bound)
    app.add_middleware(RequestLog, metrics=metrics)  # the last is the outermost
    bearer = HTTPBearer(auto_error=False)

    async def authenticate(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        assert token is not None
        if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(
                401, "this service requires a token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    authenticated = [] if token is None else [Depends(authenticate)]
    rejections: dict[int | str, dict[str, Any]] = {
        400: {"model": Problem, "description": "The body cannot be read, or contains no image."},
        401: {"model": Problem, "description": "The token is missing or wrong."},
        403: {"model": Problem, "description": "The request comes from a page of another origin."},
        408: {"model": Problem, "description": "The request body did not arrive in time."},
        413: {"model": Problem, "description": "The body is too long, or contains too many images or pixels."},
        415: {
            "model": Problem,
            "description": "The type of the body is not supported, or the body is compressed.",
        },
        421: {"model": Problem, "description": "The request is for another host."},
        422: {"model": Results, "description": "None of the images could be scored."},
        503: {"model": Problem, "description": "The queue is full, or scoring took too long; see Retry-After."},
    }

    @app.post(
        "/v1/score",
        summary="Score one or more images",
        response_model=Results,
        responses=rejections,
        openapi_extra={"requestBody": DESCRIPTION},
        dependencies=authenticated,
    )
    async def score(
        request: Request, explain: Annotated[bool, Query(description="Whether to explain the verdicts.")] = False
    ) -> Response:
        if explain and not scorer.explains:
            raise HTTPException(400, "the detector's file has no statistics for explanations: fit it again")
        running = start()
        if running.stopped:
            raise HTTPException(503, "the service is shutting down: try again later", RETRY)
        body = await read_body(request)

        async def scored() -> list[ItemVerdict]:
            return await running.batcher.score(await read_uploads(body, limits, running.parser), explain)

        verdicts = await _unless_disconnected(request, scored(), limits)
        counts: ImageCounts = request.state.image_counts
        for verdict in verdicts:
            metrics.image(verdict)
            counts.images += 1
            counts.flagged += verdict.is_id is False
            counts.unreadable += verdict.error is not None
        status = 422 if counts.unreadable == counts.images else 200
        return JSONResponse({"results": [_result(verdict, explain) for verdict in verdicts]}, status)

    @app.get(
        "/v1/detector",
        summary="The detector that scores the images",
        response_model=Detector,
        dependencies=authenticated,
        responses={401: rejections[401]},
    )
    @app.head("/v1/detector", include_in_schema=False, dependencies=authenticated)
    async def detector() -> Detector:
        assert calibration is not None
        return Detector(
            detector=repr(scorer.detector),
            model=scorer.spec,
            facts=scorer.facts,
            classes=scorer.classes,
            threshold=_finite(float(calibration.threshold)),
            tpr=calibration.tpr,
            calibration=histogram(calibration.scores, float(calibration.threshold)),
            explains=scorer.explains,
            limits=dataclasses.asdict(limits),
            drift=None if metrics.drift is None else _drift(metrics.drift),
        )

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

    @app.get("/readyz", summary="Whether images can be scored", responses={503: {"model": Problem}})
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
    async def rejected(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, error.detail, request.state.request_id, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(400, f"{first['loc'][-1]}: {first['msg']}", request.state.request_id)

    return app


async def _unless_disconnected(request: Request, work: Any, limits: Limits) -> list[ItemVerdict]:
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
            503, f"the images were not scored within {limits.seconds:g} seconds: try again later", RETRY
        )
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _predict(scorer: Scorer, runtime: Runtime | None, images: Sequence[Pending]) -> list[ItemVerdict]:
    return scorer.predict_batch(
        torch.stack([image.tensor for image in images]),
        [image.upload.name for image in images],
        explain=[i for i, image in enumerate(images) if image.explain],
        runtime=runtime,
    )


def _result(verdict: ItemVerdict, explain: bool) -> dict[str, Any]:
    row = row_of(verdict)
    result = {"name": row.pop("path"), **row, "score": _finite(row["score"])}
    return {**result, "why": verdict.why and verdict.why.rows()} if explain else result


def _drift(monitor: DriftMonitor) -> Drift:
    return Drift(
        images=monitor.count,
        log10_evidence=monitor.log10_evidence,
        highest=monitor.highest,
        alarm_level=monitor.alarm_level,
        alarmed_at=None if monitor.alarmed_at is None else monitor.alarmed_at + 1,
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value


def histogram(scores: torch.Tensor, threshold: float) -> Histogram:
    """Return the histogram of calibration scores (n,), over the range of the middle 99 % of them."""
    values = shown_scores(scores.cpu().numpy())
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
    edges = np.linspace(low, high, int(np.clip(math.sqrt(len(values)), _MIN_BINS, _MAX_BINS)) + 1)
    counts, _ = np.histogram(np.clip(values, low, high), edges)
    return Histogram(edges=edges.tolist(), counts=counts.tolist())
