"""Which device a process takes. No GPU is here: torch.cuda and Ray's grant are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lib import device
from lib.device import granted_device
from lib.errors import DeviceError
from lib.train.environment import describe
from lib.train.trial import Trial

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update it."


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A node as torch and Ray see it."""

    def set_up(*, granted: list[str] | None, usable: bool, cuda: str | None = "13.0") -> None:
        def init() -> None:
            if not usable:
                raise RuntimeError(TOO_OLD)

        monkeypatch.setattr(device, "granted_gpus", lambda: granted)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return set_up


@pytest.mark.parametrize(
    ("granted", "usable", "expected"),
    [
        ([], True, "cpu"),  # A GPU is there, and somebody else's.
        ([], False, "cpu"),
        (["3"], True, "cuda"),
        (None, True, "cuda"),  # Outside of Ray.
        (None, False, "cpu"),
    ],
)
def test_a_process_takes_what_it_was_granted(
    node: Callable[..., None], granted: list[str] | None, usable: bool, expected: str
) -> None:
    node(granted=granted, usable=usable)
    assert granted_device() == expected


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        ("13.0", r"granted GPU 3 of .*driver on your system is too old.*driver for CUDA 13\.0"),
        (None, "granted GPU 3 of .*for the CPU alone; install the one for CUDA"),
    ],
)
def test_a_granted_gpu_that_cannot_be_used_is_an_error(
    node: Callable[..., None], cuda: str | None, message: str
) -> None:
    node(granted=["3"], usable=False, cuda=cuda)
    with pytest.raises(DeviceError, match=message):
        granted_device()


@pytest.mark.parametrize(
    ("error", "sticky", "ends"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access", 700), True, True),
        (torch.OutOfMemoryError("CUDA out of memory"), False, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False, True),
        (RuntimeError("whatever it is, the device answers no more"), True, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (ValueError("stage_width=0"), False, False),
    ],
)
def test_an_error_of_cuda_ends_the_process_and_any_other_the_trial(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sticky: bool, ends: bool
) -> None:
    def synchronize() -> None:
        if sticky:
            raise RuntimeError("CUDA error")

    trial: Any = object.__new__(Trial)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    trial._device = torch.device("cuda")
    assert trial.ends_process(error) is ends
    trial._device = torch.device("cpu")
    assert not trial.ends_process(error)


def test_the_environment_of_a_gpu_names_what_decides_its_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "a GPU")
    on_gpu, on_cpu = describe("cuda"), describe("cpu")
    assert on_gpu["device"] == "a GPU"
    assert set(on_gpu) - set(on_cpu) == {"cuda", "cudnn", "nvidia_driver"}
    assert on_gpu["cuda"] == torch.version.cuda
