"""The learning rate's shape: where it starts, peaks and ends (AIMV2, Table A1)."""

import math
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aimv2.config.schema import OptimConfig
from aimv2.train.schedule import learning_rate

Kind = Literal["cosine", "half-cosine", "cooldown", "constant"]
KINDS = ("cosine", "half-cosine", "cooldown", "constant")
STEPS = 1000


def rates(kind: Kind, warmup: int = 100) -> list[float]:
    config = OptimConfig(schedule=kind, warmup=warmup)
    return [learning_rate(step, STEPS, config) for step in range(STEPS + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up(kind: Kind) -> None:
    rate = rates(kind)
    assert rate[0] == 1e-6 and rate[100] == pytest.approx(1e-3) == max(rate)
    rises = [b - a for a, b in pairwise(rate[:101])]
    assert max(rises) == pytest.approx(min(rises)) == pytest.approx((1e-3 - 1e-6) / 100)
    assert rates(kind, warmup=0)[0] == pytest.approx(1e-3)


def test_cosine() -> None:
    rate = rates("cosine")
    assert rate[STEPS] == pytest.approx(1e-5) and rate[550] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate[325] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.sqrt(0.5)) / 2)
    assert rate[STEPS - 1] == pytest.approx(1e-5, rel=1e-3)


def test_half_cosine_ends_at_half_the_peak() -> None:
    rate = rates("half-cosine")
    assert rate[STEPS] == pytest.approx(5e-4)
    assert rate[550] == pytest.approx(1e-3 * (1 + math.sqrt(0.5)) / 2)


def test_cooldown_is_a_line() -> None:
    rate = rates("cooldown", warmup=0)
    falls = [a - b for a, b in pairwise(rate)]
    assert max(falls) == pytest.approx(min(falls)) and rate[STEPS] == pytest.approx(1e-5)


def test_constant() -> None:
    assert set(rates("constant")[100:]) == {1e-3}


def test_the_papers_run() -> None:
    config = OptimConfig()
    at = {step: learning_rate(step, 1_500_000, config) for step in (0, 6250, 12_500, 1_500_000)}
    assert at == {0: 1e-6, 6250: pytest.approx(5.005e-4), 12_500: 1e-3, 1_500_000: pytest.approx(1e-5)}


@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 5000),
    warmup=st.integers(0, 6000),
    share=st.floats(0, 1),
    peak=st.floats(1e-5, 1e-2),
    low=st.floats(0, 1),
)
def test_within_bounds(kind: Kind, steps: int, warmup: int, share: float, peak: float, low: float) -> None:
    config = OptimConfig(lr=peak, min_lr=peak * low, start_lr=peak * low / 2, warmup=warmup, schedule=kind)
    step = round(share * (steps - 1))
    rate = learning_rate(step, steps, config)
    floor = config.start_lr if step < warmup else peak / 2 if kind == "half-cosine" else config.min_lr
    assert floor * (1 - 1e-9) <= rate <= peak * (1 + 1e-9)
    before, after = (learning_rate(s, steps, config) for s in (step, min(step + 1, steps)))
    assert after >= before * (1 - 1e-9) if step < min(warmup, steps) - 1 else True
    assert after <= before * (1 + 1e-9) if step >= min(warmup, steps) else True
