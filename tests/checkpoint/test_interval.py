"""The proposed interval is the one that loses least."""

from __future__ import annotations

from math import exp, inf

import pytest

from ftrain.checkpoint.interval import best_interval_s, lost_share
from ftrain.comms.errors import UsageError


def expected_s(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """Daly's exact expected wall time per second of work, for restarts that take no time."""
    return mtbf_s * (exp((interval_s + cost_s) / mtbf_s) - 1) / interval_s


@pytest.mark.parametrize("mtbf_s", [60.0, 3600.0, 86_400.0])
@pytest.mark.parametrize("cost_s", [0.01, 0.3, 5.0])
def test_it_is_within_a_thousandth_of_the_best_of_all_intervals(
    cost_s: float, mtbf_s: float
) -> None:
    best = inf
    interval_s = cost_s / 100
    while interval_s < 10 * mtbf_s:
        best = min(best, expected_s(interval_s, cost_s, mtbf_s))
        interval_s *= 1.01
    found = expected_s(best_interval_s(cost_s, mtbf_s), cost_s, mtbf_s)
    assert found <= best * 1.001


def test_what_costs_more_than_it_saves_is_done_once_between_failures() -> None:
    assert best_interval_s(1000.0, 100.0) == 100.0


def test_nonsense_is_refused() -> None:
    for cost_s, mtbf_s in ((0.0, 1.0), (1.0, 0.0), (-1.0, 5.0), (float("nan"), 1.0)):
        with pytest.raises(UsageError, match="above 0"):
            best_interval_s(cost_s, mtbf_s)


def test_the_lost_share_counts_saving_and_doing_again() -> None:
    assert lost_share(100.0, 1.0, 1000.0) == pytest.approx(0.01 + 0.05)
