"""Pictures of fronts, of what inherited accuracies are worth, and of spaces to choose from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from hardware_profiles.files import replacing
from nas.costs import FIGURES, Objective
from nas.front import Evaluation, ParetoFront
from nas.ranking import noise_bound

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nas.scaling import Candidate
    from nas.trust import TrustReport

LABELS = {
    "accuracy": "accuracy (%)",
    "latency_ms": "latency (ms)",
    "energy_uj": "energy (uJ)",
    "sram_bytes": "peak SRAM (KiB)",
    "flash_bytes": "flash (KiB)",
    "model_bytes": "model size (KiB)",
    "macs": "MMACs",
    "params": "parameters (thousands)",
    "int8_macs_share": "MACs in int8 (%)",
}
SCALES = {"fraction": 100.0, "bytes": 1 / 1024, "macs": 1e-6, "params": 1e-3, "ms": 1.0, "uJ": 1.0, "": 1.0}


def check_picture(path: Path) -> None:
    """Raise ValueError unless matplotlib can write the format of the suffix; before the work, not after it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    known = sorted(FigureCanvasAgg(Canvas()).get_supported_filetypes())
    if path.suffix and path.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"cannot draw {path}: expected one of the formats {', '.join(known)}")


def title_of(key: str, foreign: bool = False) -> tuple[str, float]:
    """(what a figure is called, what its values are multiplied by) where people read it; a foreign one as it is."""
    name, _, device = key.partition("@")
    if foreign or name not in FIGURES:
        return key, 1.0
    return LABELS[name] + (f" on {device}" if device else ""), SCALES[FIGURES[name][0]]


def shown(objective: Objective, value: float) -> float:
    return value * SCALES[objective.unit]


def label(objective: Objective, origins: set[str]) -> str:
    origin = f", {'/'.join(sorted(origins))}" if objective.unit == "ms" and origins else ""
    return title_of(objective.key, objective.foreign)[0] + origin


def values_of(evaluations: Iterable[Evaluation], objective: Objective) -> list[float]:
    """The values of an objective in the unit people read."""
    return [shown(objective, evaluation[objective.key]) for evaluation in evaluations]


def scale_axis(axes: Axes, which: Literal["x", "y"], objective: Objective, values: Sequence[float]) -> None:
    """Logarithmic, with ticks at 1, 2 and 5, where values span more than a factor of 8; else linear."""
    if objective.unit == "fraction" or min(values) <= 0 or max(values) / min(values) <= 8:
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _bars(points: tuple[Evaluation, ...], objective: Objective) -> list[list[float]]:
    """Lengths of the error bars below and above; none where the error is not known."""
    figures = [point.figures[objective.key] for point in points]
    return [
        [0.0 if f.low is None else shown(objective, f.value - f.low) for f in figures],
        [0.0 if f.high is None else shown(objective, f.high - f.value) for f in figures],
    ]


