"""How the bench reads growth from three sizes."""

from __future__ import annotations

import math

import pytest

from tests.bench.scale import growth
from tests.bench.scale_cost import Cost

SIZES = (10, 100, 1_000)


def cost(*values: float, bound: float) -> Cost:
    return Cost(what="w", by="n", unit="ms", sizes=SIZES, values=values, bound=bound)


@pytest.mark.parametrize("constant", [0.0, 50.0])
@pytest.mark.parametrize(("power", "breaks_at"), [(1, 1e5), (2, 1e4)])
def test_a_constant_part_is_taken_off(power: int, constant: float, breaks_at: float) -> None:
    values = [constant + size**power for size in SIZES]
    found = growth(cost(*values, bound=constant + breaks_at**power))
    assert found.exponent == pytest.approx(power, abs=0.01)
    assert found.breaks_at == pytest.approx(breaks_at, rel=0.01)


def test_what_shows_at_the_last_size_alone_is_found_too() -> None:
    assert growth(cost(100.0, 101.0, 10_000.0, bound=1e6)).exponent == pytest.approx(2, abs=0.01)


def test_what_does_not_grow_never_breaks() -> None:
    assert growth(cost(5.0, 4.0, 5.1, bound=10)).breaks_at == math.inf


def test_what_grows_slowly_is_taken_to_grow_linearly() -> None:
    found = growth(cost(1.0, 2.0, 3.0, bound=30))
    assert found.exponent == pytest.approx(0.0, abs=0.01)
    assert found.breaks_at == pytest.approx(1_000 + 27 * 900, rel=0.01)


def test_a_bound_that_was_passed_is_found_between_the_sizes() -> None:
    assert growth(cost(1.0, 10.0, 100.0, bound=31.6)).breaks_at == pytest.approx(316, rel=0.01)
    assert growth(cost(5.0, 10.0, 100.0, bound=4)).breaks_at == 10
