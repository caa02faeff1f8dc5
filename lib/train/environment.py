"""What the bits of a trained net depend on beside code, data and configuration."""

from __future__ import annotations

import functools
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "pyarrow")
"""All that training imports."""
_VECTOR_UNITS = ("sse4", "avx", "fma", "amx", "neon", "asimd", "sve")


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the environment of training in this process, as JSON types.

    Kept in every checkpoint: the process that trained may have run on another machine than the
    one that recorded the sweep.
    """
    place = torch.device(device)
    return {
        **_machine(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "num_threads": torch.get_num_threads(),
        **(_cuda() if place.type == "cuda" else {}),
    }


def differences(recorded: dict[str, Any], present: dict[str, Any]) -> dict[str, str]:
    """Return what differs, as `recorded → present`; what was never recorded is no difference."""
    return {
        name: f"{recorded[name]} → {present.get(name)}"
        for name in sorted(recorded)
        if recorded[name] != present.get(name)
    }


def _cuda() -> dict[str, Any]:
    """Return the versions that decide which kernels run, and how."""
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d[\d.]*", driver.read_text()) if driver.exists() else None
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_driver": found[0] if found else None,
    }


@functools.cache
def _machine() -> dict[str, str]:
    cpu = _cpuinfo()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "python": platform.python_version(),
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        # The name alone does not tell: virtual machines hide or rename what the processor can do.
        "vector_units": " ".join(sorted(f for f in flags if f.startswith(_VECTOR_UNITS))),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in PACKAGES},
    }


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entries where the system lists them."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    lines = file.read_text().split("\n\n", 1)[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}
