"""Servers on the loopback: a bucket of S3, and plain HTTP, whose answers can be made to go wrong."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

Fault = Callable[["Request"], str | None]
"""Told of each request for bytes; says what goes wrong with it: "503", "403", "cut" (the connection, half way),
"short" (half of the range, said to be all), "whole" (the range is ignored), "drip" (too slow), "redirect"; None:
nothing."""


@dataclass(frozen=True)
class Request:
    """One request: method, key, and the range asked for (0, 0: none)."""

    method: str
    key: str
    start: int = 0
    end: int = 0
    query: str = ""


@dataclass
class Bucket:
    """The objects of one bucket, by key, and what was asked of it."""

    name: str = "models"
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    fault: Fault | None = None
    tagged: bool = True
    url: str = ""
    most: int = 0
    """How many requests for bytes were under way at once, at most."""
    delay: float = 0.0
    _busy: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def put(self, directory: Path, prefix: str) -> str:
        """Upload the files of a directory; the URL of the prefix."""
        for file in sorted(p for p in directory.rglob("*") if p.is_file()):
            self.objects[f"{prefix}/{file.relative_to(directory)}"] = file.read_bytes()
        return f"s3://{self.name}/{prefix}"

    def gets(self, key_end: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.key and r.key.endswith(key_end)]

    def nbytes(self, key_end: str = "") -> int:
        return sum(r.end - r.start for r in self.gets(key_end))

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
            self.most = max(self.most, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1


class Handler(BaseHTTPRequestHandler):
    """Answers every request by ``_answer``, on connections that stay, and prints nothing."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for the acknowledgement of its headers

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        raise NotImplementedError


class _Handler(Handler):
    bucket: Bucket

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if bucket != self.bucket.name:
            return self._error(404, "NoSuchBucket")
        if not key:
            return self._list(parse_qs(parts.query, keep_blank_values=True))
        with self.bucket.counted():
            time.sleep(self.bucket.delay)
            self._object(key, parts.query)

    def _object(self, key: str, query: str) -> None:
        content = self.bucket.objects.get(key)
        asked = self.headers.get("Range", "")
        start, end = 0, len(content or b"")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(end, int(last) + 1)
        request = Request(self.command, key, start, end if asked or self.command == "GET" else 0, query)
        self.bucket.requests.append(request)
        fault = self.bucket.fault(request) if self.bucket.fault else None
        content = self.bucket.objects.get(key)  # which the fault may have changed
        if content is None:
            return self._error(404, "NoSuchKey")
        if fault and fault.isdigit():
            code = {"503": "SlowDown", "403": "AccessDenied", "400": "ExpiredToken"}.get(fault, "InternalError")
            return self._error(int(fault), code)
        if fault == "redirect":
            return self._error(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-1"})
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        if self.headers.get("If-Match", tag) != tag:
            return self._error(412, "PreconditionFailed")
        body = content[start:end] if asked and fault != "whole" else content
        if fault == "short":
            body = body[: len(body) // 2]
        self.send_response(206 if asked and fault != "whole" else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked and fault != "whole":
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
        if self.bucket.tagged:
            self.send_header("ETag", tag)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
        elif fault == "drip":
            for at in range(0, min(len(body), 400)):
                self.wfile.write(body[at : at + 1])
                self.wfile.flush()
                time.sleep(0.05)
            self.close_connection = True
        else:
            self.wfile.write(body)
        return None

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        begin = int(query.get("continuation-token", ["0"])[0])
        self.bucket.requests.append(Request("LIST", "", query=prefix))
        fault = self.bucket.fault(self.bucket.requests[-1]) if self.bucket.fault else None
        if fault and fault.isdigit():
            return self._error(int(fault), "AccessDenied")
        if fault == "redirect":
            return self._error(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-1"})
        keys = sorted(key for key in self.bucket.objects if key.startswith(prefix))
        folders = sorted({prefix + k[len(prefix) :].split(delimiter)[0] + delimiter for k in keys
                          if delimiter and delimiter in k[len(prefix) :]})  # fmt: skip
        keys = [key for key in keys if not (delimiter and delimiter in key[len(prefix) :])]
        page, more = keys[begin : begin + 100], len(keys) > begin + 100
        text = "".join(
            f"<Contents><Key>{escape(k)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{hashlib.md5(self.bucket.objects[k]).hexdigest()}&quot;</ETag>"
            f"<Size>{len(self.bucket.objects[k])}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for k in page
        )
        text += "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders)
        token = f"<NextContinuationToken>{begin + 100}</NextContinuationToken>" if more else ""
        self._send(
            200,
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{self.bucket.name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<MaxKeys>100</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{token}{text}</ListBucketResult>",
        )

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no</Message></Error>', headers)

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on the loopback; its URL."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def bucket_server() -> Iterator[Bucket]:
    """An empty bucket, ``url`` being the endpoint; below ``{url}/{name}`` its objects can be had by plain HTTP."""
    bucket = Bucket()
    with serving(type("Handler", (_Handler,), {"bucket": bucket})) as url:
        bucket.url = url
        yield bucket
