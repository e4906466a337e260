"""A small Hub on loopback: the part of its HTTP protocol that `push` and `from_pretrained` speak.

Repositories with branches, commits of NDJSON with a parent, git LFS objects with verification, trees, downloads with
etags. Requests are recorded, and any of them can be made to fail: by a status, or by breaking the connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

GOOD, READER = "hf_goodGOODgoodGOODgood1234", "hf_readREADreadREADread1234"
"""Tokens: one that may write to `me`, one that may only read."""


@dataclass
class File:
    """A file of a commit: bytes, or the hash of an LFS object."""

    data: bytes | None
    oid: str
    size: int


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


@dataclass
class Fault:
    """A request to fail: the first `times` that match after `skip` of them; status 0 breaks the connection."""

    method: str
    pattern: str
    status: int
    times: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    late: bool = False
    """Do what was asked first, then fail: the answer is lost, not the request."""
    hang: bool = False
    """Answer only once `Hub.answer` is set, then as if nothing were."""


class Hub:
    """The server; use it in a `with`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        """Method, path, bytes of the body that arrived."""
        self.lock = threading.RLock()
        self.answer = threading.Event()
        hub = self

        class Handler(_Handler):
            def __init__(self, *args: Any) -> None:
                self.hub = hub
                super().__init__(*args)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.answer.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, pattern: str, status: int, **more: Any) -> None:
        self.faults.append(Fault(method, pattern, status, **more))

    def make(self, name: str, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": blob(b"*.safetensors filter=lfs\n")}, "initial commit")
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a branch holds."""
        repo = self.repos[name]
        found = repo.commits[repo.branches[revision]]
        return {path: self.objects[f.oid] if f.data is None else f.data for path, f in found.items()}

    def sent(self, method: str, pattern: str) -> list[int]:
        """Return the sizes of the bodies of requests of a kind."""
        return [size for m, path, size in self.requests if m == method and re.search(pattern, path)]


def environment_of(hub: Hub, home: Path, token: str = GOOD) -> dict[str, str]:
    """Return the environment of a process that knows this Hub alone, and nothing of it yet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


def blob(data: bytes) -> File:
    return File(data, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), len(data))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self._fault(path)
        if fault is not None and fault.hang:
            self.hub.answer.wait()
            fault = None
        if fault is not None and not fault.late and not fault.status:
            self.rfile.read(min(64, int(self.headers.get("Content-Length", 0))))  # in the middle of the body
            self._break()
            return
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append((self.command, path, len(body)))
            if fault is not None and not fault.late:
                self._answer(fault.status, fault.body.encode() or b'{"error": "made to fail"}', fault.headers)
                return
            if fault is not None:
                self._answer = lambda *_: None  # type: ignore[method-assign]
            self._route(urlsplit(self.path).path, body)
        if fault is not None:
            self._break()

    def _break(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.method != self.command or not re.search(fault.pattern, path) or not fault.times:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | headers)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, **{"X-Error-Code": code, "X-Error-Message": message})

    def _route(self, path: str, body: bytes) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", GOOD, READER) and not path.startswith("/objects/"):
            # what a careless server might echo must not be shown either
            self._refuse(401, "", f"Invalid credentials in Authorization header {token}")
            return
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body), token)
        elif match := re.fullmatch(r"/objects/([0-9a-f]{64})", path):
            self._store(match[1], body)
        elif match := re.fullmatch(r"/verify/([0-9a-f]{64})", path):
            known = match[1] in self.hub.objects and len(self.hub.objects[match[1]]) == json.loads(body)["size"]
            self._json({}, 200 if known else 404)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._with_repo(match[1], token, True, lambda repo: self._batch(json.loads(body)))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            verb, rest = match[2] or "revision", match[3] or "main"
            write = verb in ("preupload", "commit", "branch")
            self._with_repo(match[1], token, write, lambda repo: self._api(repo, match[1], verb, rest, body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._with_repo(
                match[1], token, False, lambda repo: self._download(repo, *map(unquote, match.groups()[1:]))
            )
        else:
            self._refuse(404, "", f"no such page: {path}")

    def _with_repo(self, name: str, token: str, write: bool, serve: Any) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not token):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif write and (token != GOOD or not name.startswith("me/")):
            self._refuse(403, "", "You don't have the rights to push here")
        else:
            serve(repo)

    def _create(self, wanted: dict[str, Any], token: str) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if token != GOOD or wanted["organization"] != "me":
            self._refuse(403, "", "You don't have the rights to create a model under this namespace")
        elif name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}, 409)
        else:
            self.hub.make(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
            self._json({"url": f"{self.hub.endpoint}/{name}"})

    def _api(self, repo: Repo, name: str, verb: str, rest: str, body: bytes) -> None:
        if verb == "branch":
            rest = unquote(rest)
            if rest in repo.branches:
                self._refuse(409, "", "Reference already exists")
                return
            repo.branches[rest] = repo.branches["main"]
            self._json({}, 201)
            return
        revision, _, below = map(unquote, rest.partition("/"))  # a branch's own slashes come quoted
        sha = revision if revision in repo.commits else repo.branches.get(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repo.commits[sha]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})
        elif verb == "tree":
            rows = [_row(path, file) for path, file in files.items() if path.startswith(below)]
            if below and not rows:
                self._refuse(404, "EntryNotFound", f"{below} does not exist")
            else:
                self._json(rows)
        elif verb == "preupload":
            asked = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                            "oid": files[file["path"]].oid if file["path"] in files else None,
                        }
                        for file in asked
                    ]
                }
            )
        else:
            self._commit(repo, name, revision, sha, dict(files), body)

    def _commit(self, repo: Repo, name: str, branch: str, head: str, files: dict[str, File], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        assert lines[0]["key"] == "header"
        if header.get("parentCommit", head) != head:
            self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self._refuse(400, "", f"the object of {value['path']} was not uploaded")
                    return
                files[value["path"]] = File(None, value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files, header["summary"])
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for row in wanted["objects"]:
            answer = {"oid": row["oid"], "size": row["size"]}
            if row["oid"] not in self.hub.objects:
                actions = {verb: {"href": f"{self.hub.endpoint}/{place}/{row['oid']}"} for verb, place in _PLACES}
                answer["actions"] = actions
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, "", "the bytes are not those of this hash")
            return
        self.hub.objects[oid] = body
        self._answer(200)

    def _download(self, repo: Repo, revision: str, path: str) -> None:
        sha = revision if revision in repo.commits else repo.branches.get(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        file = repo.commits[sha].get(path)
        if file is None:
            self._json({}, 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        data = self.hub.objects[file.oid] if file.data is None else file.data
        self._answer(200, data, {"ETag": f'"{file.oid}"', "X-Repo-Commit": sha, "X-Linked-Size": str(len(data))})


_PLACES = (("upload", "objects"), ("verify", "verify"))


def _row(path: str, file: File) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.data is None:
        row |= {"oid": "0" * 40, "lfs": {"oid": file.oid, "size": file.size, "pointerSize": 130}}
    return row
