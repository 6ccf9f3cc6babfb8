import itertools

import pytest

from lldfast.errors import InputError
from lldfast.schedule import estimation_steps, learning_rate


def test_golden_step_set():
    steps = estimation_steps(10_000)
    assert len(steps) == 20
    assert steps == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 10_000, 1000)]


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 900, 5000, 9999, 100_000])
def test_any_run_length(total):
    steps = estimation_steps(total)
    assert steps[0] == 0 and steps == sorted(set(steps)) and steps[-1] < total
    if total >= 100:
        assert steps[-1] >= 0.85 * total  # the end of a short run is not left without an estimate


def test_options():
    assert estimation_steps(900, every=1000, dense_until=512) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert estimation_steps(10, every=3, dense_until=0) == [0, 3, 6, 9]
    for bad in ({"total": 0}, {"total": 5, "every": 0}, {"total": 5, "dense_until": -1}):
        with pytest.raises(InputError):
            estimation_steps(**bad)


def test_learning_rate():
    rates = [learning_rate(s, 1000, peak=6e-4, final=6e-5, warmup=100) for s in range(1000)]
    assert rates[0] == pytest.approx(6e-6) and rates[99] == pytest.approx(6e-4) and rates[-1] == pytest.approx(6e-5)
    assert max(rates) == pytest.approx(6e-4) and all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert learning_rate(0, 1, peak=1.0, final=0.1, warmup=0) == 1.0
