"""The part of the Hugging Face Hub's HTTP interface that uploads need, on the loopback; files are kept in memory."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"
OWNER = "me"


class Hub(ThreadingHTTPServer):
    """A hub with one user, OWNER, who writes with TOKEN.

    Attributes:
        private: whether each repository is private.
        files: of each repository, by path.
        stored: large files by their SHA-256.
        fails: a part of a path, requests for which are answered with 500.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        self.fails = ""

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """A hub that listens until the end of the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer(200, {})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            known = self.headers.get("authorization") == f"Bearer {TOKEN}"
            return self._answer(200 if known else 401, {"name": OWNER, "type": "user"} if known else {"error": "no"})
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)((?:/revision/|/tree/)main)?", path):
            repo, part = found[1], found[2] or ""
            if repo not in self.server.private:
                return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            files = self.server.files[repo]
            if part.startswith("/tree"):
                entries = [{"type": "file", "path": name, "size": len(x), "oid": _oid(x)} for name, x in files.items()]
                return self._answer(200, entries)
            siblings = [{"rfilename": name} for name in files]
            about = {"id": repo, "private": self.server.private[repo], "siblings": siblings, "sha": "0" * 40}
            return self._answer(200, about)
        return self._answer(404, {"error": f"no path {path}"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.server.fails and self.server.fails in self.path:
            return self._answer(500, {"error": "the disk is full"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != OWNER:
                return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            self.server.private[repo] = asked.get("visibility", "private" * asked.get("private", False)) == "private"
            self.server.files[repo] = {".gitattributes": b"*.safetensors filter=lfs"}
            return self._answer(200, {"url": f"{self.server.address}/{repo}", "name": repo})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        repo = re.search(r"/(\w+/[\w.-]+?)(?:\.git/info/|/preupload/|/commit/)", self.path)[1]  # type: ignore[index]
        if "/preupload/" in self.path:
            modes = [{"path": file["path"], "shouldIgnore": False} for file in json.loads(body)["files"]]
            for mode in modes:
                mode["uploadMode"] = "lfs" if mode["path"].endswith(".safetensors") else "regular"
            return self._answer(200, {"files": modes})
        if self.path.endswith("/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.server.address}/store/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        self._commit(self.server.files[repo], [json.loads(line) for line in body.splitlines()])
        return self._answer(200, {"commitUrl": f"{self.server.address}/{repo}/commit/1", "commitOid": "1" * 40})

    def _commit(self, files: dict[str, bytes], operations: list[Any]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]

    def do_PUT(self) -> None:
        content, oid = self.rfile.read(int(self.headers["content-length"])), self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.stored[oid] = content
        self._answer(200, {})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
