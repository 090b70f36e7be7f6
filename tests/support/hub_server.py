"""A stand-in for the hubs on 127.0.0.1: their listings, redirects and ranges, and their bad days.

It speaks what `huggingface_hub` and `lowmem_bagel.hub` use of the Hugging Face protocol, and ModelScope's API.
Large files are redirected to a second server, as the hubs do with their content networks. `faults` makes it
misbehave, one fault for each time a file's bytes are asked for; `log` tells what was asked and how much was sent.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

from .paths import ROOT

CERTIFICATE = ROOT / "tests" / "data" / "tls" / "localhost.crt"
"""Made by openssl for localhost and 127.0.0.1, valid for a hundred years; signed by itself."""
COMMIT = "c0ffee" + "0" * 34
LARGE = 4096
"""Files of at least so many bytes are LFS files: listed with a sha256 and served by the content network."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer; every field is one way."""

    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    status: int | None = None
    content: bytes | None = None
    """Send these bytes in place of the file's."""
    ignore_range: bool = False
    shift_range: int = 0
    """Answer with a range that starts so many bytes later than asked."""
    silence: float = 0.0
    """Seconds without a byte in mid-file."""
    bytes_per_second: float = 0.0


@dataclass
class Request:
    """One request, as far as tests care; `sent` counts bytes of file content."""

    method: str
    path: str
    headers: Mapping[str, str]
    status: int = 0
    sent: int = 0

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclass
class HubServer:
    """Files of one repository, served by two HTTP servers (hub and content network) while in a `with` block."""

    files: dict[str, bytes]
    repo: str = "owner/model"
    others: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of further repositories, by name."""
    revisions: tuple[str, ...] = ("main", "master", COMMIT)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    """Per file name, used up one after the other; when the list is empty, all goes well."""
    api_status: int | None = None
    """Answer listings with this error status."""
    raw_listing: bytes | None = None
    """Answer listings with this body, whatever was asked."""
    listed: dict[str, dict[str, object]] = field(default_factory=dict)
    """Per file name, fields of its listing that are lied about."""
    tls: bool = False
    """Speak https, with the certificate `CERTIFICATE`."""
    token: str | None = None
    """An access token without which the hub answers 401."""
    log: list[Request] = field(default_factory=list)
    busiest: int = 0
    """The largest number of files that were being sent at the same time."""

    def __enter__(self) -> HubServer:
        self._lock = threading.Lock()
        self._sending = 0
        self._stop = threading.Event()
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        if self.tls:
            for server in self._servers:
                server.socket = server_context().wrap_socket(server.socket, server_side=True)
        places = (f"127.0.0.1:{server.server_address[1]}" for server in self._servers)
        self.endpoint, self.content_network = (f"http{'s' * self.tls}://{place}" for place in places)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def files_of(self, repo: str) -> dict[str, bytes]:
        return self.files if repo == self.repo else self.others[repo]

    def transfers(self, name: str) -> list[Request]:
        """The requests for a file's bytes, in order."""
        digest = _sha256(self.files[name])
        ends = (f"/{name}", f"/{digest}", f"FilePath={name}")
        return [r for r in self.log if r.method == "GET" and r.path.endswith(ends) and r.status in (200, 206)]

    def next_fault(self, name: str) -> Fault:
        with self._lock:
            return self.faults[name].pop(0) if self.faults[name] else Fault()

    def sending(self, change: int) -> None:
        with self._lock:
            self._sending += change
            self.busiest = max(self.busiest, self._sending)

    def pause(self, seconds: float) -> None:
        self._stop.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.hub
        self.request_log = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        hub.log.append(self.request_log)
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        if path.startswith("/content/"):
            everything = [item for files in (hub.files, *hub.others.values()) for item in files.items()]
            name, data = next(item for item in everything if _sha256(item[1]) == path.removeprefix("/content/"))
            return self._send_file(name, data, body)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send_json({"error": "no access"}, 401, {"X-Error-Code": "GatedRepo"})
        if match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
            return self._api(match[1], match[2], self._huggingface_listing)
        if match := re.fullmatch(r"/api/models/(.+)/tree/([^/]+)", path):
            return self._api(match[1], match[2], self._huggingface_tree)
        if match := re.fullmatch(r"/api/v1/models/(.+)/repo/files", path):
            return self._api(match[1], query["Revision"], self._modelscope_listing)
        if match := re.fullmatch(r"/api/v1/models/(.+)/repo", path):
            return self._resolve(match[1], query["Revision"], query["FilePath"], body)
        if match := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3], body)
        return self._send_json({"error": "not found"}, 404)

    def _api(self, repo: str, revision: str, listing: object) -> None:
        assert callable(listing)
        if self.hub.api_status:
            self._send_json({"error": "bad day"}, self.hub.api_status)
        elif self.hub.raw_listing is not None:
            self._send(200, {"Content-Length": str(len(self.hub.raw_listing))})
            self.wfile.write(self.hub.raw_listing)
        elif self._exists(repo, revision):
            self._send_json(listing(repo), 200)

    def _exists(self, repo: str, revision: str) -> bool:
        if repo not in (self.hub.repo, *self.hub.others):
            self._send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in self.hub.revisions:
            self._send_json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _huggingface_listing(self, repo: str) -> object:
        siblings = []
        for name, data in self.hub.files_of(repo).items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if len(data) >= LARGE:
                entry["lfs"] = {"size": len(data), "sha256": _sha256(data), "pointerSize": 134}
            siblings.append({**entry, **self.hub.listed.get(name, {})})
        return {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}

    def _huggingface_tree(self, repo: str) -> object:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
            for name, data in self.hub.files_of(repo).items()
        ]

    def _modelscope_listing(self, repo: str) -> object:
        files = [
            {
                "Name": name.rpartition("/")[2],
                "Path": name,
                "Type": "blob",
                "Size": len(data),
                "Sha256": _sha256(data),
                **self.hub.listed.get(name, {}),
            }
            for name, data in self.hub.files_of(repo).items()
        ]
        folder = {"Name": "assets", "Path": "assets", "Type": "tree", "Size": 0, "Sha256": ""}
        return {"Code": 200, "Data": {"Files": [folder, *files]}, "Message": "success", "Success": True}

    def _resolve(self, repo: str, revision: str, name: str, body: bool) -> None:
        hub = self.hub
        if not self._exists(repo, revision):
            return None
        if name not in hub.files_of(repo):
            return self._send_json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        data = hub.files_of(repo)[name]
        if len(data) < LARGE:
            return self._send_file(name, data, body)
        return self._send(
            302,
            {
                "Location": f"{hub.content_network}/content/{_sha256(data)}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{_sha256(data)}"',
                "X-Linked-Size": str(len(data)),
                # The hub offers its chunk storage to whoever can use it; plain HTTP must go on working beside it.
                "X-Xet-Hash": _sha256(data),
                "Content-Length": "0",
            },
        )

    def _send_file(self, name: str, data: bytes, body: bool) -> None:
        fault = self.hub.next_fault(name) if body else Fault()
        if fault.status:
            return self._send_json({"error": "bad day"}, fault.status)
        data = data if fault.content is None else fault.content
        headers = {"ETag": f'"{git_sha1(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, start = 200, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not fault.ignore_range:
            status, start = 206, int(asked[1]) + fault.shift_range
            if start >= len(data):
                return self._send(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(status, {**headers, "Content-Length": str(len(data) - start)})
        if body:
            self._send_body(data[start:], fault)
        return None

    def _send_body(self, data: bytes, fault: Fault) -> None:
        end = len(data) if fault.cut_after is None else fault.cut_after
        self.hub.sending(+1)
        step = 1024 if fault.silence or fault.bytes_per_second else 65536
        under_way = True
        try:
            for start in range(0, end, step):
                if fault.bytes_per_second:
                    self.hub.pause(step / fault.bytes_per_second)
                chunk = data[start : min(start + step, end)]
                if start + step >= end:
                    # Counted down before the client can have the whole file and ask for the next one, and bytes
                    # before a test can see that it has them.
                    self.hub.sending(-1)
                    under_way = False
                self.request_log.sent += len(chunk)
                self.wfile.write(chunk)
                if fault.silence and start >= len(data) // 2:
                    self.hub.pause(fault.silence)
                    self.close_connection = True
                    return
        finally:
            if under_way:
                self.hub.sending(-1)
        if end < len(data):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send_json(self, value: object, status: int, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self._send(status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send(self, status: int, headers: Mapping[str, str]) -> None:
        self.request_log.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


def server_context() -> ssl.SSLContext:
    """What a server with `CERTIFICATE` speaks TLS by."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, CERTIFICATE.with_suffix(".key"))
    return context


def git_sha1(data: bytes) -> str:
    """The id git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wait_until(condition: object, seconds: float = 10.0) -> None:
    """Poll for a state that another thread or process brings about."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
