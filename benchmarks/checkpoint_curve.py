"""The curve of ``checkpoint``: ratios over forward + backward, and where they break even."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

CURVES = {  # figure: label, target
    "blocking_to_dcp": ("blocking / best DCP", 0.2),
    "lost_to_torch": ("lost / torch.save", 1.0),
    "lost_to_dcp": ("lost / best DCP", 0.5),
}


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """The x from which a falling curve is below ``level``, between points; None: it never is."""
    ordered = sorted(points)
    if ordered and ordered[0][1] <= level:
        return ordered[0][0]
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if y0 > level >= y1:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return None


def points_of(state: dict[str, Any], figure: str) -> list[tuple[float, float]]:
    """Ratio of forward + backward to capture, and our figure there."""
    found = [(entry["ratio"], entry["arms"].get(state["ours"], {})) for entry in state["ratios"]]
    return [(ratio, arm[figure]) for ratio, arm in found if arm.get(figure) == arm.get(figure, 0)]


def draw(everything: dict[str, Any], path: Path) -> list[str]:
    """Draw it if there is matplotlib; returns what is to be said, break-evens first."""
    said = []
    for size, state in everything.items():
        for figure, (label, target) in CURVES.items():
            points = points_of(state, figure)
            for level in dict.fromkeys((1.0, target)):
                x = crossing(points, level)
                at = "not reached here" if x is None else f"from {x:.2f} x capture on"
                said.append(f"{size} GB, {label} at most {level:g}: {at}")
    try:
        import matplotlib
    except ImportError:
        return [*said, "no picture: matplotlib is not installed"]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(13, 4))
    for ax, (name, (label, target)) in zip(axes, CURVES.items(), strict=True):
        for size, state in everything.items():
            points = sorted(points_of(state, name))
            if not points:
                continue
            (line,) = ax.plot(*zip(*points, strict=True), marker="o", label=f"{size} GB")
            x = crossing(points, 1.0)
            if x is not None:
                ax.axvline(x, color=line.get_color(), linestyle=":", linewidth=1)
        ax.axhline(1.0, color="grey", linewidth=1)
        ax.axhline(target, color="green", linestyle="--", linewidth=1)
        ax.set(xscale="log", xlabel="forward + backward / capture", title=label, ylim=(0, None))
        if ax.lines:
            ax.legend()
    figure.suptitle("ours; dotted: break-even, dashed: target")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return [*said, f"drawn to {path}"]
