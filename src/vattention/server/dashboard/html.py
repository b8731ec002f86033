"""The page in one piece, and the policy that keeps it that way."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Page:
    """A page and the headers it is sent with."""

    html: str
    headers: Mapping[str, str]


def read_page() -> Page:
    """The files of `page/`, style and script put into the HTML.

    The policy allows that style and that script by their digests, requests to where the page came from, and nothing
    else: whatever got into the page would not run, and the page cannot be shown inside another.
    """
    folder = files("vattention.server.dashboard") / "page"
    html, style, script = ((folder / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js"))
    policy = {
        "default-src": "'none'",
        "style-src": _digest(style),
        "script-src": _digest(script),
        "connect-src": "'self'",
        "img-src": "data:",  # its icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Page(html.replace("/* page.css */", style).replace("/* page.js */", script), headers)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
