"""The line as a user works with it: up again, own pictures, jobs through Ray, and bad input."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import requests
from PIL import Image

from lib.line.layout import PROJECT_ROOT
from tests import programs
from tests.data_sources import mnist
from tests.e2e.conftest import LiveLine

TIMEOUT_S = 60
CLASSES = {0: "ring", 1: "stroke", 7: "hook"}
PER_CLASS = 160


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """A picture of another size than MNIST's, in colour, made of a real digit."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").resize((24, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def digits_of(label: int, first: int, count: int) -> list[bytes]:
    images, labels = mnist("train")
    return [png(image) for image in images[labels == label][first : first + count]]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures") / "My Shapes"
    for label, name in CLASSES.items():
        (root / name).mkdir(parents=True)
        for index, picture in enumerate(digits_of(label, 0, PER_CLASS)):
            (root / name / f"{index}.png").write_bytes(picture)
    return root


def last_json(output: str) -> Any:
    return json.loads(output.strip().splitlines()[-1])


def test_up_says_what_it_did_and_where_everything_is(line: LiveLine) -> None:
    places = ("predict", "console", "docs", "Ray dashboard", "MLflow")
    for expected in ("champion", "on test", *places, "curl"):
        assert expected in line.up_output
    programs.require("curl")
    curl = next(text.strip() for text in line.up_output.splitlines() if text.strip()[:5] == "curl ")
    pasted = subprocess.run(["bash", "-c", f"{curl} --fail -s"], capture_output=True, check=True)
    assert json.loads(pasted.stdout)["label"] in "0123456789"


def test_the_console_shows_what_the_gateways_count(line: LiveLine) -> None:
    page = requests.get(line.url, timeout=TIMEOUT_S)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    known = {"If-None-Match": page.headers["ETag"]}
    assert requests.get(line.url, headers=known, timeout=TIMEOUT_S).status_code == 304
    watch = requests.get(f"{line.url}/watch", timeout=TIMEOUT_S).json()
    assert line.model in watch["models"]
    samples = requests.get(f"{line.url}/samples/{line.model}", timeout=TIMEOUT_S).json()["samples"]
    assert [sample["label"] for sample in samples] == list("0123456789")
    body = base64.b64decode(samples[0]["png"])
    answered = [requests.post(f"{line.url}/predict", body, timeout=TIMEOUT_S) for _ in range(20)]
    assert all(answer.ok for answer in answered)
    deadline = time.monotonic() + TIMEOUT_S
    counted = 0
    while counted < len(answered):
        assert time.monotonic() < deadline, "gateways report every few seconds"
        time.sleep(0.5)
        versions = requests.get(f"{line.url}/stats", timeout=TIMEOUT_S).json()["versions"]
        counted = sum(version["statuses"].get("200", 0) for version in versions.values())


def test_the_champion_comes_out_identical_from_its_record(line: LiveLine) -> None:
    again = line.run("jobs.reproduce", "champion")
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr
    verdict = last_json(again.stdout)
    assert verdict["verdict"] == "identical"
    assert verdict["code"].startswith("commit ")
    assert verdict["environment"] == {}
    assert "epoch 1 of" in again.stdout


def test_up_again_repeats_nothing_that_is_done(line: LiveLine) -> None:
    before = {process.pid for process in line.processes()}
    traffic = requests.get(f"{line.url}/traffic", timeout=TIMEOUT_S).json()
    again = line.run("jobs.up", "--data", str(line.data), "--preset", "smoke", "--model", "digits")
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr
    assert "reused: data set, search" in again.stdout
    assert "was done before" in again.stdout
    mains = {process.pid for process in line.processes()}
    # Workers come and go; whatever served before still does.
    assert len(before & mains) > 5
    after = requests.get(f"{line.url}/traffic", timeout=TIMEOUT_S).json()
    assert after["generation"] == traffic["generation"]


def test_a_folder_of_pictures_becomes_a_model_with_its_own_labels(
    line: LiveLine, shapes: Path
) -> None:
    up = line.run("jobs.up", "--data", str(shapes), "--preset", "smoke")
    assert up.returncode == 0, up.stdout[-6000:] + up.stderr
    assert f"{line.url}/predict/my-shapes" in up.stdout
    right = 0
    for label, name in CLASSES.items():
        for picture in digits_of(label, PER_CLASS, 20):
            answer = requests.post(
                f"{line.url}/predict/my-shapes",
                picture,
                headers={"Content-Type": "image/png"},
                timeout=TIMEOUT_S,
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "my-shapes"
            right += answer.json()["label"] == name
    assert right > 0.8 * 20 * len(CLASSES)
    # The first model still answers where no model is named.
    metadata = requests.get(f"{line.url}/traffic", timeout=TIMEOUT_S).json()
    assert metadata["default_model"] == "digits"


def test_score_writes_a_prediction_for_every_picture(
    line: LiveLine, tmp_path: Path, shapes: Path
) -> None:
    pictures = tmp_path / "photos"
    pictures.mkdir()
    images, labels = mnist("test")
    for index in range(50):
        Image.fromarray(images[index]).save(pictures / f"{index:02}.png")
    (pictures / "99.png").write_bytes(b"no picture")
    command = ["jobs.submit", "score", "--input", str(pictures), "--output", str(tmp_path / "out")]
    scored = line.run(*command)
    assert scored.returncode == 0, scored.stdout[-4000:] + scored.stderr
    rows = pq.read_table(tmp_path / "out", partitioning=None).to_pylist()
    by_name = {os.path.basename(row["path"]): row for row in rows}
    assert len(by_name) == 51
    assert by_name["99.png"]["error"]
    right = sum(by_name[f"{i:02}.png"]["label"] == str(labels[i]) for i in range(50))
    assert right >= 40
    again = line.run(*command)
    assert again.returncode == 0
    assert pq.read_table(tmp_path / "out", partitioning=None).num_rows == 51


def test_a_bad_source_ends_the_job_with_what_to_do_and_nothing_half_done(
    line: LiveLine, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in line.data.iterdir():
        content = file.read_bytes()
        cut = "train-images" in file.name
        (broken / file.name).write_bytes(content[:-1000] if cut else content)
    sets = sorted((Path(line.storage) / "data" / "sets").iterdir())
    submit = '. "$1/env" && ray job submit --working-dir . -- python -m jobs.ingest --source "$2"'
    job = subprocess.run(
        ["bash", "-c", submit, "bash", str(line.home), str(broken)],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert job.returncode != 0
    assert "train-images-idx3-ubyte" in job.stdout
    assert "truncated" in job.stdout
    assert "Traceback" not in job.stdout
    assert sorted((Path(line.storage) / "data" / "sets").iterdir()) == sets
