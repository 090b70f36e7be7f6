"""Where checkpoints are published: what a repository holds there, and how its files are asked for.

Each hub is one function to a `Listing`. Only the listing differs between hubs; the bytes travel the same way, in
`download.py`. Nothing in a listing is believed: names, sizes and checksums are checked here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from unicodedata import category
from urllib.parse import quote, unquote, urlencode, urlsplit

from ..errors import DownloadError
from .web import Answer, Web, address, shown

Source = Literal["huggingface", "modelscope"]
Digest = Literal["sha256", "git-sha1"]
"""`git-sha1` is the id of a git blob: sha1 of b"blob <size>\\0" and the content."""

PROGRAM = "lowmem-bagel"
NO_TEXT = frozenset({"Cc", "Cs"})
"""Kinds of characters that are in no name: control characters and halves of others."""
DEVICE = re.compile(r"(?i:con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[. ]")
"""What Windows takes for a device, or calls otherwise."""
LARGEST_FILE = 2**50
"""Bytes: a petabyte, above which a size is a mistake."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: `size` in bytes, `digest` in lower-case hexadecimal."""

    name: str
    size: int
    url: str
    digest_kind: Digest
    digest: str


def new_digest(file: RemoteFile) -> hashlib._Hash:
    """What makes the checksum of a file's bytes as its hub writes it."""
    if file.digest_kind == "git-sha1":
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.sha256()


@dataclass(frozen=True)
class Listing:
    """The files of one revision. `headers` go with every request and may hold an access token."""

    revision: str
    files: Mapping[str, RemoteFile]
    headers: Mapping[str, str] = field(repr=False)
    explain: Callable[[Answer, str], str] = field(repr=False)
    """One line for a refused answer about something of this repository."""


