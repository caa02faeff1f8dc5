"""The prediction log of a live line: complete, bounded in what a kill loses, joined with labels."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import requests

from lib.config import Settings
from lib.serving.client import ServeClient
from lib.storage import Storage
from lib.watch.predictions import joined, read
from lib.watch.recorder import _TICK_S, FLUSH_EVERY_S
from lib.watch.segments import MAX_US
from tests.data_sources import mnist
from tests.e2e.clients import post_all, until
from tests.e2e.conftest import LiveLine
from tests.e2e.test_serving import replicas

TIMEOUT_S = 60
FLUSHED_AFTER_S = FLUSH_EVERY_S + _TICK_S + 1.0
"""Until an answer is on disk, with a second for the flush itself."""


@pytest.fixture(scope="module")
def storage(line: LiveLine) -> Storage:
    return Storage(line.storage)


@pytest.fixture(scope="module")
def serve_api(line: LiveLine) -> ServeClient:
    os.environ.update(line.env)
    return ServeClient(Settings.from_env(line.env))


@pytest.fixture(scope="module")
def images_NHW() -> npt.NDArray[np.uint8]:
    return np.asarray(mnist("test")[0][:120], np.uint8)


def ask(
    line: LiveLine, images_NHW: npt.NDArray[np.uint8], headers: Callable[[int], dict[str, str]]
) -> dict[str, Any]:
    """Send each image once; return the answers by request id."""
    bodies = [(image.tobytes(), headers(number)) for number, image in enumerate(images_NHW)]
    answers = post_all(line.url, bodies)
    assert [answer for answer in answers if isinstance(answer, str)] == []
    return {answer["request_id"]: answer for answer in answers}


def logged(storage: Storage, line: LiveLine, request_ids: set[str], **options: Any) -> pa.Table:
    """Return the rows of some requests."""
    rows = joined(storage, line.model, start_us=0, end_us=MAX_US, **options)
    mine = pa.array([name in request_ids for name in rows["request_id"].to_pylist()], pa.bool_())
    return rows.filter(mine)


def test_every_answer_of_every_gateway_and_version_is_logged(
    line: LiveLine, storage: Storage, images_NHW: npt.NDArray[np.uint8]
) -> None:
    traffic = requests.get(f"{line.url}/traffic", timeout=TIMEOUT_S).json()
    versions = list(traffic["models"][line.model]["bundles"])
    answers = ask(
        line, images_NHW, lambda number: {"X-Model-Version": versions[number % len(versions)]}
    )
    names = set(answers)
    until(
        lambda: logged(storage, line, names, columns=["request_id"]).num_rows == len(names),
        deadline_s=FLUSH_EVERY_S + 20,
        what="a row for every answer",
    )
    pixels = {image.tobytes() for image in images_NHW}
    for row in logged(storage, line, names).to_pylist():
        answer = answers[row["request_id"]]
        assert (row["version"], row["predicted"]) == (answer["model_version"], answer["digit"])
        assert row["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-6)
        assert (row["status"], row["caller"], row["shadow"]) == (200, "anyone", False)
        assert 0 < row["latency_ms"] < 60_000
        assert row["image"] in pixels
        assert len(row["features"]) >= 49


def test_labels_given_over_http_are_joined(
    line: LiveLine, storage: Storage, images_NHW: npt.NDArray[np.uint8]
) -> None:
    names = set(ask(line, images_NHW[:20], lambda number: {}))
    for label, wanted in (("3", names), (4, list(names)[:5])):
        for name in wanted:
            body = {"request_id": name, "label": label}
            answer = requests.post(f"{line.url}/feedback", json=body, timeout=TIMEOUT_S)
            assert (answer.status_code, answer.json()["known"]) == (200, True), answer.text
    until(
        lambda: logged(storage, line, names, columns=["request_id"]).num_rows == len(names),
        what="the answers in the log",
    )
    labels = logged(storage, line, names, columns=["request_id"])["label"].to_pylist()
    assert sorted(labels) == [*15 * [3], *5 * [4]]


def test_a_batch_is_a_row_for_each_image(line: LiveLine, storage: Storage) -> None:
    name = f"batch-{uuid.uuid4().hex}"
    tensor = {"name": "images", "datatype": "UINT8", "shape": [3, 28, 28, 1]}
    body = {"inputs": [{**tensor, "data": [7] * (3 * 28 * 28)}]}
    url = f"{line.url}/v2/models/{line.model}/infer"
    answer = requests.post(url, json=body, headers={"X-Request-Id": name}, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    columns = ["request_id", "index"]
    until(
        lambda: logged(storage, line, {name}, columns=columns)["index"].to_pylist() == [0, 1, 2],
        what="three rows of the batch",
    )


def test_a_killed_gateway_loses_at_most_the_bound(
    line: LiveLine,
    storage: Storage,
    serve_api: ServeClient,
    images_NHW: npt.NDArray[np.uint8],
) -> None:
    until(lambda: len(replicas(serve_api, "gateway")) >= 2, what="two gateways")
    before = replicas(serve_api, "gateway")
    safe, at_risk = set(ask(line, images_NHW, lambda number: {})), set[str]()
    until(
        lambda: logged(storage, line, safe, columns=["request_id"]).num_rows == len(safe),
        what="the answers before in the log",
    )
    # One after another, so that some are older than a flush when the gateway dies, and some not.
    answered: list[tuple[float, set[str]]] = []
    while not answered or answered[-1][0] < answered[0][0] + 2 * FLUSHED_AFTER_S:
        names = set(ask(line, images_NHW[:20], lambda number: {}))
        answered.append((time.monotonic(), names))
    flushed_before_s = time.monotonic() - FLUSHED_AFTER_S
    os.kill(next(iter(before.values())), signal.SIGKILL)
    until(
        lambda: len(set(replicas(serve_api, "gateway")) - set(before)) >= 1,
        what="a gateway in its place",
    )
    after = set(ask(line, images_NHW[:50], lambda number: {}))
    until(
        lambda: logged(storage, line, after, columns=["request_id"]).num_rows == len(after),
        what="the answers after it in the log",
    )
    # Nothing that was on disk, or due there, is lost; of the rest only what the killed one had not
    # flushed, and not what the other one answered meanwhile.
    for answered_s, names in answered:
        (safe if answered_s < flushed_before_s else at_risk).update(names)
    assert len(safe) > len(images_NHW)
    assert logged(storage, line, safe, columns=["request_id"]).num_rows == len(safe)
    lost = len(at_risk) - logged(storage, line, at_risk, columns=["request_id"]).num_rows
    assert 0 <= lost < len(at_risk)
    print(json.dumps({"answered_before_the_kill": len(at_risk), "lost_from_the_log": lost}))


def test_the_log_is_counted_in_the_metrics(line: LiveLine) -> None:
    def written() -> bool:
        text = requests.get(line.metrics_url, timeout=TIMEOUT_S).text
        return any(
            found.startswith("ray_rayline_logged_predictions_total")
            and 'result="written"' in found
            and float(found.rsplit(" ", 1)[1]) > 0
            for found in text.splitlines()
        )

    # Ray hands its metrics on every ten seconds.
    until(written, what="the count of rows in the metrics")


def test_the_log_is_few_files(line: LiveLine, storage: Storage) -> None:
    files = storage.list(f"predictions/{line.model}", recursive=True)
    rows = read(storage, line.model, start_us=0, end_us=MAX_US, columns=["request_id"])
    spans = {path.rpartition("/")[2].partition("-")[0] for path in files}
    writers = {path.split("-")[-2] for path in files}
    assert rows.num_rows > 400
    assert len(files) <= len(writers) * (len(spans) + rows.num_rows // 4096)


def test_the_monitor_looks_at_the_log_and_the_report_shows_what_it_saw(
    line: LiveLine, tmp_path: Path
) -> None:
    # One image again and again is no traffic like the training data.
    body = np.asarray(mnist("test")[0][0], np.uint8).tobytes()
    answers = post_all(line.url, [(body, {})] * 300)
    assert all(isinstance(answer, dict) for answer in answers)

    def seen() -> bool:
        looked = line.run("jobs.monitor", "--once")
        assert looked.returncode == 0, looked.stdout[-3000:] + looked.stderr
        state = json.loads(looked.stdout.splitlines()[-1])
        return bool(state.get("drift"))

    until(seen, deadline_s=TIMEOUT_S, what="a window of requests that the monitor tested")
    page = tmp_path / "report.html"
    made = line.run("jobs.report", "champion", "--out", str(page))
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr
    result = json.loads(made.stdout.splitlines()[-1])
    text = page.read_text()
    assert "Moved in the newest window: " in text
    assert "ML Test Score" in text
    checks = {check["id"]: check for check in result["checks"]}
    assert checks["monitor-inputs"]["found"].startswith("newest window: p = ")
