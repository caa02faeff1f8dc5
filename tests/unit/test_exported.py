"""The latency that a search can be for: of the net as it is exported."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.storage import Storage
from lib.train import exported
from lib.train.experiment import MAXIMIZE, Objective
from lib.train.exported import exported_latency_ms
from lib.train.model import ModelConfig
from lib.train.trainable import Desk
from lib.train.trial import Trial


def net(
    stage_width: int, shape: tuple[int, int, int] = (9, 12, 1), num_views: int = 1
) -> ModelConfig:
    height, width, channels = shape
    return ModelConfig(
        height=height,
        width=width,
        channels=channels,
        num_classes=3,
        stage_width=stage_width,
        depth=1,
        num_views=num_views,
        pixel_mean=(0.1,) * channels,
        pixel_std=(0.3,) * channels,
    )


@pytest.mark.parametrize(
    ("shape", "num_views"), [((28, 28, 1), 1), ((28, 28, 1), 3), ((9, 12, 3), 1)]
)
def test_a_net_of_any_shape_is_exported_and_answers_one_image(
    shape: tuple[int, int, int], num_views: int
) -> None:
    assert 0 < exported_latency_ms(net(4, shape, num_views)) < 1000


def test_the_latency_is_the_least_of_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is a stand-in: two of three calls take 100 ms by it, for another process ran."""
    clock = itertools.accumulate(itertools.cycle([1.0, 0.1, 1.0, 0.003, 1.0, 0.1]))
    monkeypatch.setattr(exported, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert exported_latency_ms(net(4)) == pytest.approx(3.0)


def test_equal_nets_have_the_same_latency_in_all_processes_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[ModelConfig] = []

    def measure(config: ModelConfig) -> float:
        measured.append(config)
        return float(len(measured))

    monkeypatch.setattr("lib.train.trial.exported_latency_ms", measure)
    objective = Objective(metric="val_accuracy", goal=MAXIMIZE)
    found = []
    for width in (4, 8, 4, 8):
        trial: Any = object.__new__(Trial)  # Of a process of its own.
        trial._desk = Desk(
            storage=Storage(str(tmp_path)), folder="sweeps/s/trials", objectives=(objective,)
        )
        found.append(trial._latency_ms(net(width)))
    assert found == [1.0, 2.0, 1.0, 2.0]
    assert measured == [net(4), net(8)]
