"""wrk, the load generator in C: runs it and reads what it measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import BenchError

_TIMEOUT_S = 30
# `summary.errors.status` counts answers above 399; latencies are in microseconds.
_SCRIPT = """
local file = io.open(os.getenv("BENCH_BODY"), "rb")
wrk.method = "POST"
wrk.body = file:read("*all")
wrk.headers["Content-Type"] = os.getenv("BENCH_TYPE")
file:close()
local mean_ms = tonumber(os.getenv("BENCH_DELAY_MS"))
if mean_ms > 0 then
  -- Questions come as if from many people who know nothing of each other.
  delay = function() return -math.log(1 - math.random()) * mean_ms end
end
if os.getenv("BENCH_HEEDS_RETRY_AFTER") == "1" then
  -- Who is refused asks again when the answer says. wrk asks for the delay of a connection some
  -- time after its answer, without saying which it was: so many as were refused wait.
  local refused_s = {}
  response = function(status, headers)
    if status == 503 then table.insert(refused_s, tonumber(headers["retry-after"])) end
  end
  delay = function() return 1000 * (table.remove(refused_s) or 0) end
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "max_us": %d, ' ..
    '"bad_status": %d, "connect": %d, "read": %d, "write": %d, "timeout": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    latency.max, e.status, e.connect, e.read, e.write, e.timeout))
end
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one run of wrk measured."""

    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float


def require() -> None:
    """Raise BenchError with the install line if wrk is not there."""
    if shutil.which("wrk") is None:
        raise BenchError("wrk, which makes the load, is not installed: apt-get install wrk")


def post(
    url: str,
    body_file: Path,
    *,
    connections: int,
    seconds: float,
    content_type: str = "application/octet-stream",
    rate_per_s: float | None = None,
    refusals_allowed: bool = False,
    heeds_retry_after: bool = False,
    may_be_empty: bool = False,
) -> Load:
    """Post a file from one thread and so many keep-alive connections.

    With a rate, every connection waits a random time (exponential) before it asks again, so that
    all together ask that often as long as answers are quick; else it asks at once.

    Raises BenchError if one request failed: a server that refuses quickly must not look fast.
    With `refusals_allowed` answers above 399 count as answers, for loads that are there to be
    refused; with `heeds_retry_after` who is refused waits as long as the answer says.
    `may_be_empty` is for a warm-up, which a slow server may not answer in time.
    """
    script = body_file.with_suffix(".lua")
    if not script.exists():
        script.write_text(_SCRIPT)
    duration_s = max(1, round(seconds))
    done = subprocess.run(
        [
            *("wrk", "-t1", f"-c{connections}", f"-d{duration_s}s"),
            # Slow is a figure, no failure: the default counts answers after 2 s as errors.
            *("--timeout", f"{_TIMEOUT_S}s", "-s", str(script), url),
        ],
        env={
            "BENCH_BODY": str(body_file),
            "BENCH_TYPE": content_type,
            "BENCH_DELAY_MS": str(1000 * connections / rate_per_s if rate_per_s else 0),
            "BENCH_HEEDS_RETRY_AFTER": str(int(heeds_retry_after)),
            "PATH": "/usr/bin:/bin:/usr/local/bin",
        },
        executable=shutil.which("wrk"),
        capture_output=True,
        text=True,
        timeout=duration_s + 2 * _TIMEOUT_S,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not found:
        raise BenchError(f"wrk failed at {url}: {(done.stderr or done.stdout)[-1000:]}")
    result = json.loads(found[0].removeprefix("RESULT "))
    errors = {
        name: result[name]
        for name in ("bad_status", "connect", "read", "write", "timeout")
        if result[name] and not (refusals_allowed and name == "bad_status")
    }
    if errors or not (result["requests"] or may_be_empty):
        raise BenchError(
            f"{url} at {connections} connections: {result['requests']} requests, errors {errors}; "
            "figures with failed requests count for nothing"
        )
    return Load(
        requests=result["requests"],
        requests_per_s=result["requests"] / (result["duration_us"] / 1e6),
        p50_ms=result["p50_us"] / 1e3,
        p99_ms=result["p99_us"] / 1e3,
        max_ms=result["max_us"] / 1e3,
    )
