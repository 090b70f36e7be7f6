"""The form in which a browser is given the API key, and what happens when it is sent."""

from __future__ import annotations

import asyncio
import urllib.parse
from typing import TYPE_CHECKING

from starlette.responses import HTMLResponse, RedirectResponse, Response

from .keys import COOKIE, SESSION_SECONDS, Keys

if TYPE_CHECKING:
    from starlette.requests import Request

PATH = "/login"
WRONG_SECONDS = 1.0
"""That a wrong key waits for its answer."""
FORM = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>lowmem-bagel</title><style>
:root{{color-scheme:light dark}}body{{font:1.1rem system-ui;display:grid;place-content:center;height:90vh}}
input,button{{font:inherit;display:block;width:100%;box-sizing:border-box;margin:.5rem 0;padding:.4rem}}
</style><main><h1>lowmem-bagel</h1><form method="post" action="/login">
<label for="key">API key <span lang="zh">/ API 密钥</span></label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
{said}<button>Open <span lang="zh">/ 打开</span></button></form></main></html>
"""
SAID_WRONG = '<p role="alert">That is not the key. <span lang="zh">密钥不正确。</span></p>'
POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"


def form(wrong: bool = False) -> Response:
    """The form, as the answer to a browser that may not in yet."""
    headers = {"content-security-policy": POLICY, "cache-control": "no-store"}
    return HTMLResponse(FORM.format(said=SAID_WRONG if wrong else ""), 401, headers)


async def log_in(request: Request, keys: Keys) -> Response:
    """The answer to the form: a session's cookie, which no script and no other site's page can use."""
    if not keys.fits(_given((await request.body()).decode("latin-1"))):
        await asyncio.sleep(WRONG_SECONDS)
        return form(wrong=True)
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        COOKIE,
        keys.begin_session(),
        max_age=SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


def _given(body: str) -> str:
    """What the form holds: one field, as browsers send forms that have no files."""
    try:
        fields = urllib.parse.parse_qs(body, max_num_fields=4)
    except ValueError:
        return ""
    return fields.get("key", [""])[0].strip()
