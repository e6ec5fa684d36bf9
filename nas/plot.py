"""Pictures of fronts."""

from __future__ import annotations

from pathlib import Path

from hardware_profiles.files import replacing
from nas.costs import FIGURES, Objective
from nas.front import Evaluation, ParetoFront

LABELS = {
    "accuracy": "accuracy (%)",
    "latency_ms": "latency (ms)",
    "sram_bytes": "peak SRAM (KiB)",
    "flash_bytes": "flash (KiB)",
    "model_bytes": "model size (KiB)",
    "macs": "MMACs",
    "params": "parameters (thousands)",
    "int8_macs_share": "MACs in int8 (%)",
}
SCALES = {"fraction": 100.0, "bytes": 1 / 1024, "macs": 1e-6, "params": 1e-3, "ms": 1.0}


def _shown(objective: Objective, value: float) -> float:
    return value * SCALES[objective.unit]


def _label(objective: Objective, origins: set[str]) -> str:
    device = f" on {objective.device}" if objective.device else ""
    origin = f", {'/'.join(sorted(origins))}" if objective.unit == "ms" else ""
    return LABELS[objective.name] + device + origin


def _bars(points: tuple[Evaluation, ...], objective: Objective) -> list[list[float]]:
    """Lengths of the error bars below and above; none where the error is not known."""
    figures = [point.figures[objective.key] for point in points]
    return [
        [0.0 if f.low is None else _shown(objective, f.value - f.low) for f in figures],
        [0.0 if f.high is None else _shown(objective, f.high - f.value) for f in figures],
    ]


def plot_front(front: ParetoFront, path: Path) -> None:
    """The first objective over the second; a third is the colour. Dominated points are pale, limits are lines.

    The format is that of the suffix, which may be any that matplotlib knows; raises ValueError for another.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not front.points:
        raise ValueError("the front has no point to draw")
    vertical, horizontal = front.objectives[0], front.objectives[min(1, len(front.objectives) - 1)]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    def series(evaluations: tuple[Evaluation, ...], objective: Objective) -> list[float]:
        return [_shown(objective, e[objective.key]) for e in evaluations]

    others = front.others
    if others:
        x, y = series(others, horizontal), series(others, vertical)
        axes.scatter(x, y, s=14, color="0.8", label="not on the front", zorder=1)
    points = front.points
    x, y = series(points, horizontal), series(points, vertical)
    axes.errorbar(x, y, xerr=_bars(points, horizontal), fmt="none", ecolor="0.5", elinewidth=0.8, zorder=2)
    if len(front.objectives) > 2:
        third = front.objectives[2]
        colours = series(points, third)
        drawn = axes.scatter(
            x, y, c=colours, s=42, cmap="viridis", edgecolor="black", linewidth=0.5, label="front", zorder=3
        )
        figure.colorbar(drawn, ax=axes, label=_label(third, {p.figures[third.key].origin for p in points}))
    else:
        axes.plot(x, y, "o-", color="tab:blue", markersize=6, label="front", zorder=3)
    for limit in front.limits:
        if limit.key == horizontal.key:
            axes.axvline(_shown(horizontal, limit.value), color="tab:red", linestyle="--", label=str(limit))
        elif limit.key == vertical.key:
            axes.axhline(_shown(vertical, limit.value), color="tab:red", linestyle="--", label=str(limit))
        else:  # on neither axis
            axes.plot([], [], color="none", label=str(limit))
    axes.set_xlabel(_label(horizontal, {p.figures[horizontal.key].origin for p in points}))
    axes.set_ylabel(_label(vertical, set()))
    axes.set_title(f"{len(points)} non-dominated subnets of {len(points) + len(front.others)}")
    positive = min(x) > 0 and max(x) / min(x) > 8 and FIGURES[horizontal.name][0] != "fraction"
    axes.set_xscale("log" if positive else "linear")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip(".") or "png")
