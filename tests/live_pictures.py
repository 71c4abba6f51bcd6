"""A live source for tests: a server of pictures in a row (MJPEG) that can be stopped and started again."""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


class LivePictures:
    """Serves pictures, uint8 [H, W, 3], in a row and round again, at a rate; each viewer sees the first.

    Args:
        pictures: RGB.
        frames_per_s: the rate.
        length: after how many pictures for one viewer the server stops; None is never.
        port: 0 takes a free one.
    """

    def __init__(
        self, pictures: list[np.ndarray], *, frames_per_s: float = 20, port: int = 0, length: int | None = None
    ) -> None:
        files = []
        for picture in pictures:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=95)
            files.append(file.getvalue())
        self.stopped, self.silent = threading.Event(), threading.Event()
        self.viewers = 0
        live = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                live.viewers += 1
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
                self.end_headers()
                with contextlib.suppress(OSError):
                    for file in itertools.islice(itertools.cycle(files), length):
                        if live.stopped.is_set():
                            break
                        if live.silent.is_set():  # the connection stays
                            live.stopped.wait()
                        head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(file)}\r\n\r\n"
                        self.wfile.write(head.encode() + file + b"\r\n")
                        time.sleep(1 / frames_per_s)
                if length is not None:
                    live.stop()

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}/stream"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """End every connection and free the port."""
        self.stopped.set()
        self.server.shutdown()  # from any thread but the server's own
        self.server.server_close()

    def __enter__(self) -> LivePictures:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
