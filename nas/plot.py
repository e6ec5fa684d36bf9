"""Pictures of fronts."""

from __future__ import annotations

from pathlib import Path

from nas.costs import FIGURES, Objective
from nas.files import replacing
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


def plot_front(front: ParetoFront, path: Path) -> None:
    """The first objective over the second; a third is the colour. Dominated points are pale, limits are lines."""
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

    others = tuple(e for e in front.others if all(abs(e[o.key]) < float("inf") for o in (vertical, horizontal)))
    axes.scatter(series(others, horizontal), series(others, vertical), s=14, color="0.8", label="dominated", zorder=1)
    points = front.points
    x, y = series(points, horizontal), series(points, vertical)
    errors = [
        [_shown(horizontal, p[horizontal.key] - p.figures[horizontal.key].low) for p in points],
        [_shown(horizontal, p.figures[horizontal.key].high - p[horizontal.key]) for p in points],
    ]
    axes.errorbar(x, y, xerr=errors, fmt="none", ecolor="0.5", elinewidth=0.8, zorder=2)
    if len(front.objectives) > 2:
        third = front.objectives[2]
        colours = series(points, third)
        drawn = axes.scatter(x, y, c=colours, s=42, cmap="viridis", edgecolor="black", linewidth=0.5, label="front", zorder=3)
        figure.colorbar(drawn, ax=axes, label=_label(third, {p.figures[third.key].origin for p in points}))
    else:
        axes.plot(x, y, "o-", color="tab:blue", markersize=6, label="front", zorder=3)
    for limit in front.limits:
        for objective, draw in ((horizontal, axes.axvline), (vertical, axes.axhline)):
            if limit.key == objective.key:
                draw(_shown(objective, limit.value), color="tab:red", linestyle="--", linewidth=1, label=str(limit))
    axes.set_xlabel(_label(horizontal, {p.figures[horizontal.key].origin for p in points}))
    axes.set_ylabel(_label(vertical, set()))
    axes.set_title(f"{len(points)} non-dominated subnets of {len(points) + len(front.others)}")
    positive = min(x) > 0 and max(x) / min(x) > 8 and FIGURES[horizontal.name][0] != "fraction"
    axes.set_xscale("log" if positive else "linear")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip(".") or "png")
