from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lib.registry.verdict import (
    DIFFERS,
    IDENTICAL,
    WITHIN_NOISE,
    Noise,
    Reproduced,
    Served,
    compare,
    judge,
)
from lib.train.environment import describe, differences

NOISE = Noise(standard_error=0.002, seeds=1, seed_deviation=None)
SAME = Served(images=10_000, differing_labels=0, test_accuracy=0.99, retrained_test_accuracy=0.99)


def test_one_bit_is_enough_to_differ() -> None:
    recorded = {"a": torch.tensor([1.0, math.nan]), "b": torch.tensor([0.0]), "n": torch.tensor(3)}
    copy = {name: value.clone() for name, value in recorded.items()}
    assert judge(compare(recorded, copy), 0.0, NOISE, SAME) == IDENTICAL

    copy["b"] = torch.tensor([-0.0])
    assert compare(recorded, copy).differing == ("b",)
    copy["a"] = torch.nextafter(recorded["a"], torch.tensor(2.0))
    found = compare(recorded, copy)
    assert found.differing == ("a", "b")
    assert judge(found, 0.0, NOISE, SAME) == WITHIN_NOISE


def test_other_shapes_types_and_names_differ_without_measure() -> None:
    one = torch.zeros(2)
    for other in (torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(1, 2)):
        assert compare({"a": one}, {"a": other}).max_difference == math.inf
    assert compare({"a": one}, {"b": one}).differing == ("a", "b")


@pytest.mark.parametrize(
    ("difference", "deviation", "verdict"),
    [
        (0.0039, None, WITHIN_NOISE),
        (0.0041, None, DIFFERS),
        # Seeds that agree by chance do not narrow what the validation set leaves open.
        (0.0039, 0.0001, WITHIN_NOISE),
        (0.0099, 0.005, WITHIN_NOISE),
        (0.0101, 0.005, DIFFERS),
    ],
)
def test_noise_is_two_standard_errors_or_deviations(
    difference: float, deviation: float | None, verdict: str
) -> None:
    weights = compare({"a": torch.zeros(1)}, {"a": torch.ones(1)})
    noise = replace(NOISE, seed_deviation=deviation)
    assert judge(weights, difference, noise, SAME) == verdict


def test_the_file_that_serves_is_part_of_the_verdict() -> None:
    same = compare({"a": torch.zeros(1)}, {"a": torch.zeros(1)})
    other = compare({"a": torch.zeros(1)}, {"a": torch.ones(1)})
    assert judge(same, 0.0, NOISE, replace(SAME, differing_labels=1)) == DIFFERS
    # Two standard errors of 99 % of 10,000 images are 0.2 points.
    for retrained, verdict in ((0.9881, WITHIN_NOISE), (0.9879, DIFFERS)):
        served = replace(SAME, differing_labels=40, retrained_test_accuracy=retrained)
        assert judge(other, 0.0, NOISE, served) == verdict


def test_a_verdict_says_what_differs_and_is_json() -> None:
    found = Reproduced(
        verdict=DIFFERS,
        name="digits",
        version=3,
        run_id="r",
        data_digest="d",
        code="commit abc",
        epoch=2,
        weights=compare({"a": torch.zeros(1)}, {"a": torch.zeros(2)}),
        served=replace(SAME, differing_labels=7),
        recorded_val_accuracy=0.99,
        val_accuracy=0.5,
        noise=NOISE,
        environment={"processor": "one → other"},
        conditions=("trained with this checkout's code",),
        seconds=1.0,
    )
    said = found.describe()
    for part in (
        "digits version 3: differs on condition: trained with this checkout's code",
        "0.9900 → 0.5000",
        "±0.0040",
        "one → other",
        "7 of 10,000 test images",
    ):
        assert part in said
    whole = compare({"a": torch.zeros(1)}, {"a": torch.zeros(1)})
    same = replace(found, verdict=IDENTICAL, weights=whole).describe()
    for part in ("identical on condition: trained with", "bit by bit", "commit abc", "one → other"):
        assert part in same
    assert found.summary()["weights"]["max_difference"] is None
    assert found.summary()["noise"]["limit"] == 0.004


def test_an_environment_is_compared_by_what_was_recorded() -> None:
    present = describe()
    assert present["num_threads"] == torch.get_num_threads()
    assert present["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert differences(present, describe()) == {}
    assert differences({"torch": "1.0"}, present) == {"torch": f"1.0 → {present['torch']}"}