def plot_front(front: ParetoFront, path: Path) -> None:
    """The first objective over the second; a third is the colour, a fourth is not drawn.

    Dominated points are pale, limits are lines.

    The format is that of the suffix, which may be any that matplotlib knows; raises ValueError for another.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    if not front.points:
        raise ValueError("the front has no point to draw")
    vertical, horizontal = front.objectives[0], front.objectives[min(1, len(front.objectives) - 1)]
    figure = Canvas(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for others, shade, told in _others_of(front):
        x, y = values_of(others, horizontal), values_of(others, vertical)
        axes.scatter(x, y, s=14, color=shade, label=told, zorder=1)
    if departed := front.departed:
        x, y = values_of(departed, horizontal), values_of(departed, vertical)
        axes.scatter(x, y, s=34, marker="x", color="tab:red", label="left the front once measured", zorder=2)
    points = front.points
    x, y = values_of(points, horizontal), values_of(points, vertical)
    axes.errorbar(x, y, xerr=_bars(points, horizontal), fmt="none", ecolor="0.5", elinewidth=0.8, zorder=2)
    if len(front.objectives) > 2:
        third = front.objectives[2]
        colours = values_of(points, third)
        drawn = axes.scatter(
            x, y, c=colours, s=42, cmap="viridis", edgecolor="black", linewidth=0.5, label="front", zorder=3
        )
        figure.colorbar(drawn, ax=axes, label=label(third, {p.figures[third.key].origin for p in points}))
    else:
        axes.plot(x, y, "o-", color="tab:blue", markersize=6, label="front", zorder=3)
    for limit in front.limits:
        if limit.key == horizontal.key:
            axes.axvline(shown(horizontal, limit.value), color="tab:red", linestyle="--", label=str(limit))
        elif limit.key == vertical.key:
            axes.axhline(shown(vertical, limit.value), color="tab:red", linestyle="--", label=str(limit))
        else:  # on neither axis
            axes.plot([], [], color="none", label=str(limit))
    axes.set_xlabel(label(horizontal, {p.figures[horizontal.key].origin for p in points}))
    axes.set_ylabel(label(vertical, set()))
    axes.set_title(f"{len(points)} non-dominated subnets of {len(points) + len(front.others)}")
    scale_axis(axes, "x", horizontal, x)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip(".") or "png")


def _others_of(front: ParetoFront) -> list[tuple[Sequence[Evaluation], str, str]]:
    """What is not on the front, with a shade and what it is called.

    Where the front was measured anew, most of the others were not: their accuracies are those on the images of the
    search, and their latencies predictions, so that they may seem to be better than the front.
    """
    if not any(point.predicted for point in front.points):
        return [(front.others, "0.8", "not on the front")] if front.others else []
    anew = [one for one in front.others if one.predicted]
    before = [one for one in front.others if not one.predicted]
    both = [(before, "0.85", "as the search saw it, not measured anew"), (anew, "0.55", "not on the front")]
    return [each for each in both if each[0]]


ALONE, INHERITED, TAKEN_LARGEST, NOISE = "#2f6690", "#d1495b", "#e09f3e", "0.92"


def plot_trust(report: TrustReport, path: Path) -> None:
    """Left: inherited against stand-alone accuracy. Right: both, and the regrets of two rules, over MACs.

    Networks are numbered as in the printed table, by MACs; bars are its standard errors. The format is that of the
    suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Canvas(figsize=(12.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.05), height_ratios=(1.6, 1))
    _draw_agreement(figure.add_subplot(grid[:, 0]), report)
    above = figure.add_subplot(grid[0, 1])
    _draw_over_macs(above, report)
    below = figure.add_subplot(grid[1, 1], sharex=above)
    _draw_regrets(below, report)
    for axes in (above, below):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    above.tick_params(labelbottom=False)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip(".") or "png")


