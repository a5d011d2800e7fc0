"""An S3 that fails now and then, for `python -m tests.system.bad_bucket ADDRESS RECORD`; it makes a bucket `bucket`.

moto's server behind a layer that counts requests: some are answered 500 or 503 without being looked at, some have
their connection cut, before anything is done or after it, and some take long. RECORD gets a line for each request:
what was done to it, its method and path. One request in eight meets a fault; who tries again is let through.
"""

from __future__ import annotations

import itertools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

PORT = 29500
SLOW = 2.0  # seconds
FAULTS = {3: "500", 11: "503", 19: "unheard", 27: "unanswered", 35: "slow"}  # the number of a request, of 40 each
CODE = {"500": "500 Internal Server Error", "503": "503 Slow Down"}


class Failing:
    """A WSGI application in front of another one."""

    def __init__(self, inner: Any, record: Path) -> None:
        self._inner, self._record, self._numbers = inner, record, itertools.count()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        fault = FAULTS.get(next(self._numbers) % 40, "served")
        with self._record.open("a") as file:
            file.write(f"{fault} {environ['REQUEST_METHOD']} {environ['PATH_INFO']}\n")
        if fault in CODE:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(CODE[fault], [("Content-Length", "0")])
            return [b""]
        if fault == "slow":
            time.sleep(SLOW)
        if fault != "unheard":
            answer: Iterable[bytes] = self._inner(environ, start)
            if fault != "unanswered":
                return answer
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionError(f"{fault}, on order")


def main(address: str, record: Path) -> None:
    app = Failing(DomainDispatcherApplication(create_backend_app), record)
    server = make_server(address, PORT, app, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever).start()
    s3fs.S3FileSystem(use_listings_cache=False).mkdir("bucket")
    with record.open("a") as file:
        file.write("ready\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
