"""The page at `/`: `render_page`."""

import base64
import hashlib
import re

from featnorm.deploy.image_scorer import ImageScorer
from featnorm.report.html import render

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def render_page(scorer: ImageScorer, *, wants_token: bool) -> tuple[str, str]:
    """Return the page, and the policy that lets nothing run in it but its own scripts."""
    return "", ""
