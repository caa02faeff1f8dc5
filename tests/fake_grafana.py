"""A fake of Grafana's HTTP API, as its documentation describes what we call; not a Grafana.

It knows logins and roles, a data source, folders, and dashboards with versions; it can be told to
fail, and to have someone else come between two calls.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "glsa_token"
LOGIN = ("admin", "pass:word")


@dataclass(slots=True)
class FakeGrafana:
    """What it holds, and what was asked of it."""

    prefix: str = ""
    role: str = "Admin"
    folders: dict[str, dict[str, Any]] = field(default_factory=dict)
    datasources: dict[str, dict[str, Any]] = field(default_factory=dict)
    dashboards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By uid: `dashboard` and `meta`, as GET returns them."""
    writes: list[str] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Status and body of the next answers, whatever is asked."""
    before_write: list[Callable[[], None]] = field(default_factory=list)
    """What someone else does just before each of the next writes."""
    url: str = ""

    def answer(self, method: str, path: str, login: str, body: Any) -> tuple[int, Any]:
        if self.failures:
            return self.failures.pop(0)
        if not path.startswith(f"{self.prefix}/api/"):
            return 404, "<html>not found</html>"
        path = path.removeprefix(f"{self.prefix}/api")
        basic = base64.b64encode(":".join(LOGIN).encode()).decode()
        if login not in (f"Bearer {TOKEN}", f"Basic {basic}"):
            return 401, {"message": "Invalid API key"}
        if method != "GET":
            if self.role != "Admin":
                return 403, {"message": "You'll need additional permissions", "title": "Denied"}
            if self.before_write:
                self.before_write.pop(0)()
            self.writes.append(f"{method} {path}")
        kind, _, rest = path.strip("/").partition("/")
        return getattr(self, f"_{kind}")(method, rest, body)  # type: ignore[no-any-return]

    def _datasources(self, method: str, rest: str, body: Any) -> tuple[int, Any]:
        found = self.datasources.get(rest.removeprefix("uid/"))
        if method == "POST":
            taken = {source["name"] for source in self.datasources.values()}
            if body["name"] in taken or body["uid"] in self.datasources:
                return 409, {"message": "data source with the same name already exists"}
            made = {"id": 7, "orgId": 1, "readOnly": False, "version": 1, **body}
            self.datasources[body["uid"]] = made
            return 200, {"datasource": made, "message": "Datasource added"}
        if found is None:
            return 404, {"message": "Data source not found"}
        if method == "PUT":
            if found["readOnly"]:
                return 403, {"message": "Cannot update read-only data source"}
            if body["version"] != found["version"]:
                return 409, {"message": "Datasource has already been updated by someone else"}
            found.update(body, version=found["version"] + 1)
            return 200, {"datasource": found, "message": "Datasource updated"}
        return 200, found

    def _folders(self, method: str, rest: str, body: Any) -> tuple[int, Any]:
        if method == "POST":
            if body["uid"] in self.folders:
                return 409, {"message": "a folder with the same uid already exists"}
            self.folders[body["uid"]] = {"id": 3, "version": 1, **body}
            return 200, self.folders[body["uid"]]
        if rest not in self.folders:
            return 404, {"message": "folder not found", "status": "not-found"}
        return 200, self.folders[rest]

    def _dashboards(self, method: str, rest: str, body: Any) -> tuple[int, Any]:
        if method == "GET":
            found = self.dashboards.get(rest.removeprefix("uid/"))
            return (200, found) if found else (404, {"message": "Dashboard not found"})
        if body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found", "status": "not-found"}
        model = body["dashboard"]
        there = self.dashboards.get(model["uid"])
        if there and there["meta"]["provisioned"]:
            return 400, {"message": "Cannot save provisioned dashboard"}
        if there and not body["overwrite"] and model["version"] != there["dashboard"]["version"]:
            return 412, {
                "message": "The dashboard has been changed by someone else",
                "status": "version-mismatch",
            }
        for uid, other in self.dashboards.items():
            if uid != model["uid"] and other["dashboard"]["title"] == model["title"]:
                return 412, {
                    "message": "A dashboard with the same name in the folder already exists",
                    "status": "name-exists",
                }
        self.save(model, body["folderUid"])
        return 200, {"uid": model["uid"], "status": "success"}

    def save(self, model: dict[str, Any], folder_uid: str = "", provisioned: bool = False) -> None:
        """Keep a dashboard as the next version."""
        there = self.dashboards.get(model["uid"])
        version = there["dashboard"]["version"] + 1 if there else 1
        meta = {"folderUid": folder_uid, "provisioned": provisioned}
        self.dashboards[model["uid"]] = {
            "dashboard": {**model, "id": 40, "version": version},
            "meta": meta,
        }


def serve(fake: FakeGrafana) -> ThreadingHTTPServer:
    """Start it on a free port of this machine; shut it down when done."""

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or "null")
            login = self.headers.get("Authorization", "")
            status, answer = fake.answer(self.command, self.path, login, body)
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", text)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = do_DELETE = _do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}{fake.prefix}"
    return server
