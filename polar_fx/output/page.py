"""HTML pages that need nothing else: a template with its parts, and one script that may run."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from .markup import Markup

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def filled(template: str, parts: Mapping[str, Markup]) -> str:
    """The page: each `{{name}}` of the template becomes the part of that name, once, and
    `{{script-hash}}` what a content security policy calls the template's script.
    """
    script = _SCRIPT.search(template)
    assert script is not None, "a page has one script of its own"
    every = {**parts, "script-hash": _sha256(script[1])}
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda found: every[found[1]], template)


def json_in_html(value: Any) -> Markup:
    """JSON that cannot end the script element which holds it."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))


def _sha256(text: str) -> Markup:
    return Markup("sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())
