"""A Hub on the loopback address: as much of its HTTP API as `huggingface_hub` uses to push, list and fetch models.

Repositories live in memory. Weights go through the LFS door, the rest through the commit, as on the Hub. Pushing
needs the token, and so does all that touches a private repository. Each request is counted.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LFS = (".safetensors",)  # endings of the files that the Hub would keep outside of git
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


def git_hash(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def object_id(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS) else git_hash(content)


@dataclass
class Repository:
    """Branches point to commits, commits hold all files."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"0" * 40: {".gitattributes": b"*.safetensors filter=lfs\n"}}
    )
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr((branch, len(self.commits))).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class Refusal(Exception):
    """An answer that is no success; `code` is what the Hub's own errors carry."""

    def __init__(self, status: int, code: str = "", commit: str = "", **content: str) -> None:
        self.status, self.headers = status, {"X-Error-Code": code, "X-Repo-Commit": commit}
        self.content = json.dumps(content).encode()


class Hub:
    """`with Hub() as hub:` serves at `hub.url` until the block ends."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[str] = []
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def repository(self, name: str, known: bool) -> Repository:
        """`known`: whether who asks has shown the token."""
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound")
        return repository

    def revision(self, name: str, revision: str, known: bool) -> tuple[Repository, str, dict[str, bytes]]:
        repository = self.repository(name, known)
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Refusal(404, "RevisionNotFound")
        return repository, commit, repository.commits[commit]


@dataclass
class Request:
    hub: Hub
    body: bytes
    query: dict[str, list[str]]
    known: bool
    repo: str = ""
    revision: str = "main"
    path: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def create(request: Request) -> dict:
    fields = request.json
    name = f"{fields['organization'] or 'me'}/{fields['name']}"
    url = f"{request.hub.url}/{name}"
    if name in request.hub.repositories:
        raise Refusal(409, url=url)
    request.hub.repositories[name] = Repository(private=fields.get("visibility") == "private")
    return {"url": url}


def validate_card(request: Request) -> dict:
    return {"errors": [], "warnings": []}


def create_branch(request: Request) -> dict:
    repository = request.hub.repository(request.repo, request.known)
    if request.revision in repository.branches:
        raise Refusal(409)
    repository.branches[request.revision] = repository.branches["main"]
    return {}


def preupload(request: Request) -> dict:
    _, _, files = request.hub.revision(request.repo, request.revision, request.known)

    def answer(path: str) -> dict:
        mode = "lfs" if path.endswith(LFS) else "regular"
        oid = object_id(path, files[path]) if path in files else None
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    return {"files": [answer(file["path"]) for file in request.json["files"]]}


def lfs_batch(request: Request) -> dict:
    def answer(item: dict) -> dict:
        href = f"{request.hub.url}/lfs/{item['oid']}"
        return item if item["oid"] in request.hub.large else {**item, "actions": {"upload": {"href": href}}}

    return {"objects": [answer(item) for item in request.json["objects"]]}


def lfs_put(request: Request) -> dict:
    if hashlib.sha256(request.body).hexdigest() != request.path:
        raise Refusal(400)
    request.hub.large[request.path] = request.body
    return {}


def commit(request: Request) -> dict:
    repository, _, files = request.hub.revision(request.repo, request.revision, request.known)
    files = dict(files)
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = request.hub.large[value["oid"]]
        elif item["key"] == "deletedFile":
            del files[value["path"]]
    name = repository.commit(request.revision, files)
    return {"commitUrl": f"{request.hub.url}/{request.repo}/commit/{name}", "commitOid": name}


def information(request: Request) -> dict:
    _, name, files = request.hub.revision(request.repo, request.revision, request.known)
    return {"id": request.repo, "sha": name, "siblings": [{"rfilename": path} for path in files]}


def tree(request: Request) -> list[dict]:
    _, _, files = request.hub.revision(request.repo, request.revision, request.known)
    start = f"{request.path}/" if request.path else ""
    below = {path: content for path, content in files.items() if path.startswith(start)}
    if start and not below:
        raise Refusal(404, "EntryNotFound")
    deep = request.query.get("recursive") == ["true"]
    entries = []
    for path, content in below.items():
        if deep or "/" not in path.removeprefix(start):
            entry: dict = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path.endswith(LFS):
                entry["lfs"] = {"oid": object_id(path, content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
    return entries


def resolve(request: Request) -> tuple[bytes, dict[str, str]]:
    _, name, files = request.hub.revision(request.repo, request.revision, request.known)
    if request.path not in files:
        raise Refusal(404, "EntryNotFound", name)
    content = files[request.path]
    return content, {"ETag": f'"{object_id(request.path, content)}"', "X-Repo-Commit": name}


WRITING = (create, create_branch, preupload, lfs_batch, commit)
ROUTES: list[tuple[str, str, Callable[[Request], Any]]] = [
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate_card),
    ("POST", rf"/api/models/{REPO}/branch/(?P<revision>.+)", create_branch),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/(?P<path>\w+)", lfs_put),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", commit),
    ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", information),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", tree),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]


class Handler(BaseHTTPRequestHandler):
    """One connection; HEAD is GET without the content."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self) -> tuple[bytes, dict[str, str]]:
        method = "GET" if self.command == "HEAD" else self.command
        url = urlsplit(self.path)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        body = self.read_body()
        for expected, pattern, function in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match is None or method != expected:
                continue
            if function in WRITING and not known:
                raise Refusal(401)
            named = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            found = function(Request(self.hub, body, parse_qs(url.query), known, **named))
            return found if isinstance(found, tuple) else (json.dumps(found).encode(), {})
        raise Refusal(404)

    def do_GET(self) -> None:
        status = 200
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
            try:
                content, headers = self.answer()
            except Refusal as refusal:
                status, content, headers = refusal.status, refusal.content, refusal.headers
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments: Any) -> None:
        """Nothing: `requests` keeps count."""


__all__ = ["TOKEN", "Hub"]
