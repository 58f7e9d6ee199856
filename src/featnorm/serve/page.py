"""The web pages of a service: `home_page`, at ``/``, and what `not_found` returns to browsers."""

import base64
import hashlib
import re
from collections.abc import Sequence, Set
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from featnorm.inputs.formats import FORMATS
from featnorm.inputs.kinds import IMAGES, Kind
from featnorm.report.html import render
from featnorm.serve.requests import problem

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def home_page(kinds: Set[Kind]) -> HTMLResponse:
    """Return the page that scores images, texts or rows, in the words for what all scorers of the service take."""
    noun, one, verb = "input", "an input", "Send"
    if len(kinds) == 1:
        (kind,) = kinds
        noun, one, verb = kind.noun, kind.one, "Drop" if kind is IMAGES else "Paste"
    return _page(
        "page.html",
        title=f"Does the model know this {noun}?",
        summary=f"{verb} {one} to see whether it is in-distribution for the detector.",
        formats=", ".join(FORMATS),
        noun=noun,
        one=one,
        verb=verb,
    )


def not_found(request: Request, names: Sequence[str]) -> Response:
    """Return the response for an address where there is nothing: a page for a browser, else JSON.

    Parameters
    ----------
    request : Request
        Request for the address.
    names : sequence of str
        Names of the scorers of the service.
    """
    root = request.scope["root_path"]
    if "text/html" in request.headers.get("accept", ""):
        title, summary = "There is nothing at this address", "The service has these addresses."
        response: Response = _page("not_found.html", 404, title=title, summary=summary, root=root, names=names)
    else:
        error = (
            f"there is nothing at this address: use {root}/v1/NAME/score, with NAME one of {', '.join(names)}; "
            f"{root}/openapi.json describes the API"
        )
        response = problem(404, error, request.state.request_id)
    response.headers["Vary"] = "Accept"
    return response


def _page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Render a page with a content security policy that permits only its own scripts and style."""

    def page(policy: str) -> str:
        return render(template, "featnorm.serve", facts={}, policy=policy, **values)

    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _INLINE.findall(page("")):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    # frame-ancestors has an effect in the header only.
    headers = {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
    return HTMLResponse(page(policy), status, headers)
