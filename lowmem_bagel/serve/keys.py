"""Who brings the API key: programs in a header, browsers once, in a form that gives them a session."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.datastructures import Headers

COOKIE = "lowmem_bagel_session"
SESSION_SECONDS = 7 * 24 * 3600
MAX_SESSIONS = 1000


def digest(text: str) -> bytes:
    """What is compared and kept in place of a secret, of one length whatever that is."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


@dataclass
class Keys:
    """The key of a server, and the sessions that were begun with it.

    Args:
        key: "" for a server that asks for none.
    """

    key: str = field(repr=False)
    _sessions: OrderedDict[bytes, float] = field(default_factory=OrderedDict, repr=False)
    """Digest of the token -> when it ends; the oldest first."""

    def fits(self, given: str) -> bool:
        """Whether this is the key, in a time that says nothing of how nearly it is."""
        return hmac.compare_digest(digest(given), digest(self.key))

    def in_header(self, headers: Headers) -> bool:
        """Whether a request brings the key: as `Authorization: Bearer KEY`, or as the password of `Basic`, which is
        all that some picture tools can send."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            given = _password(given)
        elif scheme.lower() != "bearer":
            return False
        return self.fits(given.strip())

    def begin_session(self) -> str:
        """A token for a browser that brought the key; not made of it."""
        token = secrets.token_urlsafe(32)
        while len(self._sessions) >= MAX_SESSIONS:
            self._sessions.popitem(last=False)
        self._sessions[digest(token)] = time.monotonic() + SESSION_SECONDS
        return token

    def session_of(self, headers: Headers) -> str | None:
        """A name for the session that a browser is in, if it is in one."""
        found = digest(_cookie(headers.get("cookie", "")))
        if self._sessions.get(found, 0.0) < time.monotonic():
            self._sessions.pop(found, None)
            return None
        return found.hex()[:16]


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _cookie(header: str) -> str:
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(header)
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""
