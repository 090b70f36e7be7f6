"""Proxies on 127.0.0.1: one that speaks HTTP (forwarding and CONNECT), in TLS or not, and one that speaks SOCKS5."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import socketserver
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

from .hub_server import server_context


@dataclass
class ProxyServer:
    """A proxy while in a `with` block; `asked` lists what was to be reached through it, as HOST:PORT."""

    kind: str = "http"
    """http, https or socks5."""
    login: tuple[str, str] | None = None
    """Without which it refuses."""
    forwards_to: tuple[str, int] | None = None
    """Where every connection goes, whatever was asked for: a host that does not exist is then reached all the same."""
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> ProxyServer:
        socks = self.kind == "socks5"
        handler = type("BoundHandler", (_SocksHandler if socks else _HttpHandler,), {"proxy": self})
        self._server = (_SocksServer if socks else _HttpServer)(("127.0.0.1", 0), handler)
        if self.kind == "https":
            self._server.socket = server_context().wrap_socket(self._server.socket, server_side=True)
        self.place = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def connect(self, host: str, port: int) -> socket.socket:
        self.asked.append(f"{host}:{port}")
        return socket.create_connection(self.forwards_to or (host, port), timeout=10)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _SocksServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _HttpHandler(BaseHTTPRequestHandler):
    proxy: ProxyServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        if self._may():
            host, _, port = self.path.rpartition(":")
            upstream = self.proxy.connect(host.strip("[]"), int(port))
            self.send_response(200)
            self.end_headers()
            relay(self.connection, upstream)
        self.close_connection = True

    def do_GET(self) -> None:
        if not self._may():
            return
        url = urlsplit(self.path)
        assert url.hostname
        upstream = http.client.HTTPConnection(url.hostname)
        upstream.sock = self.proxy.connect(url.hostname, url.port or 80)
        kept = {k: v for k, v in self.headers.items() if not k.lower().startswith("proxy-")}
        upstream.request("GET", f"{url.path}?{url.query}" if url.query else url.path, headers=kept)
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("server", "date"):
                self.send_header(key, value)
        self.end_headers()
        while chunk := answer.read1(65536):
            self.wfile.write(chunk)
        upstream.close()

    def _may(self) -> bool:
        expected = self.proxy.login and "Basic " + base64.b64encode(":".join(self.proxy.login).encode()).decode()
        if self.headers.get("Proxy-Authorization") == expected:
            return True
        self.send_error(407)
        return False


class _SocksHandler(socketserver.BaseRequestHandler):
    proxy: ProxyServer

    def handle(self) -> None:
        stream = self.request.makefile("rb")
        _, count = stream.read(2)
        methods = stream.read(count)
        method = 2 if self.proxy.login else 0
        if method not in methods:
            self.request.sendall(b"\x05\xff")
            return
        self.request.sendall(bytes([5, method]))
        if self.proxy.login:
            stream.read(1)
            name, password = (stream.read(stream.read(1)[0]).decode() for _ in range(2))
            right = (name, password) == self.proxy.login
            self.request.sendall(b"\x01\x00" if right else b"\x01\x01")
            if not right:
                return
        kind = stream.read(4)[3]
        host = socket.inet_ntoa(stream.read(4)) if kind == 1 else stream.read(stream.read(1)[0]).decode()
        port = int.from_bytes(stream.read(2), "big")
        try:
            upstream = self.proxy.connect(host, port)
        except OSError:
            self.request.sendall(b"\x05\x05\x00\x01" + bytes(6))
            return
        self.request.sendall(b"\x05\x00\x00\x01" + bytes(6))
        relay(self.request, upstream)


def relay(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until either side ends."""

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                target.sendall(chunk)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    back = threading.Thread(target=carry, args=(other, one), daemon=True)
    back.start()
    carry(one, other)
    back.join(timeout=10)
    other.close()
