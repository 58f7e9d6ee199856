"""``featnorm serve``: a detector over HTTP."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from featnorm.cli.machine import fabric_of
from featnorm.cli.show import console
from featnorm.deploy import ImageScorer
from featnorm.service import Limits, create_app
from featnorm.service.requests import JsonLines
from featnorm.service.server import bind, run_server

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


def run(options: Options) -> None:
    """Serve until the process is told to end."""
    token = _token(options.token_file)
    bound = bind(options.host, options.port)
    fabric = fabric_of(options.device, options.precision)
    scorer = ImageScorer.load(options.detector, model=options.model)
    scorer.scorer = fabric.to_device(scorer.scorer)
    app = create_app(
        scorer, options.limits, token, allowed_hosts=[options.host, *options.allowed_hosts], fabric=fabric
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
    status = 0
    try:
        run_server(
            app,
            bound,
            options.limits,
            lambda: console.print(f"Serving {options.detector} at {url} (Ctrl+C ends it).", soft_wrap=True),
        )
    except KeyboardInterrupt:
        status = 130
    # Python would wait for threads that still decode or judge, for nobody, and they cannot be stopped.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _token(file: Path | None) -> str | None:
    """Return the token that clients must send. It is no option: whoever lists processes would see it."""
    if file is not None:
        token, where = file.read_text(encoding="utf-8").strip(), str(file)
    elif _TOKEN in os.environ:
        token, where = os.environ[_TOKEN].strip(), _TOKEN
    else:
        return None
    if not token:
        raise ValueError(f"there is no token in {where}: write one, or serve without")
    return token


def _log_lines() -> None:
    """Write the service's log as lines of JSON, and what libraries warn of too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name, level in (("featnorm.service", logging.INFO), ("uvicorn", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
