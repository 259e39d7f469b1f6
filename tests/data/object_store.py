"""An object store that speaks enough S3 for DALI's client, in a process of its own, with faults on demand.

In a process of its own because DALI holds Python's lock while it makes some requests: a store in the same one would
never answer them.
"""

import io
import json
import multiprocessing
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError"}


class Store:
    """The store as the tests see it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def put(self, key: str, data: bytes) -> None:
        """Keep an object at BUCKET/KEY."""
        self._ask("PUT", f"/{key}", data)

    def remove(self, key: str) -> None:
        """Forget an object."""
        self._ask("DELETE", f"/{key}")

    def fault(self, key: str, kind: str, method: str = "GET", times: int = 10**9) -> None:
        """Answer requests for a key with an error ("403"), or "cut" the body, "hang", or "stall" in the body."""
        self._ask("POST", "/fault", json.dumps([f"/{key}", kind, method, times]).encode())

    def requests(self) -> list[tuple[str, str, str]]:
        """Method, path and range of the requests since the last call; faults end with it."""
        return [tuple(entry) for entry in json.loads(self._ask("POST", "/requests"))]

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body)
        answer = connection.getresponse().read()
        connection.close()
        return answer


@contextmanager
def running() -> Iterator[Store]:
    """A store, empty."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(send,), daemon=True)
    process.start()
    try:
        yield Store(receive.recv())
    finally:
        process.kill()
        process.join()


def tar(members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def wds2idx(data: bytes) -> bytes:
    """The index of a shard, as DALI's wds2idx writes it."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            entry = f"{extension} {member.offset_data} {member.size} {member.name}"
            samples.setdefault(folder + slash + stem, []).append(entry)
    return f"v1.2 {len(samples)}\n".encode() + b"".join(" ".join(s).encode() + b"\n" for s in samples.values())


def _serve(send: Any) -> None:
    server = _Server(("127.0.0.1", 0), _Handler)
    send.send(server.server_port)
    server.serve_forever()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], list[Any]] = {}
        self.requests: list[tuple[str, str, str]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""

    def do_PUT(self) -> None:
        self.server.objects[unquote(self.path)] = self._body()
        self._answer(200, b"")

    def do_DELETE(self) -> None:
        self.server.objects.pop(self.path, None)
        self._answer(200, b"")

    def do_POST(self) -> None:
        body = self._body()
        with self.server.lock:
            if self.path == "/fault":
                path, kind, method, times = json.loads(body)
                self.server.faults[method, path] = [kind, times]
                self._answer(200, b"")
            else:
                self._answer(200, json.dumps(self.server.requests).encode())
                self.server.requests.clear()
                self.server.faults.clear()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, wanted = unquote(url.path), self.headers.get("Range", "")
        listing = "list-type=2" in url.query
        with self.server.lock:
            self.server.requests.append(("LIST" if listing else self.command, path, wanted))
            fault = self.server.faults.get(("LIST" if listing else self.command, path), ["", 0])
            kind, fault[1] = fault[0] if fault[1] > 0 else "", fault[1] - 1
        data = self.server.objects.get(path)
        if kind == "hang":
            time.sleep(60)
        elif kind.isdigit() or (data is None and not listing):
            code = int(kind or 404)
            self._answer(code, f"<Error><Code>{CODES[code]}</Code><Message>not today</Message></Error>".encode())
        elif data is None:
            self._answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        elif match := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted):
            part = data[int(match[1]) : int(match[2]) + 1]
            self._answer(206, part, kind, {"Content-Range": f"bytes {match[1]}-{match[2]}/{len(data)}"})
        else:
            self._answer(200, data, kind)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, code: int, body: bytes, kind: str = "", headers: dict[str, str] | None = None) -> None:
        standard = {"Content-Length": str(len(body)), "Content-Type": "application/xml", "ETag": '"1"'}
        self.send_response(code)
        for name, value in {**standard, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if kind in ("cut", "stall") else body)
        if kind == "stall":
            time.sleep(60)
        if kind == "cut":
            self.close_connection = True