def list_huggingface(web: Web, repo: str, revision: str | None, endpoint: str | None) -> Listing:
    """The listing of huggingface.co or a mirror (`endpoint`, else HF_ENDPOINT), pinned to the revision's commit.

    API: GET /api/models/{repo}/revision/{revision}?blobs=true and GET /{repo}/resolve/{commit}/{file}; a refusal says
    in the header X-Error-Code what is the matter.

    Raises:
        DownloadError: no network, no such repository or revision, or no access to it.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DownloadError("HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it")
    said = os.environ.get("HF_ENDPOINT") if not endpoint else None
    site, login = _checked_endpoint(endpoint or said or "https://huggingface.co", "HF_ENDPOINT: " if said else "")
    wanted = _checked_revision(revision or "main")
    token = None if login else _token()
    headers = {**_agent(), **login, **({} if token is None else {"Authorization": f"Bearer {token}"})}

    def explain(answer: Answer, what: str) -> str:
        code = answer.headers.get("x-error-code")
        if code == "RevisionNotFound":
            return f"{repo} has no revision {wanted!r}; give a branch, tag or commit of it"
        if code == "GatedRepo" or answer.status == 403:
            return _no_access(repo, site, token)
        if code == "RepoNotFound" or (answer.status == 401 and what == repo):
            return _unknown(repo, site, token)
        if answer.status == 401:
            return _no_access(repo, site, token)
        return explain_status(answer.status, what, site)

    with web.get(
        f"{site}/api/models/{repo}/revision/{quote(wanted, safe='')}?blobs=true", headers, whole=True
    ) as answer:
        if answer.status != 200:
            raise DownloadError(explain(answer, repo))
        try:
            commit, entries = _huggingface_entries(answer.json(), wanted)
        except ValueError as error:
            raise DownloadError(_not_a_hub(site, "huggingface")) from error
    base = f"{site}/{repo}/resolve/{quote(commit, safe='')}"
    return Listing(commit, _files(entries, site, lambda name: f"{base}/{quote(name)}"), headers, explain)


def list_modelscope(web: Web, repo: str, revision: str | None, endpoint: str | None) -> Listing:
    """The listing of modelscope.cn (or `endpoint`), public repositories only.

    ModelScope names no commit for the whole listing, so the revision stays a name; the checksums pin the content.
    API: GET /api/v1/models/{repo}/repo/files?Revision&Recursive and GET /api/v1/models/{repo}/repo?Revision&FilePath.

    Raises:
        DownloadError: no network, no such repository or revision, or an answer without checksums.
    """
    site, login = _checked_endpoint(endpoint or "https://www.modelscope.cn")
    wanted = _checked_revision(revision or "master")
    headers = {**_agent(), **login}

    def explain(answer: Answer, what: str) -> str:
        if answer.status == 404 and what == repo:
            return f"{site} has no public repository {repo} with a revision {wanted!r}; check both names"
        if answer.status in (401, 403):
            return (
                f"{site} refuses access to {what}, and only what is public can be had there; "
                "give --source huggingface, with HF_TOKEN set"
            )
        return explain_status(answer.status, what, site)

    base = f"{site}/api/v1/models/{repo}/repo"
    with web.get(f"{base}/files?{urlencode({'Revision': wanted, 'Recursive': 'true'})}", headers, whole=True) as answer:
        if answer.status != 200:
            raise DownloadError(explain(answer, repo))
        try:
            entries = _modelscope_entries(answer.json())
        except ValueError as error:
            raise DownloadError(_not_a_hub(site, "modelscope")) from error
    files = _files(entries, site, lambda name: f"{base}?{urlencode({'Revision': wanted, 'FilePath': name})}")
    return Listing(wanted, files, headers, explain)


HUBS: Mapping[Source, Callable[[Web, str, str | None, str | None], Listing]] = {
    "huggingface": list_huggingface,
    "modelscope": list_modelscope,
}


def explain_status(status: int, what: str, where: str) -> str:
    """One line for an HTTP error status that says the same on every hub."""
    if status == 404:
        return f"{where} does not have {what}; check the name and the revision"
    if status == 429:
        return f"{where} limits how much you may download (429); wait a few minutes and run the same command again"
    return f"{where} answered {status} for {what}; run the same command again later, or give another --endpoint"


def _unknown(repo: str, site: str, token: str | None) -> str:
    if token is None:
        return f"{site} has no public repository {repo}; check the name, or set HF_TOKEN if it is private"
    return f"{site} has no repository {repo} that your token opens; check the name and HF_TOKEN"


def _no_access(repo: str, site: str, token: str | None) -> str:
    if token is None:
        does = f"accept its conditions at {site}/{repo} and set HF_TOKEN to a token of {site}/settings/tokens"
    else:
        does = f"accept its conditions at {site}/{repo} as the owner of your token (HF_TOKEN), or wait to be let in"
    return f"{site} refuses access to {repo}; {does}"


def _not_a_hub(site: str, hub: str) -> str:
    return f"{site} does not answer as a {hub} server does; check --endpoint and --source"


def _agent() -> dict[str, str]:
    return {"User-Agent": f"{PROGRAM}/{version(PROGRAM)}"}


def _token() -> str | None:
    """The access token, from where Hugging Face's programs have it: HF_TOKEN, else the file that their login writes."""
    environ = os.environ
    token, place = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"), "HF_TOKEN"
    if not token:
        if environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "ON", "YES", "TRUE"):
            return None
        cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = environ.get("HF_HOME") or f"{cache}/huggingface"
        path = Path(os.path.expanduser(environ.get("HF_TOKEN_PATH") or f"{home}/token"))
        try:
            token, place = path.read_text(encoding="utf-8") if path.is_file() else "", str(path)
        except (OSError, ValueError) as error:
            raise DownloadError(
                f"{path}: the access token in it cannot be read; set HF_TOKEN, or log in again"
            ) from error
    token = token.strip()
    if not re.fullmatch(r"[!-~]{0,4096}", token):
        raise DownloadError(f"{place} does not hold an access token; set HF_TOKEN to one, or unset it")
    return token or None


