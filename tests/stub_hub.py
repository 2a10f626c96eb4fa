"""A model hub on loopback, for tests of everything that downloads."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class StubHub:
    """A hub on loopback: datasets and models by name, each a mapping of revision to files by name; logs requests."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        self.datasets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        self.requests.append(f"{handler.command} {path}")
        if self.status != 200:
            return self.send(handler, self.status, b"", {})
        if path.startswith("/api/"):
            kind, _, rest = path.removeprefix("/api/").partition("/")
            repo, _, revision = rest.partition("/revision/")
            if "/tree/" in repo:
                files = self.models[repo.partition("/tree/")[0]]["main"]
                tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
                return self.send(handler, 200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            return self.describe(handler, self.datasets if kind == "datasets" else self.models, repo, unquote(revision))
        repos = self.datasets if path.startswith("/datasets/") else self.models
        repo, _, rest = path.removeprefix("/datasets/").lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        revision = "main" if revision == self.COMMIT and "main" in repos[repo] else unquote(revision)
        body = repos[repo][revision][name]
        return self.send(handler, 200, body, {"ETag": f'"{name.encode().hex()}"', "X-Repo-Commit": self.COMMIT})

    def describe(
        self, handler: BaseHTTPRequestHandler, repos: dict[str, dict[str, dict[str, bytes]]], repo: str, revision: str
    ) -> None:
        files = repos.get(repo, {}).get(revision or "main")
        if files is None:
            code = "RevisionNotFound" if repo in repos else "RepoNotFound"
            return self.send(handler, 404, b"", {"X-Error-Code": code})
        siblings = [{"rfilename": name} for name in files]
        body = json.dumps({"id": repo, "sha": self.COMMIT, "siblings": siblings}).encode()
        return self.send(handler, 200, body, {"Content-Type": "application/json"})

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
