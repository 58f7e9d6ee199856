"""The page at `/`: `render_page`."""

import base64
import hashlib
import re

from featnorm.inputs.formats import FORMATS
from featnorm.report.html import render

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def render_page() -> tuple[str, str]:
    """Return the page, and the policy under which nothing runs in it but its own script."""

    def page(policy: str) -> str:
        return render(
            "page.html",
            "featnorm.serve",
            title="Does the model know this image?",
            summary="Drop an image and see whether it is like those that the detector was fitted on.",
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
    # Which pages may show this one in a frame is told by a header alone.
    return page(policy), f"{policy}; frame-ancestors 'none'"