def _checked_endpoint(endpoint: str, named: str = "") -> tuple[str, dict[str, str]]:
    """An endpoint without its name and password, and the header that takes their place; `named` begins a refusal."""
    try:
        endpoint.encode()
        parts, place = urlsplit(endpoint), address(endpoint)
        if parts.query or parts.fragment or "@" in parts.path:
            raise ValueError("it goes on after a path")
    except ValueError as error:
        raise DownloadError(
            f"{named}{shown(endpoint)} is not an endpoint; write it as https://hub.example.org"
        ) from error
    site = f"{place}{place.target.rstrip('/')}"
    if parts.username is None and parts.password is None:
        return site, {}
    from base64 import b64encode

    login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return site, {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}


def _checked_revision(revision: str) -> str:
    if not revision.isprintable() or revision in (".", "..") or len(revision) > 255:
        raise DownloadError(f"{shown(revision)} cannot be a revision; give a branch, tag or commit")
    return revision


def _huggingface_entries(info: Any, wanted: str) -> tuple[str, list[tuple[Any, Any, Digest, Any]]]:
    """The commit, and name, size, kind and checksum of each file.

    Raises:
        ValueError: not what the hub answers.
    """
    siblings = _of(dict, info).get("siblings")
    commit = info.get("sha") or wanted
    if not isinstance(commit, str) or (commit != wanted and not re.fullmatch(r"[0-9a-f]{7,64}", commit)):
        raise ValueError("names no commit")
    entries: list[tuple[Any, Any, Digest, Any]] = []
    for file in [_of(dict, entry) for entry in _of(list, siblings)]:
        if file.get("lfs"):
            lfs = _of(dict, file["lfs"])
            entries.append((file.get("rfilename"), lfs.get("size"), "sha256", lfs.get("sha256")))
        else:
            entries.append((file.get("rfilename"), file.get("size"), "git-sha1", file.get("blobId")))
    return commit, entries


def _modelscope_entries(answer: Any) -> list[tuple[Any, Any, Digest, Any]]:
    """Name, size, kind and checksum of each file.

    Raises:
        ValueError: not what the hub answers.
    """
    if _of(dict, answer).get("Code") != 200:
        raise ValueError("an error")
    found = [_of(dict, entry) for entry in _of(list, _of(dict, answer.get("Data")).get("Files"))]
    return [(e.get("Path"), e.get("Size"), "sha256", e.get("Sha256")) for e in found if e.get("Type") == "blob"]


def _of(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind.__name__}")
    return value


def _files(
    entries: Iterable[tuple[Any, Any, Digest, Any]], site: str, url: Callable[[str], str]
) -> Mapping[str, RemoteFile]:
    files = {}
    for name, size, kind, digest in entries:
        name = _safe_name(name, site)
        files[name] = _remote_file(name, size, url(name), kind, digest, site)
    return files


def _safe_name(name: object, site: str) -> str:
    """A name that stays inside the folder it is saved to: a server is not trusted with that."""
    listed = shown(name)
    if not isinstance(name, str) or "" in name.split("/") or any(c == "\\" or category(c) in NO_TEXT for c in name):
        raise DownloadError(f"{site} lists an impossible file name {listed}; use another --endpoint")
    if {".", ".."} & set(name.split("/")):
        raise DownloadError(f"{site} lists a file outside its repository ({listed}); use another --endpoint")
    return name


def can_be_saved(name: str) -> bool:
    """Whether every file system takes a name from a listing, and takes it for a file's."""
    if ":" in name or not name.isprintable() or len(name.encode()) > 2048:
        return False
    return not any(len(part.encode()) > 255 or DEVICE.fullmatch(part) for part in name.split("/"))


def _remote_file(name: str, size: object, url: str, kind: Digest, digest: object, site: str) -> RemoteFile:
    length = 64 if kind == "sha256" else 40
    if type(size) is not int or not 0 <= size <= LARGEST_FILE:
        raise DownloadError(f"{site} does not say how large {name} is; use another --endpoint or --source")
    if not isinstance(digest, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", digest, re.ASCII):
        raise DownloadError(f"{site} gives no checksum for {name}; use another --endpoint or --source")
    return RemoteFile(name, size, url, kind, digest.lower())
