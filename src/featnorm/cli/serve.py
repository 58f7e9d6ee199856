"""``featnorm serve``: detectors as an HTTP service."""

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from featnorm.cli.console import console
from featnorm.cli.interrupt import INTERRUPTED, EndAtOnce
from featnorm.cli.options import Device, Engine, Precision, Tpr

_TOKEN = "FEATNORM_TOKEN"


def serve(
    scorers: Annotated[
        list[Path],
        typer.Argument(
            metavar="SCORER...",
            help="Files written by `featnorm fit`, or by `Scorer.save`. The name of a scorer is that of its file "
            "without the ending; `NAME=FILE` to choose another.",
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SPEC",
            help="Required if a file does not contain its model, or if the model is your own: `MODULE:FUNCTION`, "
            "or a library's model with `--weights`. Repeat with the names of the scorers if they differ.",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Weights file of `--model`, for a SCORER that does not contain its model. Repeat with the names "
            "of the scorers if they differ.",
        ),
    ] = None,
    tpr: Tpr = None,
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
    root_path: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Path under which a proxy serves the service, such as `/ood`, whether or not the proxy removes "
            "it from the requests.",
        ),
    ] = "",
    device: Device = "auto",
    precision: Precision = "32-true",
    engine: Engine = "auto",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Maximum number of inputs that the model runs at a time.")
    ] = 32,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Maximum request size in bytes.")] = 16 * 2**20,
    max_inputs: Annotated[
        int, typer.Option(min=1, help="Maximum number of images, texts or rows per request.")
    ] = 64,
    max_pixels: Annotated[int, typer.Option(min=1, help="Maximum number of pixels per image.")] = 50_000_000,
    max_queue: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of inputs waiting for the model; beyond it, clients get 503."),
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
    """Serve detectors over HTTP, with a web page for dropped images, or pasted texts or rows.

    `POST /v1/score` takes one image, several as a form or as base64 in JSON, or texts or rows in JSON; with
    several scorers, `POST /v1/NAME/score`. `/openapi.json` describes the API. A replaced file is reloaded without
    interrupting the service; SIGHUP reloads all files. One line of JSON per request is logged to standard error.
    `/metrics` serves Prometheus metrics.
    """
    from featnorm.cli.runtime import runtime_of
    from featnorm.scorer import Scorer
    from featnorm.scorer_file import load
    from featnorm.serve import Limits, ScorerFile, create_app
    from featnorm.serve.server import bind, run_server

    limits = Limits(
        body_bytes=max_body_bytes,
        inputs=max_inputs,
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
    runtime = runtime_of(device, precision, engine=engine)
    files = _by_name(scorers)
    models, weights_files = _per_scorer(model, files, "--model"), _per_scorer(weights, files, "--weights")

    def opened(name: str, file: Path) -> Scorer:
        scorer = load(file, models.get(name), weights=weights_files.get(name))
        if tpr is not None:
            scorer.set_tpr(tpr)
        return scorer.to(runtime.torch_device)

    served = {name: ScorerFile(file, partial(opened, name)) for name, file in files.items()}
    app = create_app(
        served,
        limits,
        token,
        allowed_hosts=allowed_host or [],
        bound_host=host,
        root_path=root_path,
        runtime=runtime,
    )

    def reload() -> None:
        for file in served.values():
            file.request_reload()

    if token is None and host not in ("127.0.0.1", "::1", "localhost"):
        console.print(
            f"Anyone who can reach {host} can use this service: set a --token-file, or listen on 127.0.0.1.",
            soft_wrap=True,
        )
    host = f"[{host}]" if ":" in host else host
    url = f"http://{host}:{bound.getsockname()[1]}/"
    titles = ", ".join(map(str, files.values()))
    _log_lines()
    try:
        run_server(
            app,
            bound,
            limits,
            lambda: console.print(f"Serving {titles} at {url} (Ctrl+C ends it).", soft_wrap=True),
            reload,
        )
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    logging.shutdown()
    sys.stdout.flush()
    raise EndAtOnce(status)


def _by_name(arguments: Iterable[Path]) -> dict[str, Path]:
    """Return the files of the arguments ``FILE`` and ``NAME=FILE``, by name."""
    files: dict[str, Path] = {}
    for argument in arguments:
        name, given, file = str(argument).partition("=")
        # A path may contain a "=" too.
        if not given or not name or "/" in name or os.sep in name or argument.exists():
            name, file = argument.stem, str(argument)
        if name in files:
            raise ValueError(f"{files[name]} and {file} have the same name, {name!r}: choose one with NAME=FILE")
        files[name] = Path(file)
    return files


def _per_scorer(values: Sequence[str] | None, names: Iterable[str], option: str) -> dict[str, str]:
    """Return the values ``NAME=VALUE`` of an option by name; a ``VALUE`` alone is for the other scorers."""
    found: dict[str, str] = {}
    others: list[str] = []
    for value in values or []:
        name, given, rest = value.partition("=")
        if given and name in names:
            if name in found:
                raise ValueError(f"{option} is given twice for {name!r}: omit one of them")
            found[name] = rest
        else:
            others.append(value)
    if len(others) > 1:
        raise ValueError(
            f"{option} is given as {' and as '.join(others)}: repeat it as NAME=..., with NAME one of "
            f"{', '.join(names)}"
        )
    return {**dict.fromkeys(names, *others), **found} if others else found


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
