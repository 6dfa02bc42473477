"""A server on this machine that speaks as much of the Hub's protocol as downloads need, and records the requests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from local_server import LocalServer


COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/model"


@dataclass
class LocalHub(LocalServer):
    """
    Serves one folder as the repository `org/model` at one commit, weights by redirection as the Hub does.

    Args:
        folder (`Path`): The files.
        downloads (list of `str`): Names of the weights files that were asked for as a whole.
        ranges (list of `tuple`): Name and number of bytes of each request for a part of a weights file.
        broken (`set`): Names of files whose download breaks off in the middle.
        ignores_range (`bool`): Whether requests for a part are answered with the whole.
        on_download (`callable`): Called with the name at the start of each download of a weights file.
    """

    folder: Path
    downloads: list[str] = field(default_factory=list)
    ranges: list[tuple[str, int]] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    ignores_range: bool = False
    on_download: object = None

    @property
    def cdn_url(self) -> str:
        """The same server under another name, as large files are elsewhere."""
        return f"http://localhost:{self.server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path.strip("/")
        if path in (f"api/models/{REPOSITORY}/revision/main", f"api/models/{REPOSITORY}/revision/{COMMIT}"):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        elif path == f"api/models/{REPOSITORY}/tree/{COMMIT}":
            self._json([self._entry(file) for file in sorted(self.hub.folder.iterdir())])
        elif path.startswith(f"{REPOSITORY}/resolve/") and (self.hub.folder / path.split("/", 4)[4]).is_file():
            self._resolve(self.hub.folder / path.split("/", 4)[4], body)
        elif path.startswith("cdn/") and (self.hub.folder / path[4:]).is_file():
            self._send(self.hub.folder / path[4:], body)
        else:
            self._reply(404, {"X-Error-Code": "EntryNotFound"}, b"")

    def _json(self, content: object) -> None:
        self._reply(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _entry(self, file: Path) -> dict:
        entry = {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)[:40]}
        if file.suffix == ".safetensors":
            entry["lfs"] = {"oid": _etag(file), "size": file.stat().st_size, "pointerSize": 100}
        return entry

    def _resolve(self, file: Path, body: bool) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(file)[:40]}"'}
        if file.suffix != ".safetensors":
            self._reply(200, headers, file.read_bytes(), body)
            return
        headers |= {"X-Linked-ETag": f'"{_etag(file)}"', "X-Linked-Size": str(file.stat().st_size)}
        self._reply(302, {**headers, "Location": f"{self.hub.cdn_url}/cdn/{file.name}"}, b"")

    def _send(self, file: Path, body: bool) -> None:
        content = file.read_bytes()
        headers = {"ETag": f'"{_etag(file)}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked and not self.hub.ignores_range:
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            part = content[first : last + 1]
            self.hub.ranges.append((file.name, len(part)))
            self._reply(206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}, part, body)
            return
        self.hub.downloads.append(file.name)
        if self.hub.on_download is not None:
            self.hub.on_download(file.name)
        if file.name in self.hub.broken:
            self.close_connection = True
            self._reply(200, headers, content[: len(content) // 2], body)
        else:
            self._reply(200, headers, content, body)

    def _reply(self, status: int, headers: dict[str, str], content: bytes, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


LocalHub.handler = _Handler
