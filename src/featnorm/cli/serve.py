"""``featnorm serve``: a detector as an HTTP service."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from featnorm.cli.console import console
from featnorm.cli.interrupt import INTERRUPTED, EndAtOnce
from featnorm.cli.options import BatchSize, Device, OwnModel, OwnWeights, Precision, ScorerFile

_TOKEN = "FEATNORM_TOKEN"


def serve(
    scorer_file: ScorerFile,
    model: OwnModel = None,
    weights: OwnWeights = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free port.")] = 8000,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name under which clients reach the service, in addition to --host; `*` for any. Repeat for "
            "several. With --host 0.0.0.0 or ::, any IP address and `localhost` are allowed too."
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the token that clients must send as `Authorization: Bearer TOKEN`. Default: the "
            "environment variable FEATNORM_TOKEN. If neither is given, no token is required.",
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    batch_size: BatchSize = 32,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Maximum request size in bytes.")] = 16 * 2**20,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum number of images per request.")] = 64,
    max_pixels: Annotated[int, typer.Option(min=1, help="Maximum number of pixels per image.")] = 50_000_000,
    max_queue: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of images waiting for the model; beyond it, clients get 503."),
    ] = 256,
    max_queue_pixels: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of pixels waiting to be decoded; beyond it, clients get 503."),
    ] = 800_000_000,
    max_seconds: Annotated[
        float,
        typer.Option(
            help="Request timeout in seconds, including upload. Clients get the same time to read the response."
        ),
    ] = 30.0,
    max_connections: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of open connections; beyond it, the longest idle one is closed."),
    ] = 512,
    grace_seconds: Annotated[float, typer.Option(help="Maximum seconds from SIGTERM or Ctrl+C to exit.")] = 10.0,
) -> None:
    """Serve a detector over HTTP, with a web page onto which images can be dropped.

    `POST /v1/score` takes one image, or several as a form or as base64 in JSON; `/openapi.json` describes the API.
    One line of JSON per request is logged to standard error. `/metrics` serves Prometheus metrics.
    """
    from featnorm.cli.runtime import runtime_of
    from featnorm.scorer import load
    from featnorm.serve import Limits, create_app
    from featnorm.serve.server import bind, run_server

    limits = Limits(
        body_bytes=max_body_bytes,
        images=max_images,
        pixels=max_pixels,
        queue=max_queue,
        queue_pixels=max_queue_pixels,
        seconds=max_seconds,
        batch_size=batch_size,
        connections=max_connections,
        grace=grace_seconds,
    )
    token = _token(token_file)
    bound = bind(host, port)
    runtime = runtime_of(device, precision)
    scorer = load(scorer_file, model, weights=weights)
    scorer.to(runtime.torch_device)
    app = create_app(
        scorer,
        limits,
        token,
        allowed_hosts=allowed_host or [],
        bound_host=host,
        runtime=runtime,
    )
    if token is None and host not in ("127.0.0.1", "::1", "localhost"):
        console.print(
            f"Anyone who can reach {host} can use this service: set a --token-file, or listen on 127.0.0.1.",
            soft_wrap=True,
        )
    host = f"[{host}]" if ":" in host else host
    url = f"http://{host}:{bound.getsockname()[1]}/"
    _log_lines()
    try:
        run_server(
            app,
            bound,
            limits,
            lambda: console.print(f"Serving {scorer_file} at {url} (Ctrl+C ends it).", soft_wrap=True),
        )
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    logging.shutdown()
    sys.stdout.flush()
    raise EndAtOnce(status)


def _token(file: Path | None) -> str | None:
    """Return the token that clients must send. As an option, it would show in the list of processes."""
    if file is not None:
        try:
            token, where = file.read_text(encoding="utf-8").strip(), str(file)
            instead = "omit --token-file"
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not a text file: pass the file that holds the token") from None
    elif _TOKEN in os.environ:
        token, where = os.environ[_TOKEN].strip(), _TOKEN
        instead = "unset it"
    else:
        return None
    if not token:
        raise ValueError(f"{where} is empty: put a token in it, or {instead}")
    return token


def _log_lines() -> None:
    """Log requests, and the warnings of libraries, as lines of JSON."""
    from featnorm.serve.requests import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name, level in (("featnorm.serve", logging.INFO), ("uvicorn", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
