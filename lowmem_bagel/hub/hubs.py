"""Where checkpoints are published: what a repository holds there, and how its files are asked for.

Each hub is one function from (repo, revision, endpoint) to a `Listing`. Only the listing differs between hubs; the
bytes travel the same way, in `download.py`.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import IO, Any, Literal, cast
from urllib.parse import quote, urlencode, urlsplit

from ..errors import DownloadError

Source = Literal["huggingface", "modelscope"]
Digest = Literal["sha256", "git-sha1"]
"""`git-sha1` is the id of a git blob: sha1 of b"blob <size>\\0" and the content."""

PROGRAM = "lowmem-bagel"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: `size` in bytes, `digest` in lower-case hexadecimal."""

    name: str
    size: int
    url: str
    digest_kind: Digest
    digest: str


@dataclass(frozen=True)
class Listing:
    """The files of one revision. `headers` go with every request and may hold an access token."""

    revision: str
    files: Mapping[str, RemoteFile]
    headers: Mapping[str, str] = field(repr=False)


def list_huggingface(repo: str, revision: str | None, endpoint: str | None, timeout: float) -> Listing:
    """The listing of huggingface.co or a mirror (`endpoint`, else HF_ENDPOINT), pinned to the revision's commit.

    Raises:
        DownloadError: no network, no such repository or revision, or no access to it.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

    # The library's HTTP client differs between its versions; the first base of its error is that client's root error.
    client_error = cast(type[BaseException], HfHubHTTPError.__bases__[0])
    endpoint = _checked_endpoint(endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    release = version(PROGRAM)
    wanted = revision or "main"
    try:
        api = HfApi(endpoint=endpoint, library_name=PROGRAM, library_version=release)
        info = api.model_info(repo, revision=wanted, files_metadata=True, timeout=timeout)
    except GatedRepoError as error:
        raise DownloadError(_no_access(repo, endpoint)) from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{repo} has no revision {wanted!r}; give a branch, tag or commit of it") from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{endpoint} has no public repository {repo}; check the name, or set HF_TOKEN if it is private"
        ) from error
    except OfflineModeIsEnabled as error:
        raise DownloadError("HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it") from error
    except HfHubHTTPError as error:
        raise DownloadError(explain_status(error.response.status_code, repo, endpoint)) from error
    except HFValidationError as error:
        raise DownloadError(f"{repo!r} is not a repository; write it as owner/name") from error
    except (ValueError, KeyError, TypeError) as error:  # before OSError: a client's JSON error may be both
        raise DownloadError(_not_a_hub(endpoint, "huggingface")) from error
    except (client_error, OSError) as error:
        raise DownloadError(explain_network(error, endpoint)) from error

    commit = info.sha or wanted
    files = {}
    for sibling in info.siblings or []:
        name = _safe_name(sibling.rfilename, endpoint)
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        size = sibling.lfs.size if sibling.lfs else sibling.size
        url = hf_hub_url(repo, name, revision=commit, endpoint=endpoint)
        files[name] = _remote_file(name, size, url, "sha256" if sibling.lfs else "git-sha1", digest, endpoint)
    return Listing(commit, files, build_hf_headers(library_name=PROGRAM, library_version=release))


def list_modelscope(repo: str, revision: str | None, endpoint: str | None, timeout: float) -> Listing:
    """The listing of modelscope.cn (or `endpoint`), public repositories only.

    ModelScope names no commit for the whole listing, so the revision stays a name; the checksums pin the content.
    API: GET /api/v1/models/{repo}/repo/files?Revision&Recursive and GET /api/v1/models/{repo}/repo?Revision&FilePath.

    Raises:
        DownloadError: no network, no such repository or revision, or an answer without checksums.
    """
    endpoint = _checked_endpoint(endpoint or "https://www.modelscope.cn")
    wanted = revision or "master"
    base = f"{endpoint}/api/v1/models/{quote(repo)}/repo"
    headers = {"User-Agent": f"{PROGRAM}/{version(PROGRAM)}"}
    query = urlencode({"Revision": wanted, "Recursive": "true"})
    try:
        with open_url(f"{base}/files?{query}", headers, timeout) as response:
            answer = json.load(response)
        entries = _modelscope_entries(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise DownloadError(
                f"{endpoint} has no public repository {repo} with a revision {wanted!r}; check both names"
            ) from error
        raise DownloadError(explain_status(error.code, repo, endpoint)) from error
    except (OSError, HTTPException) as error:
        raise DownloadError(explain_network(error, endpoint)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(_not_a_hub(endpoint, "modelscope")) from error
    files = {}
    for entry in entries:
        name = _safe_name(entry.get("Path"), endpoint)
        url = f"{base}?{urlencode({'Revision': wanted, 'FilePath': name})}"
        files[name] = _remote_file(name, entry.get("Size"), url, "sha256", entry.get("Sha256"), endpoint)
    return Listing(wanted, files, headers)


HUBS: Mapping[Source, Callable[[str, str | None, str | None, float], Listing]] = {
    "huggingface": list_huggingface,
    "modelscope": list_modelscope,
}


def open_url(url: str, headers: Mapping[str, str], timeout: float) -> HTTPResponse:
    """GET with redirects; `timeout` in seconds is for each wait on the socket, not for the whole answer.

    Raises:
        urllib.error.HTTPError: the server answered with an error status.
        OSError, http.client.HTTPException: the network failed.
    """
    opener = urllib.request.build_opener(_TokenKeptHome)
    response = opener.open(urllib.request.Request(url, headers=dict(headers)), timeout=timeout)
    assert isinstance(response, HTTPResponse)
    return response


class _TokenKeptHome(urllib.request.HTTPRedirectHandler):
    """Follows redirects to a content network without handing it the access token."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            request.remove_header("Authorization")
        return request


