"""What somebody who operates a live line finds in its log and at /metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import requests

from lib.line.layout import Line
from tests.data_sources import mnist
from tests.e2e.clients import RAW, until
from tests.e2e.conftest import MODEL, LiveLine


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    files = folder.glob(f"{kind}-*.jsonl")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def ask(line: LiveLine, **headers: str) -> requests.Response:
    image = mnist("test")[0][0].tobytes()
    answer = requests.post(
        f"{line.url}/predict", data=image, headers={**RAW, **headers}, timeout=30
    )
    assert answer.ok
    return answer


def test_gateways_write_counts_and_causes_while_they_run(line: LiveLine) -> None:
    folder = Line.from_env(line.env).logs / "serve"
    ask(line)
    until(
        lambda: any(f"to {MODEL} version" in row["message"] for row in lines(folder, "gateway")),
        what="a line with counts",
    )
    assert all(row["time"] and row["level"] and row["logger"] for row in lines(folder, "gateway"))


def test_metrics_of_a_gateway_are_at_the_callers_address(line: LiveLine) -> None:
    ask(line)

    def counted() -> bool:
        text = requests.get(f"{line.url}/metrics", timeout=30).text
        return any(
            row.startswith('rayline_request_latency_seconds_bucket{gateway="')
            and f'model="{MODEL}"' in row
            and 'le="0.0001"' in row
            for row in text.splitlines()
        )

    # Each answer is one gateway's: another one may have answered the image.
    until(counted, what="the histogram")


def test_a_callers_trace_comes_back_through_the_whole_line(line: LiveLine) -> None:
    given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert ask(line, traceparent=given).headers["traceparent"] == given
    assert "traceparent" not in ask(line, traceparent="nonsense").headers
