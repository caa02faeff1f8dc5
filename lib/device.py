"""The device that a process computes on: the one that Ray granted to it, and no other."""

from __future__ import annotations

import socket

from lib.errors import DeviceError


def granted_gpus() -> list[str] | None:
    """Return the ids of the GPUs that Ray granted to this process; None outside of Ray.

    CUDA's own answer is no grant: Ray leaves all GPUs of a node visible to a process that was
    granted none.
    """
    import ray

    if not ray.is_initialized():
        return None
    return [str(gpu) for gpu in ray.get_gpu_ids()]


def granted_device() -> str:
    """Return `cuda` or `cpu`; outside of Ray, `cuda` where there is one.

    Raises DeviceError if a GPU was granted and can't be used.
    """
    gpus = granted_gpus()
    if gpus == []:
        return "cpu"
    # Imported here: a process that only routes must not pay for it.
    import torch

    if gpus is None or torch.cuda.is_available():
        return "cuda" if torch.cuda.is_available() else "cpu"
    where = f"Ray granted GPU {', '.join(gpus)} of {socket.gethostname()}"
    if torch.version.cuda is None:
        raise DeviceError(
            f"{where}, and the torch installed there is for the CPU alone; install the one "
            "for CUDA, or start Ray there with RAYLINE_NUM_GPUS=0"
        )
    try:
        torch.cuda.init()
        reason = "CUDA finds no device"
    # Of several types, by what is wrong with the driver.
    except Exception as error:
        reason = str(error).split(". ", 1)[0]
    raise DeviceError(
        f"{where}, and it can't be used: {reason}; install there an NVIDIA driver for CUDA "
        f"{torch.version.cuda}, or start Ray there with RAYLINE_NUM_GPUS=0"
    )
