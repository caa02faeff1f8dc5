"""What `make up` shows at its end: proof that the versions answer, the numbers, the addresses."""

from __future__ import annotations

import json
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from lib.data.manifest import load_manifest
from lib.errors import LineError
from lib.line.layout import Line
from lib.serving.keys import internal_headers
from lib.storage import Storage

_ANSWER_S = 60.0


def write_sample(line: Line, data_digest: str) -> Path:
    """Write the first image of the test split as a PNG, for the curl line; return its path."""
    import pyarrow.parquet as pq
    from PIL import Image

    storage = Storage(line.storage)
    manifest = load_manifest(storage, data_digest)
    shard = next(shard for shard in manifest.shards if shard.split == "test")
    file = pq.ParquetFile(BytesIO(storage.read(shard.path)))
    pixels = file.read_row_group(0, columns=["image"])["image"][0].as_py()
    mode = "L" if manifest.channels == 1 else "RGB"
    picture = Image.frombytes(mode, (manifest.width, manifest.height), pixels)
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    path = line.home / "sample.png"
    path.write_bytes(buffer.getvalue())
    return path


def await_versions(line: Line, model: str, versions: Sequence[str], sample: Path) -> None:
    """Wait until each version, pinned, answers over HTTP by its own number.

    Raises:
        LineError: A version does not answer within a minute, with what it said instead.
    """
    deadline = time.monotonic() + _ANSWER_S
    for version in versions:
        while (said := _ask(line, model, version, sample)) != "":
            if time.monotonic() > deadline:
                raise LineError(
                    f"{model} version {version} does not answer at {line.serve_url}: {said}; "
                    f"see {line.dashboard_url}/#/serve"
                )
            time.sleep(0.3)


def predict_url(line: Line, model: str) -> str:
    """Return where a model answers: short for the first one deployed, by name for the others."""
    try:
        with urllib.request.urlopen(f"{line.serve_url}/traffic", timeout=10) as response:
            is_default = json.load(response).get("default_model") == model
    except (OSError, ValueError):
        is_default = False
    return f"{line.serve_url}/predict" + ("" if is_default else f"/{model}")


def write_report(line: Line, result: Mapping[str, Any]) -> Path:
    """Write what a pipeline that did not deploy has found, as Markdown; return its path."""

    def percent(name: str) -> str:
        return f"{100 * float(result[name]):.2f} %"

    rows = {
        "model": result["model"],
        "data": f"`{str(result['data_digest'])[:12]}`, {int(result['num_images']):,} images",
        "search": f"{result['num_trials']} trials, run `{result['sweep_run_id']}`"
        + (", of an earlier run" if result["sweep_reused"] else ""),
        "registered": ", ".join(f"version {n}" for n in result["registered"]) or "nothing new",
        "champion": f"version {result['champion']}: {percent('test_accuracy')} on test, "
        f"{percent('val_accuracy')} on validation",
        "time": f"{float(result['seconds']['total']):.0f} s",
    }
    lines = ["### Rayline: training", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    path = line.home / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def text(line: Line, result: Mapping[str, Any], sample: Path, *, seconds: float) -> str:
    """Return the summary of a line that is up."""
    model = str(result["model"])
    predict = predict_url(line, model)
    reused = [
        name
        for name, was in (
            ("data set", result["data_reused"]),
            ("search", result["sweep_reused"]),
        )
        if was
    ]
    weights = ", ".join(f"version {v} {float(w):g} %" for v, w in result["weights"].items())
    rows = [
        ("data", f"{result['num_images']:,} images, data set {result['data_digest'][:12]}"),
        ("search", f"{result['num_trials']} trials, sweep {result['sweep_run_id']}"),
        (
            "champion",
            f"{model} version {result['champion']}: {100 * result['test_accuracy']:.2f} % on test "
            f"({100 * result['val_accuracy']:.2f} % on validation, by which it was chosen)",
        ),
        ("traffic", weights),
        ("time", f"{seconds:.0f} s" + (f", reused: {', '.join(reused)}" if reused else "")),
        ("", ""),
        ("predict", predict),
        ("console", line.serve_url),
        ("docs", f"{line.serve_url}/docs"),
        ("Ray dashboard", line.dashboard_url),
        ("MLflow", line.tracking_uri),
        ("storage", line.storage),
    ]
    if line.ray_url is None:
        token = shlex.quote(str(line.home / "auth_token"))
        rows.insert(10, ("", f"its token: cat {token}"))
        if (line.home / "prometheus").exists():
            rows.insert(-1, ("Prometheus", f"http://127.0.0.1:{line.ports['prometheus']}"))
    curl = f"curl -H 'Content-Type: image/png' --data-binary @{shlex.quote(str(sample))} {predict}"
    env = shlex.quote(str(line.home / "env"))
    return "\n".join(
        [
            "",
            "The line is up.",
            *(f"  {name:<14} {value}".rstrip() for name, value in rows),
            "",
            "Ask it:",
            f"  {curl}",
            f"Use ray, serve and the jobs in your shell: . {env}",
            "End it: make down",
        ]
    )


def _ask(line: Line, model: str, version: str, sample: Path) -> str:
    """Return an empty string if the version answered, else what came instead."""
    own = internal_headers(Storage(line.storage))
    request = urllib.request.Request(
        f"{line.serve_url}/predict/{model}",
        data=sample.read_bytes(),
        headers={"Content-Type": "image/png", "X-Model-Version": version, **own},
    )
    try:
        with urllib.request.urlopen(request, timeout=15) as response:
            got = response.headers.get("X-Model-Version")
            return "" if got == version else f"version {got} answered"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read()[:300].decode(errors='replace')}"
    except OSError as error:
        return str(error)