def _draw_agreement(axes: Axes, report: TrustReport) -> None:
    from matplotlib.ticker import MaxNLocator

    inherited, alone = (100 * report.column(name) for name in ("inherited", "alone"))
    errors = [100 * report.error(name) for name in ("inherited", "alone")]
    few = len(alone) <= 12
    axes.errorbar(inherited, alone, yerr=errors[1], xerr=errors[0], fmt="none", ecolor="0.75", elinewidth=1, zorder=2)
    axes.scatter(inherited, alone, s=190 if few else 110, color=ALONE, edgecolor="white", linewidth=1, zorder=3)
    style = {"color": "white", "ha": "center", "va": "center_baseline", "weight": "bold", "fontsize": 8 if few else 6}
    for number, at in enumerate(zip(inherited, alone, strict=True), start=1):
        axes.annotate(str(number), at, **style)  # type: ignore[arg-type]
    ends = [(np.min(v - e), np.max(v + e)) for v, e in zip((inherited, alone), errors, strict=True)]
    union = (min(low for low, _ in ends), max(high for _, high in ends))
    if all(3 * (high - low) > union[1] - union[0] for low, high in ends):
        ends = [union, union]  # unless that would leave most of the picture empty
        axes.set_aspect("equal")
    limits = [(low - 0.05 * (high - low), high + 0.05 * (high - low)) for low, high in ends]
    axes.set(xlim=limits[0], ylim=limits[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    if max(low for low, _ in ends) < min(high for _, high in ends):
        axes.axline((0, 0), slope=1, color="0.6", linestyle="--", linewidth=1, label="inherited = alone", zorder=1)
        axes.legend(loc="upper left", fontsize="small", frameon=False)
    axes.set_xlabel("accuracy inherited from the supernet (%)")
    axes.set_ylabel("accuracy trained alone (%)")
    found = report.kendall
    interval = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    tau = "not defined" if found.value is None else f"{found.value:.2f}{interval}"
    baseline = "" if report.kendall_macs.value is None else f"; of MACs {report.kendall_macs.value:.2f}"
    title = f"{len(alone)} networks, numbered by MACs: Kendall tau {tau}{baseline}"
    axes.set_title(title, fontsize="medium", loc="left")


def _draw_over_macs(axes: Axes, report: TrustReport) -> None:
    mmacs = report.column("macs") / 1e6
    style = {"markersize": 5, "linewidth": 1.2, "elinewidth": 0.8, "capsize": 2}
    lines = (("alone", ALONE, "o-", "trained alone"), ("inherited", INHERITED, "D-", "inherited from the supernet"))
    for name, colour, marks, said in lines:
        values, error = 100 * report.column(name), 100 * report.error(name)
        axes.errorbar(mmacs, values, yerr=error, fmt=marks, color=colour, label=said, **style)  # type: ignore[arg-type]
    tops = np.maximum(*(100 * (report.column(name) + report.error(name)) for name in ("alone", "inherited")))
    for number, at in enumerate(zip(mmacs, tops, strict=True), start=1):
        axes.annotate(str(number), at, (0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(y=0.12)
    axes.set_ylabel("accuracy (%)")
    axes.legend(loc="lower right", fontsize="small", frameon=False)
    trained = f"each trained alone for {report.steps:,} steps of {report.images_a_step} images"
    axes.set_title(f"{trained}; bars are standard errors", fontsize="medium", loc="left")


def _draw_regrets(axes: Axes, report: TrustReport) -> None:
    within = report.picks["largest"]  # of the networks within a budget, the best is better by noise alone
    mmacs = [pick.budget_macs / 1e6 for pick in within]
    noise = [100 * noise_bound(pick.comparisons) * report.noise_floor for pick in within]
    axes.fill_between(
        mmacs, noise, step="post", color=NOISE, label=f"noise: up to {noise[-1]:.2f}", zorder=0, linewidth=0
    )
    rules = (
        ("largest", TAKEN_LARGEST, "s", 7, "taking the largest"),
        ("inherited", INHERITED, "D", 4, "picking by inherited"),
    )
    for rule, colour, marker, size, said in rules:
        budgets = [pick.budget_macs / 1e6 for pick in report.picks[rule]]
        values = 100 * report.regrets(rule)
        axes.step(budgets, values, where="post", color=colour, linewidth=1.2, zorder=2)
        marks = axes.plot(
            budgets, values, marker, color=colour, markersize=size, label=f"{said}: mean {values.mean():.2f}", zorder=3
        )[0]
        marks.set_clip_on(False)
        marks.set_fillstyle("none" if rule == "largest" else "full")
    highest = max(float(np.max(100 * report.regrets(rule))) for rule in report.picks)
    axes.set_ylim(0, 1.15 * max(highest, noise[-1]))
    axes.set_xlabel("MMACs of the network, or budget in MMACs")
    axes.set_ylabel("regret within\nbudget (pp)")
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=3,
        fontsize="small",
        frameon=False,
        borderaxespad=0.2,
        columnspacing=1.2,
        handletextpad=0.4,
        handlelength=1.4,
    )


def plot_candidates(candidates: Sequence[Candidate], path: Path, *, most: int = 8) -> None:
    """Cumulative distributions of the MACs of the networks that fit, of the first candidates.

    Raises ValueError for a format that `check_picture` refuses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for candidate in [candidate for candidate in candidates if candidate.macs][:most]:
        label = f"resolution {candidate.resolution}, width {candidate.width:g}: {candidate.share:.0%} fit"
        shares = np.arange(1, candidate.fitting + 1) / candidate.fitting
        axes.step(np.array(candidate.macs) * 1e-6, shares, where="post", label=label)
    axes.set_xlabel("MMACs of the networks that fit")
    axes.set_ylabel("share of them with at most so many")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip(".") or "png")
