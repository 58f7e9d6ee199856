"""``featnorm serve``: a detector over HTTP."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from featnorm.cli.interrupt import INTERRUPTED, EndAtOnce
from featnorm.cli.machine import runtime_of
from featnorm.cli.show import console
from featnorm.image_scorer import ImageScorer
from featnorm.serve import Limits, create_app
from featnorm.serve.requests import JsonLines
from featnorm.serve.server import bind, run_server

_TOKEN = "FEATNORM_TOKEN"


@dataclass(frozen=True)
class Options:
    """The command's options."""

    detector: Path
    model: str | None
    host: str
    port: int
    allowed_hosts: list[str]
    token_file: Path | None
    device: str
    precision: str
    limits: Limits


def run(options: Options) -> NoReturn:
    """Serve until the process is told to end.

    Raises
    ------
    EndAtOnce
        Then: threads may still decode or judge, for nobody, and cannot be stopped.
    """
    token = _token(options.token_file)
    bound = bind(options.host, options.port)
    runtime = runtime_of(options.device, options.precision)
    scorer = ImageScorer.load(options.detector, model=options.model)
    scorer.scorer.to(runtime.torch_device)
    app = create_app(
        scorer,
        options.limits,
        token,
        allowed_hosts=options.allowed_hosts,
        bound_host=options.host,
        runtime=runtime,
    )
    if token is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        console.print(
            f"Whoever can reach {options.host} can use this service: name a --token-file, or let it listen on "
            "127.0.0.1.",
            soft_wrap=True,
        )
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{bound.getsockname()[1]}/"
    _log_lines()
    try:
        run_server(
            app,
            bound,
            options.limits,
            lambda: console.print(f"Serving {options.detector} at {url} (Ctrl+C ends it).", soft_wrap=True),
        )
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    logging.shutdown()
    sys.stdout.flush()
    raise EndAtOnce(status)


def _token(file: Path | None) -> str | None:
    """Return the token that clients must send. It is no option: whoever lists processes would see it."""
    if file is not None:
        try:
            token, where = file.read_text(encoding="utf-8").strip(), str(file)
            instead = "omit --token-file"
        except UnicodeDecodeError:
            raise ValueError(f"{file} is no text: name the file that holds the token") from None
    elif _TOKEN in os.environ:
        token, where = os.environ[_TOKEN].strip(), _TOKEN
        instead = "unset it"
    else:
        return None
    if not token:
        raise ValueError(f"{where} is empty: put a token in it, or {instead}")
    return token


def _log_lines() -> None:
    """Write the service's log as lines of JSON, and what libraries warn of too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name, level in (("featnorm.serve", logging.INFO), ("uvicorn", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
