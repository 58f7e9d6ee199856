"""The web page of a service, at ``/``: `render_page`."""

import base64
import hashlib
import re

from featnorm.inputs.formats import FORMATS
from featnorm.report.html import render

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def render_page() -> tuple[str, str]:
    """Return the page, and the content security policy that permits only its own script and style."""

    def page(policy: str) -> str:
        return render(
            "page.html",
            "featnorm.serve",
            title="Does the model know this image?",
            summary="Drop an image to see whether it is in-distribution for the detector.",
            facts={},
            formats=", ".join(FORMATS),
            policy=policy,
        )

    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _INLINE.findall(page("")):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "img-src blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    # frame-ancestors has an effect in the header only.
    return page(policy), f"{policy}; frame-ancestors 'none'"
