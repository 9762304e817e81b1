"""A server of this machine that cuts the line or lies, and archives for it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from plpp_reg.data.download import REPOSITORY


class Server(ThreadingHTTPServer):
    """Files by path, and how it misbehaves: ``cuts`` are after how many bytes each of the next answers ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.digests: dict[str, str] = {}  # of those that it hands out as the Hub does
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []  # of each GET that was answered
        self.statuses: list[int] = []  # of the next answers, instead of the file
        self.knows_ranges = self.knows_sizes = True
        self.url = f"http://127.0.0.1:{self.server_port}"

    def put_on_hub(self, archive: str, content: bytes) -> None:
        path = f"/{REPOSITORY}/resolve/main/{archive}"
        self.files[path], self.digests[path] = content, hashlib.sha256(content).hexdigest()


class Answer(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        s, content = self.server, self.server.files.get(self.path)
        self.close_connection = True
        if not head and s.statuses:
            return self.send_error(s.statuses.pop(0))
        if content is None:
            return self.send_error(404)
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and s.knows_ranges else 0
        if not head:
            s.ranges.append(asked)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.path in s.digests:
            self.send_header("X-Linked-Etag", f'"{s.digests[self.path]}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Repo-Commit", "c" * 40)
        if s.knows_sizes:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not head:
            end = start + s.cuts.pop(0) if s.cuts else None
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content[start:end])


def tarred(**members: Path | bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, what in members.items():
            if isinstance(what, Path):
                archive.add(what, name)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(what)
                archive.addfile(info, io.BytesIO(what))
    return buffer.getvalue()
