from __future__ import annotations

import itertools

import pytest

from lib.config import PRESETS, Preset
from lib.errors import ConfigError
from lib.train.experiment import MAXIMIZE, MINIMIZE
from lib.train.model import ConvNet, ModelConfig
from lib.train.presets import preset_experiment


def num_parameters(stage_width: int, depth: int, growth: int) -> int:
    """Of the net for MNIST."""
    model = ModelConfig(
        height=28,
        width=28,
        channels=1,
        num_classes=10,
        stage_width=stage_width,
        depth=depth,
        growth=growth,
        pixel_mean=(0.13,),
        pixel_std=(0.31,),
    )
    return ConvNet(model).num_parameters()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_first_guesses_lie_in_the_space_that_is_searched(preset: Preset) -> None:
    allowed = {
        "stage_width": lambda value: value in preset.widths,
        "depth": lambda value: value in preset.depths,
        "growth": lambda value: value in preset.growths,
        "learning_rate": lambda v: 0.03 <= v <= 0.3,
        "augmentation": lambda v: 0.0 <= v <= 1.0,
        "weight_decay": lambda value: 1e-4 <= value <= 2e-3,
        "label_smoothing": lambda value: value in (0.0, 0.05, 0.1, 0.15),
    }
    for guess in preset.first_guesses:
        wrong = [name for name, value in guess.items() if not allowed[name](value)]
        assert not wrong


def test_full_trains_large_and_tiny_nets_first_and_none_of_half_a_million_parameters() -> None:
    full = PRESETS["full"]
    sizes = [
        num_parameters(*net) for net in itertools.product(full.widths, full.depths, full.growths)
    ]
    assert max(sizes) < 500_000
    guesses = [
        num_parameters(int(guess["stage_width"]), int(guess["depth"]), int(guess["growth"]))
        for guess in full.first_guesses
    ]
    assert guesses[0] > 100_000
    assert guesses[1] < 10_000


def test_a_search_may_have_several_objectives_of_those_that_a_trial_reports() -> None:
    asked = ("val_accuracy", "latency_ms", "num_parameters")
    found = preset_experiment(PRESETS["smoke"], objectives=asked).objectives
    assert [(o.metric, o.goal) for o in found] == [
        ("val_accuracy", MAXIMIZE),
        ("latency_ms", MINIMIZE),
        ("num_parameters", MINIMIZE),
    ]
    for wrong in (("speed",), ("val_loss", "val_loss"), ("",)):
        with pytest.raises(ConfigError, match="give one or more of val_accuracy, "):
            preset_experiment(PRESETS["smoke"], objectives=wrong)
    for constant in (("num_parameters",), ("latency_ms", "num_parameters")):
        with pytest.raises(ConfigError, match="add an objective that it changes"):
            preset_experiment(PRESETS["smoke"], objectives=constant)
