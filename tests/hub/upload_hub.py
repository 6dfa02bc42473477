"""A server on this machine that speaks as much of the Hub's protocol as uploads need, and keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from threading import Lock
from urllib.parse import unquote, urlsplit

from local_server import LocalServer


TOKEN = "hf_of_the_test"
USER = {
    "type": "user",
    "name": "me",
    "orgs": [
        {"name": "lab", "roleInOrg": "write"},
        {"name": "library", "roleInOrg": "read"},
    ],
    "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}},
}

NAME = r"(?P<id>[\w.-]+(/[\w.-]+)?)"
ROUTES = {  # name: method and path
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "info": ("GET", rf"/api/models/{NAME}(/revision/(?P<revision>[^/]+))?"),
    "branch": ("POST", rf"/api/models/{NAME}/branch/(?P<revision>[^/]+)"),
    "preupload": ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)"),
    "batch": ("POST", rf"/{NAME}\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})"),
    "verify": ("POST", r"/verify"),
    "commit": ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)"),
    "xet": ("GET", rf"/api/models/{NAME}/xet-write-token/(?P<revision>[^/]+)"),
}


@dataclass
class Repository:
    """
    A repository.

    Args:
        private (`bool`): Whether only its owner sees it.
        branches (`dict`): Branch -> file name -> content.
        card_data (`dict`): Metadata of its card.
        commits (list of `dict`): Header of each commit, with the branch and the files it added and deleted.
    """

    private: bool = True
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    card_data: dict | None = None
    commits: list[dict] = field(default_factory=list)

    def sha(self, branch: str) -> str:
        content = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(self.branches[branch].items())]
        return hashlib.sha1(repr(content).encode()).hexdigest()


@dataclass
class UploadHub(LocalServer):
    """
    A Hub with one user, `me`, who may write in `lab` and read in `library`.

    Args:
        repositories (`dict`): Id -> repository.
        failures (`dict`): Name of a route, or `"<route> <id>"` of a repository -> what it answers instead: a status, or `"drop"` to break off the connection
            in the middle of the body.
        requests (list of `str`): Names of the routes that were asked, in order.
        received (`bytearray`): Every byte of every body.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    failures: dict[str, int | str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)
    user: dict = field(default_factory=lambda: json.loads(json.dumps(USER)))
    storage: dict[str, bytes] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def files(self, id: str, branch: str = "main") -> dict[str, bytes]:
        """What was uploaded to a branch."""
        files = self.repositories[id].branches[branch]
        return {name: data for name, data in files.items() if name != ".gitattributes"}


class _Handler(BaseHTTPRequestHandler):
    hub: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        path = urlsplit(self.path).path
        matches = (
            (name, re.fullmatch(pattern, path)) for name, (method, pattern) in ROUTES.items() if method == self.command
        )
        name, match = next(((name, match) for name, match in matches if match), ("none", None))
        with self.hub.lock:
            self.hub.requests.append(name)
        id = match.groupdict().get("id") if match else None
        failure = self.hub.failures.get(name, self.hub.failures.get(f"{name} {id}"))
        if failure == "drop":
            if self.command != "GET":
                self.rfile.read(10)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        with self.hub.lock:
            self.hub.received += body
            if failure is not None:
                self._answer(failure, {"error": f"failed on purpose with {failure}"})
            elif match is None:
                self._answer(404, {"error": f"no route {self.command} {path}"})
            elif name not in ("put", "validate") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer(401, {"error": "Invalid username or password."})
            else:
                getattr(self, f"_{name}")(body, **{key: unquote(value) for key, value in match.groupdict("").items()})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def _found(self, id: str, revision: str = "") -> Repository | None:
        """The repository, or `None` after the answer that there is none, or not this branch of it."""
        repository = self.hub.repositories.get(id)
        if repository is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif revision and revision not in repository.branches:
            self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def _whoami(self, body: bytes) -> None:
        self._answer(200, self.hub.user)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        id = f"{asked['organization'] or 'me'}/{asked['name']}"
        if id in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo"})
            return
        # as in an organisation whose repositories are public by default
        self.hub.repositories[id] = Repository(private=asked.get("visibility", "public") == "private")
        self._answer(200, {"url": f"{self.hub.url}/{id}", "name": id})

    def _validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _info(self, body: bytes, id: str, revision: str) -> None:
        repository = self._found(id, revision)
        if repository is not None:
            branch = revision or "main"
            siblings = [{"rfilename": name} for name in repository.branches[branch]]
            content = {"id": id, "modelId": id, "sha": repository.sha(branch), "private": repository.private}
            card = {"cardData": repository.card_data} if repository.card_data else {}
            self._answer(200, content | {"siblings": siblings, "gated": False, "tags": []} | card)

    def _branch(self, body: bytes, id: str, revision: str) -> None:
        repository = self._found(id)
        if repository is not None:
            repository.branches[revision] = dict(repository.branches["main"])
            self._answer(200, {})

    def _preupload(self, body: bytes, id: str, revision: str) -> None:
        if self._found(id, revision) is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})

    def _batch(self, body: bytes, id: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/storage/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/verify"},
            }
            objects.append(item | {} if item["oid"] in self.hub.storage else item | {"actions": actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "the content has another hash"})
            return
        self.hub.storage[oid] = body
        self._answer(200, {})

    def _verify(self, body: bytes) -> None:
        asked = json.loads(body)
        known = len(self.hub.storage.get(asked["oid"], b"")) == asked["size"]
        self._answer(200 if known else 404, {})

    def _commit(self, body: bytes, id: str, revision: str) -> None:
        repository = self._found(id, revision)
        if repository is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repository.sha(revision)):
            self._answer(412, {"error": "A commit has happened since"})
            return
        added, deleted = {}, []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.hub.storage[value["oid"]]
            elif line["key"] == "deletedFile":
                deleted.append(value["path"])
        branch = repository.branches[revision]
        for name in deleted:
            del branch[name]
        branch |= added
        repository.commits.append(header | {"branch": revision, "added": sorted(added), "deleted": sorted(deleted)})
        oid = repository.sha(revision)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{id}/commit/{oid}", "commitOid": oid, "success": True})

    def _xet(self, body: bytes, id: str, revision: str) -> None:
        self._answer(404, {"error": "This server has no such storage"})


UploadHub.handler = _Handler
