"""A Hub on the loopback interface that serves folders as repositories, and a process that knows no other Hub."""

import base64
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils import _http


class HubServer:
    """
    Serves what `huggingface_hub` needs to list, download and upload model repositories.

    Args:
        root: holds a folder `owner/name` for every repository.
        tags: revisions besides `main` and the commit, by repository.
        token: what uploads need; none are accepted without.

    Attributes:
        former: folders of commits that `main` has moved on from, by commit.
        cut_off: paths of files after whose first half the connection is reset.
        requests: how many there were.
        downloads: every file that was sent, as (repository, path in it).
        commits: every upload, as (repository, message).
    """

    def __init__(self, root: Path, tags: dict[str, set[str]] | None = None, token: str | None = None):
        self.root, self.tags, self.token = root, tags or {}, token
        self.former: dict[str, Path] = {}
        self.cut_off: set[str] = set()
        self.requests = 0
        self.downloads: list[tuple[str, str]] = []
        self.commits: list[tuple[str, str]] = []
        self.port = 0  # any free one; the same again after a pause
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        self._http.hub = self
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing answers at the address meanwhile."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def files(self, repo: str, revision: str | None = None) -> dict[str, Path]:
        """The files of a repository by their path in it."""
        folder = self.former.get(revision, self.root / repo)
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, repo: str) -> str:
        """A commit id that changes with the names and sizes of the files."""
        listing = [(name, path.stat().st_size) for name, path in self.files(repo).items()]
        return hashlib.sha1(json.dumps([repo, listing]).encode()).hexdigest()


# The Hub's addresses: a model's files and commit, its tree, one file.
_ADDRESS = re.compile(r"(/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?")

# Where files of a model are announced, and where they are sent to.
_UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802, the name http.server looks for
        hub = self.server.hub
        hub.requests += 1
        address = _ADDRESS.fullmatch(unquote(urlsplit(self.path).path))
        files = hub.files(address[2], address[4]) if address else {}
        if not files:
            return self._refuse("RepoNotFound")
        is_api, repo, action, revision, path = address.groups()
        commit = revision if revision in hub.former else hub.commit(repo)
        if revision not in {None, "main", commit, *hub.tags.get(repo, ())}:
            return self._refuse("RevisionNotFound")

        if is_api and action in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            return self._send_json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []})
        if is_api and action == "tree":
            return self._send_json([_tree_entry(name, file) for name, file in files.items()])
        if action == "resolve" and path in files:
            entry = _tree_entry(path, files[path])
            self._send_head(entry["size"], {"X-Repo-Commit": commit, "ETag": f'"{entry["lfs"]["oid"]}"'})
            if self.command == "GET" and path in hub.cut_off:
                self.wfile.write(files[path].read_bytes()[: entry["size"] // 2])
                self._reset()
            elif self.command == "GET":
                hub.downloads.append((repo, path))
                self.wfile.write(files[path].read_bytes())
            return None
        return self._refuse("EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:  # noqa: N802
        hub = self.server.hub
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if hub.token is None or self.headers["Authorization"] != f"Bearer {hub.token}":
            return self._refuse("Forbidden", status=403)
        if self.path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'owner'}/{asked['name']}"
            (hub.root / repo).mkdir(parents=True, exist_ok=True)
            return self._send_json({"url": f"{hub.url}/{repo}"})
        address = _UPLOAD.fullmatch(unquote(urlsplit(self.path).path))
        if not address or not (hub.root / address[1]).is_dir():
            return self._refuse("RepoNotFound")
        repo, action = address.groups()
        if action == "preupload":
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            return self._send_json(
                {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                hub.commits.append((repo, line["value"]["summary"]))
            else:
                path = hub.root / repo / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = hub.commit(repo)
        return self._send_json({"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def _send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self._send_head(len(body), {"Content-Type": "application/json"})
        self.wfile.write(body)

    def _refuse(self, code: str, status: int = 404) -> None:
        self._send_head(0, {"X-Error-Code": code}, status)

    def _send_head(self, size: int, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # which would keep the connection open
        self.connection.close()

    def log_message(self, *args) -> None:
        pass


def _tree_entry(name: str, file: Path) -> dict:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    size = file.stat().st_size
    lfs = {"oid": digest, "size": size, "pointerSize": 134}
    return {"type": "file", "path": name, "size": size, "oid": digest[:40], "lfs": lfs}


@contextlib.contextmanager
def process_on(hub: HubServer, home: Path) -> Iterator[ProcessPoolExecutor]:
    """
    A process, to submit functions to, whose Hub is the server: `huggingface_hub` reads its environment only once.

    Args:
        hub: the server.
        home: where that process caches downloads.
    """
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    unset = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    with mock.patch.dict(os.environ, {**unset, **environment}, clear=True):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            process.submit(_retry_at_once).result()  # starts it while the environment is set
            yield process


def _retry_at_once() -> None:
    """Ask a Hub that does not answer again without the half minute of waiting that `huggingface_hub` puts between."""
    _http.time = SimpleNamespace(sleep=lambda seconds: None)
