"""A page that shows the newest picture, for browsers on this machine: MJPEG over Python's own HTTP server."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from deploy.edge_app.opencv import opencv
from deploy.edge_app.picture import Picture
from runtime.errors import OptionError

_MOST_VIEWERS = 16
_SLOWEST_S = 10.0  # a viewer that takes longer for one picture has gone
# What the system may keep for a viewer: a slow one then misses pictures instead of seeing old ones.
_SEND_BUFFER_BYTES = 64 * 1024
_BOUNDARY = "clearpact-frame"
_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>clearpact: live</title>
<style>
  body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: #111; }
  img { max-width: 100vw; max-height: 100vh; min-width: min(100vw, 640px); object-fit: contain; }
</style>
<img src="/stream.mjpg" alt="The newest frame, the map over it, and under it class and probability">
</html>
"""


class Page:
    """Serves `/`, `/stream.mjpg`, `/frame.jpg` and `/health`; pictures are drawn only where somebody looks.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        health: what `/health` tells, asked in the server's threads.

    Raises:
        OptionError: the address cannot be listened on, or OpenCV is not installed.
    """

    def __init__(self, host: str, port: int, health: Callable[[], dict[str, Any]]) -> None:
        opencv("--serve")
        self._changed = threading.Condition()
        self._newest: tuple[int, Picture] | None = None
        self._closed = False
        self.health = health
        self.viewers = threading.BoundedSemaphore(_MOST_VIEWERS)
        try:
            self._server = _Server((host, port), self)
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or error
            raise OptionError(
                f"--serve {port}: cannot listen on {host} ({said}); choose another port or --host"
            ) from None
        address, self.port = self._server.server_address[:2]
        self.loopback = ipaddress.ip_address(str(address)).is_loopback
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        threading.Thread(target=self._server.serve_forever, name="page", daemon=True).start()

    def show(self, picture: Picture) -> bool:
        """Take the newest picture."""
        with self._changed:
            number = self._newest[0] + 1 if self._newest else 0
            self._newest = number, picture
            self._changed.notify_all()
        return True

    def close(self) -> None:
        """Let the viewers go and free the port."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def newer_than(self, number: int) -> tuple[int, Picture] | None:
        """Wait for a picture that is newer than one; None where there will be none, or none came for long."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._newest is not None and self._newest[0] > number), _SLOWEST_S
            )
            newest = self._newest
            return None if self._closed or newest is None or newest[0] <= number else newest


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], page: Page) -> None:
        self.page = page
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without the look-up of a name, for which a device without a name server would wait."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: viewers come and go."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _SLOWEST_S
    server: _Server

    def do_GET(self) -> None:
        page = self.server.page
        if not self._meant_for_us():
            self.send_error(403, "open the page by its address")
        elif self.path == "/":
            self._answer("text/html; charset=utf-8", _HTML.encode())
        elif self.path == "/health":
            self._answer("application/json", json.dumps(page.health()).encode())
        elif self.path == "/frame.jpg":
            found = page.newer_than(-1)
            if found is None:
                self.send_error(503, "no frame yet")
            else:
                self._answer("image/jpeg", found[1].jpeg)
        elif self.path == "/stream.mjpg":
            self._stream()
        else:
            self.send_error(404, "expected /, /stream.mjpg, /frame.jpg or /health")

    def log_message(self, *arguments: Any) -> None:
        """Print nothing for each request."""

    def _meant_for_us(self) -> bool:
        """Whether the address is one of this machine's own, where only it is served.

        Another site's name that resolves to 127.0.0.1 would let that site read the pictures.
        """
        if not self.server.page.loopback:
            return True
        with contextlib.suppress(ValueError):
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        return False

    def _head(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")

    def _answer(self, kind: str, content: bytes) -> None:
        self._head(kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self) -> None:
        page = self.server.page
        if not page.viewers.acquire(blocking=False):
            self.send_error(503, f"{_MOST_VIEWERS} viewers at a time")
            return
        try:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            self._head(f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
            self.end_headers()
            number = -1
            while True:
                found = page.newer_than(number)
                if found is None:
                    break
                number, picture = found
                head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture.jpeg)}\r\n\r\n"
                self.wfile.write(head.encode() + picture.jpeg + b"\r\n")
        except OSError:  # the viewer has gone, or is too slow
            pass
        finally:
            page.viewers.release()