def explain_status(status: int, what: str, where: str) -> str:
    """One line for an HTTP error status."""
    if status in (401, 403):
        return _no_access(what, where)
    if status == 404:
        return f"{where} does not have {what}; check the name and the revision"
    if status == 429:
        return f"{where} limits how much you may download (429); wait a few minutes and run the same command again"
    return f"{where} answered {status} for {what}; run the same command again later, or give another --endpoint"


def explain_network(error: BaseException, where: str) -> str:
    """One line for a connection that failed."""
    reason = getattr(error, "reason", None) or error
    cause = getattr(reason, "verify_message", None)
    if cause or "CERTIFICATE_VERIFY_FAILED" in str(reason):
        return f"{where} is not trusted ({cause or reason}); install ca-certificates or set SSL_CERT_FILE"
    detail = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    return f"{where} cannot be reached ({detail}); check the network, or give another --endpoint or --source"


def _no_access(what: str, where: str) -> str:
    return f"{where} refuses access to {what}; accept its conditions on the site and set HF_TOKEN to a valid token"


def _not_a_hub(endpoint: str, hub: str) -> str:
    return f"{endpoint} does not answer as a {hub} server does; check --endpoint and --source"


def _checked_endpoint(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise DownloadError(f"{endpoint!r} is not an endpoint; write it as https://hub.example.org")
    return endpoint.rstrip("/")


def _safe_name(name: object, endpoint: str) -> str:
    """A name that stays inside the folder it is saved to: a server is not trusted with that."""
    if not isinstance(name, str) or not name or any(c in name for c in "\\:\0") or name.startswith("/"):
        raise DownloadError(f"{endpoint} lists an impossible file name {name!r}; use another --endpoint")
    if any(part in ("..", ".") for part in PurePosixPath(name).parts):
        raise DownloadError(f"{endpoint} lists a file outside its repository ({name!r}); use another --endpoint")
    return name


def _remote_file(name: str, size: object, url: str, kind: Digest, digest: object, endpoint: str) -> RemoteFile:
    length = 64 if kind == "sha256" else 40
    if type(size) is not int or size < 0:
        raise DownloadError(f"{endpoint} does not say how large {name} is; use another --endpoint or --source")
    if not isinstance(digest, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", digest):
        raise DownloadError(f"{endpoint} gives no checksum for {name}; use another --endpoint or --source")
    return RemoteFile(name, size, url, kind, digest.lower())


def _modelscope_entries(answer: dict[str, Any]) -> list[dict[str, Any]]:
    if answer["Code"] != 200:
        raise ValueError(answer.get("Message"))
    return [entry for entry in answer["Data"]["Files"] if entry["Type"] == "blob"]
