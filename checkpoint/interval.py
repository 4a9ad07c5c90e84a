"""How often to save, given what it costs and how often things break: pure arithmetic."""

from __future__ import annotations

from math import sqrt

from ftrain.comms.errors import UsageError


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """The time between two versions that loses least training time in the long run.

    After J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart
    dumps" (FGCS 2006), which refines Young's sqrt(2 x cost x MTBF).

    Args:
        cost_s: training time that one version costs.
        mtbf_s: mean time between failures of the whole job.

    Raises:
        UsageError: one of them is not above 0.
    """
    if not (cost_s > 0 and mtbf_s > 0):  # also of what is no number
        raise UsageError(f"a cost of {cost_s} s and an MTBF of {mtbf_s} s: both have to be above 0")
    ratio = cost_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return sqrt(2 * cost_s * mtbf_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - cost_s


def lost_share(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """Which part of the time is lost to saving and to doing again what was lost, to first order."""
    return cost_s / interval_s + interval_s / (2 * mtbf_s)
