"""The machine that the figures belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from lib import provenance

_FEATURES = {
    "avx2": "avx2",
    "avx512": "avx512f",
    "amx": "amx_tile",
    "bf16": "avx512_bf16",
    "amx_bf16": "amx_bf16",
}
_PACKAGES = (
    "ray",
    "torch",
    "pyarrow",
    "mlflow-skinny",
    "onnxruntime",
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
)


def describe() -> dict[str, Any]:
    """Return processor, memory, commit and versions."""
    fields = _cpuinfo()
    flags = set(fields.get("flags", "").split())
    code = provenance.collect()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": {name: flag in flags for name, flag in _FEATURES.items()},
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "load_average_1_min": os.getloadavg()[0],
        "commit": code.commit,
        "dirty": code.dirty,
        "versions": _versions(),
    }


def markdown(machine: dict[str, Any]) -> str:
    there = [name for name, has in machine["features"].items() if has]
    absent = [name for name, has in machine["features"].items() if not has]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dirty = " with uncommitted changes" if machine["dirty"] else ""
    lines = [
        "## Machine",
        "",
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']:g} GiB RAM, "
        f"{machine['system']}",
        f"- features: {', '.join(there) or 'none'}; not there: {', '.join(absent) or 'none'}",
        f"- commit {machine['commit'] or 'unknown'}{dirty}",
        f"- {versions}",
        f"- load average when the bench began: {machine['load_average_1_min']:.2f}",
        "",
    ]
    return "\n".join(lines)


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package.removesuffix("-skinny")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    wrk = _first_line("wrk", "--version")
    if wrk:
        versions["wrk"] = wrk.split()[1]
    return versions


def _first_line(*command: str) -> str | None:
    try:
        # wrk ends with 1 after its version.
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter((done.stdout or done.stderr).splitlines()), None)
