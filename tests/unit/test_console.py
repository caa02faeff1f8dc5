"""What the gateway serves to browsers, and the JSON that the console draws."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib.serving.keys import add_key
from lib.serving.plan import publish_code
from lib.storage import Storage
from lib.watch.overview import rollout_path, watch_path
from serve_apps.asgi import App
from serve_apps.watching import links
from tests.console_line import write_data_set
from tests.unit.serving_parts import gateway, publish, request

CONSOLE = Path(__file__).resolve().parents[2] / "serve_apps" / "console"


def run(tmp_path: Path, scenario: Callable[[App, Storage], Awaitable[None]]) -> None:
    async def main() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 90, 2: 10})
        await scenario(await gateway(storage), storage)

    asyncio.run(main())


def test_every_file_of_the_pages_is_served_openly_with_its_policy(tmp_path: Path) -> None:
    async def scenario(app: App, storage: Storage) -> None:
        add_key(storage, "day")
        locked = await gateway(storage)
        pages = ["/", "/docs"]
        for page in ("/", "/docs"):
            text = (await request(locked, "GET", page)).body.decode()
            pages += [f"/{path}" for path in re.findall(r'(?:src|href)="([^"#]+\.\w+)"', text)]
        assert "/docs/swagger-ui-bundle.js" in pages
        for path in sorted(set(pages) - {"/openapi.json"}):
            answer = await request(locked, "GET", path)
            assert answer.status == 200, path
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert "text/" in answer.headers["content-type"] or path.endswith(".svg")
        for path in ("/traffic", "/stats", "/watch", "/samples/shapes"):
            assert (await request(locked, "GET", path)).status == 401, path

    run(tmp_path, scenario)


def test_an_unchanged_file_is_not_sent_again(tmp_path: Path) -> None:
    async def scenario(app: App, storage: Storage) -> None:
        first = await request(app, "GET", "/console/console.js")
        assert first.body == (CONSOLE / "console.js").read_bytes()
        for tag in (first.headers["etag"], f"W/{first.headers['etag']}"):
            again = await request(app, "GET", "/console/console.js", b"", {"If-None-Match": tag})
            assert (again.status, again.body) == (304, b"")
            assert "content-length" not in again.headers
            assert again.headers["etag"] == first.headers["etag"]
        other = {"If-None-Match": '"other"'}
        assert (await request(app, "GET", "/console/console.js", b"", other)).status == 200

    run(tmp_path, scenario)


def test_only_files_of_the_console_are_there(tmp_path: Path) -> None:
    async def scenario(app: App, storage: Storage) -> None:
        for path in ("/console/../pages.py", "/console/pages.py", "/console/%2e%2e/asgi.py"):
            assert (await request(app, "GET", path)).status == 404, path
        assert (await request(app, "POST", "/")).status == 405

    run(tmp_path, scenario)


def test_pages_name_no_other_host() -> None:
    for path in CONSOLE.iterdir():
        hosts = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text()))
        assert hosts <= {"http://www.w3.org/2000/svg"}, path.name


def test_the_openapi_document_holds_the_data_and_not_the_pages(tmp_path: Path) -> None:
    async def scenario(app: App, storage: Storage) -> None:
        paths = (await request(app, "GET", "/openapi.json")).json["paths"]
        assert {"/stats", "/watch", "/samples/{model}"} <= set(paths)
        assert not [path for path in paths if path == "/" or path.startswith(("/console", "/docs"))]

    run(tmp_path, scenario)


def test_watch_hands_on_what_jobs_wrote_and_does_without_the_rest(tmp_path: Path) -> None:
    async def scenario(app: App, storage: Storage) -> None:
        nothing = (await request(app, "GET", "/watch")).json["models"]
        assert nothing == {"shapes": {"watch": None, "rollout": None}}
        judged = {"drift": {"score": 0.5}}
        storage.write_json(watch_path("shapes"), judged)
        storage.write(rollout_path("shapes"), b"{half")
        answer = await request(app, "GET", "/watch")
        assert answer.json["models"] == {"shapes": {"watch": judged, "rollout": None}}
        assert (await request(app, "GET", "/stats")).json["versions"] == {}

    run(tmp_path, scenario)


def test_samples_are_test_images_one_a_class(tmp_path: Path) -> None:
    async def scenario(app: App, storage: Storage) -> None:
        assert (await request(app, "GET", "/samples/shapes")).json == {"samples": []}
        images = np.arange(6 * 24, dtype=np.uint8).reshape(6, 4, 6, 1)
        names = ("square", "circle", "star")
        # As the cards of `publish` name it.
        write_data_set(storage, "d" * 32, images, np.array([2, 2, 0, 0, 1, 1]), names)
        other = await gateway(storage)
        samples = (await request(other, "GET", "/samples/shapes")).json["samples"]
        assert [sample["label"] for sample in samples] == list(names)
        found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(s["png"])))) for s in samples]
        for pixels, row in zip(found, (2, 4, 0), strict=True):
            assert np.array_equal(pixels, images[row, :, :, 0])
        assert (await request(other, "GET", "/samples/cats")).status == 404

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, {}),
        ({"MLFLOW_TRACKING_URI": "sqlite:////tmp/a.db"}, {}),
        ({"MLFLOW_TRACKING_URI": "javascript:alert(1)"}, {}),
        ({"MLFLOW_TRACKING_URI": "http://[broken"}, {}),
        ({"MLFLOW_TRACKING_URI": "http://ann:secret@m:5000"}, {"MLflow": "http://m:5000"}),
        ({"RAY_API_SERVER_ADDRESS": "https://h:8265"}, {"Ray dashboard": "https://h:8265"}),
    ],
)
def test_links_are_addresses_that_a_browser_opens(env: Any, expected: Any) -> None:
    assert links(env) == expected


def test_replicas_get_every_file_of_the_console(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    publish_code(storage)
    (archive,) = storage.list("code")
    with zipfile.ZipFile(storage.path(archive)) as content:
        there = set(content.namelist())
    assert {f"serve_apps/console/{path.name}" for path in CONSOLE.iterdir()} <= there
