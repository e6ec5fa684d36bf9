"""More pictures of fronts: three objectives at once, parallel coordinates, which choices matter, two fronts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware_profiles.files import replacing
from nas.comparison import Comparison, attained
from nas.costs import Objective
from nas.front import Evaluation, ParetoFront, costs_of
from nas.importance import ABSENT, Importance, codes_of_choices, importance
from nas.plot import label, plot_front, scale_axis, shown, title_of, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST, SECOND = "#0072b2", "#e69f00"  # blue and orange, told apart by colour-blind people (Okabe and Ito, 2008)
COLOURS = "cividis"  # from dark blue to yellow, the same to most colour-blind people (arXiv 1712.01662)
OTHERS = "0.8"
MAIN_CHOICES = 6  # axes of choices beside those of the objectives
MOST_LINES = 1000  # pale lines of what is not on the front
MOST_BARS = 12


@contextmanager
def _canvas(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure, written to the path at the end; the format is that of the suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip(".") or "png")


def draw(front: ParetoFront, path: Path, kind: str) -> None:
    """Draw a front; raises ValueError for a kind there is not, an empty front, or one that the kind cannot show."""
    if kind not in KINDS:
        raise ValueError(f"no picture of kind {kind!r}; expected one of {', '.join(KINDS)}")
    if not front.points:
        raise ValueError("the front has no point to draw")
    KINDS[kind](front, path)


# three objectives ------------------------------------------------------------------------------------------


def plot_3d(front: ParetoFront, path: Path) -> None:
    """Each pair of three objectives in a panel of its own, and all three in space; colours are the first objective."""
    from matplotlib.ticker import MaxNLocator

    if len(front.objectives) != 3:
        raise ValueError(f"a 3-D picture needs three objectives, the front has {len(front.objectives)}; use kind front")
    first = front.objectives[0]
    colours = values_of(front.points, first)
    style: dict[str, Any] = {"c": colours, "cmap": COLOURS, "edgecolor": "black", "linewidth": 0.5}
    with _canvas(path, 11, 8.5) as figure:
        panels = figure.subplots(2, 2)
        for axes, (vertical, horizontal) in zip(panels.flat, combinations(front.objectives, 2), strict=False):
            axes.scatter(*(values_of(front.others, o) for o in (horizontal, vertical)), s=10, color=OTHERS)
            x, y = (values_of(front.points, o) for o in (horizontal, vertical))
            dots = axes.scatter(x, y, s=42, zorder=3, **style)
            axes.set_xlabel(label(horizontal, set()))
            axes.set_ylabel(label(vertical, set()))
            everything = [*front.points, *front.others]
            scale_axis(axes, "x", horizontal, values_of(everything, horizontal))
            scale_axis(axes, "y", vertical, values_of(everything, vertical))
            axes.grid(alpha=0.3)
        panels[1, 1].remove()
        space = figure.add_subplot(2, 2, 4, projection="3d")
        across, deep = front.objectives[1], front.objectives[2]
        x, y, z = (values_of(front.points, o) for o in (across, deep, first))
        floor = min(z) - 0.05 * (max(z) - min(z))
        for place in zip(x, y, z, strict=True):
            space.plot(*zip(place, (*place[:2], floor), strict=True), color="0.6", linewidth=0.7)
        space.scatter(x, y, z, s=34, depthshade=False, **style)
        space.set_xlabel(label(across, set()))
        space.set_ylabel(label(deep, set()))
        space.set_zlabel(label(first, set()))
        space.view_init(elev=22, azim=-125)
        space.set_box_aspect(None, zoom=0.82)
        for axis in (space.xaxis, space.yaxis, space.zaxis):
            axis.set_major_locator(MaxNLocator(4))
        figure.colorbar(dots, ax=panels[0, :], label=label(first, set()), pad=0.01)
        figure.suptitle(f"{len(front)} non-dominated of {len(front) + len(front.others)} (grey: not on the front)")


# parallel coordinates --------------------------------------------------------------------------------------


def plot_parallel(front: ParetoFront, path: Path) -> None:
    """A line a network through its objectives, better being up, and the choices that matter most."""
    evaluations = [*front.points, *front.others]
    names, options, codes = codes_of_choices(evaluations)
    main = _main_choices(front, names, codes)
    costs = costs_of(evaluations, front.objectives)
    order = np.argsort(np.argsort(costs[: len(front), 0])) / max(1, len(front) - 1)
    heights = np.array([_heights(costs[:, i], o, evaluations) for i, o in enumerate(front.objectives)])
    rng = np.random.default_rng(0)
    spread = rng.uniform(-0.025, 0.025, (len(main), len(evaluations)))  # so that lines can be told apart
    steps = [codes[:, i] / (len(options[i]) - 1) for i in main]
    lines = np.vstack([heights, np.array(steps).reshape(len(main), -1) + spread]).T
    pale = np.arange(len(front), len(evaluations))
    pale = pale if len(pale) <= MOST_LINES else rng.choice(pale, MOST_LINES, replace=False)
    with _canvas(path, 1.2 + 1.55 * lines.shape[1], 6) as figure:
        axes = figure.add_subplot()
        places = np.arange(lines.shape[1])
        axes.plot(places, lines[pale].T, color=OTHERS, linewidth=0.5, alpha=0.6, zorder=1)
        colours = values_of(front.points, front.objectives[0])
        scale = _colour_scale(colours)
        for row in np.argsort(-order):
            axes.plot(places, lines[row], color=scale.to_rgba(colours[row]), linewidth=1.8, zorder=3)
        for place, objective in enumerate(front.objectives):
            _draw_ticks(axes, place, *_ticks(costs[:, place], objective, evaluations))
        for place, i in enumerate(main, start=len(front.objectives)):
            told = ["(first)" if option == ABSENT else option for option in options[i]]
            _draw_ticks(axes, place, np.linspace(0, 1, len(told)).tolist(), told)
        titles = [_wrapped(label(o, set())) + "\n(better is up)" for o in front.objectives]
        axes.set_xticks(places, [*titles, *(_wrapped(names[i]) for i in main)], fontsize="small")
        axes.set_yticks([])
        axes.set_xlim(-0.25, lines.shape[1] - 0.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, pad=8)
        figure.colorbar(scale, ax=axes, label=label(front.objectives[0], set()), pad=0.01, aspect=35)
        axes.set_title(f"{len(front)} non-dominated of {len(evaluations)} (grey: not on the front)", loc="left")


def _main_choices(front: ParetoFront, names: Sequence[str], codes: np.ndarray) -> list[int]:
    """Places of the choices with the largest share for any objective; where none can be told, those that vary most."""
    if not names:
        return []
    best = dict.fromkeys(names, 0.0)
    for found in importance(front):
        for name, share in found.shares:
            if name in found.matter and name in best:
                best[name] = max(best[name], share)
    if not any(best.values()):
        best = {name: float(column.std() / column.max()) for name, column in zip(names, codes.T, strict=True)}
    chosen = sorted(best, key=lambda name: -best[name])[:MAIN_CHOICES]
    return [i for i, name in enumerate(names) if name in chosen]


def _is_wide(objective: Objective, evaluations: Sequence[Evaluation]) -> bool:
    values = [evaluation[objective.key] for evaluation in evaluations]
    return objective.unit != "fraction" and min(values) > 0 and max(values) / min(values) > 8


def _heights(costs: np.ndarray, objective: Objective, evaluations: Sequence[Evaluation]) -> np.ndarray:
    """0 for the worst value to 1 for the best; by logarithm where values span more than a factor of 8."""
    if _is_wide(objective, evaluations):
        costs = np.sign(costs) * np.log(np.abs(costs))
    span = float(np.ptp(costs))
    return np.asarray((costs.max() - costs) / span if span else np.full(len(costs), 0.5))


def _ticks(costs: np.ndarray, objective: Objective, evaluations: Sequence[Evaluation]) -> tuple[list[float], list[str]]:
    """(heights, texts) of five values from the worst to the best."""
    worst, best = float(costs.max()), float(costs.min())
    if worst == best:
        return [0.5], [f"{shown(objective, objective.cost(best)):.3g}"]
    at = np.linspace(0, 1, 5)
    if _is_wide(objective, evaluations):
        values = np.sign(worst) * np.geomspace(abs(worst), abs(best), 5)
    else:
        values = np.linspace(worst, best, 5)
    return at.tolist(), [f"{shown(objective, objective.cost(float(value))):.3g}" for value in values]


def _draw_ticks(axes: Axes, place: int, heights: Sequence[float], texts: Sequence[str]) -> None:
    axes.plot([place, place], [-0.03, 1.03], color="0.3", linewidth=1, zorder=2)
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0}
    for height, text in zip(heights, texts, strict=True):
        axes.text(place + 0.04, height, text, va="center", fontsize="small", bbox=box, zorder=4)


def _wrapped(text: str) -> str:
    """Names of choices end in what they are: stage1.block0.kernel takes three lines; other texts break at spaces."""
    if " " in text:
        return text.replace(" on ", "\non ")
    return text.replace(".", ".\n")


def _colour_scale(values: Sequence[float]) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(min(values), max(values)), COLOURS)


# which choices matter --------------------------------------------------------------------------------------


def plot_choices(front: ParetoFront, path: Path) -> None:
    """For each objective, the share of its variance that the main choices account for, beside what chance reaches."""
    found = importance(front)
    best: dict[str, float] = {}
    for one in found:
        top = max(share for _, share in one.shares) or 1.0
        for name, share in one.shares:
            best[name] = max(best.get(name, 0.0), 0.0 if one.doubt else share / top)
    chosen = sorted(best, key=lambda name: -best[name])[:MOST_BARS]
    with _canvas(path, 3 + 3.3 * len(found), 1.9 + 0.32 * len(chosen)) as figure:
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, one in zip(panels, found, strict=True):
            _draw_shares(axes, one, chosen)
        panels[0].set_yticks(range(len(chosen)), chosen)
        panels[0].invert_yaxis()
        more = f"; the {len(chosen)} largest of {len(best)}" if len(best) > len(chosen) else ""
        figure.suptitle(
            f"Which choices matter among {found[0].evaluations} evaluated networks{more}", fontsize="medium"
        )


def _draw_shares(axes: Axes, found: Importance, chosen: Sequence[str]) -> None:
    shares = dict(found.shares)
    values = [100 * shares[name] for name in chosen]
    colours = [FIRST if name in found.matter else OTHERS for name in chosen]
    axes.barh(range(len(chosen)), values, color=colours, height=0.7)
    axes.axvspan(0, 100 * found.noise, color=SECOND, alpha=0.35, linewidth=0, zorder=0)
    axes.set_xlim(0, 1.08 * max(*values, 200 * found.noise, 1.0))
    axes.set_xlabel("share of the variance (%)")
    told = f"model explains {max(0.0, found.explained):.0%}; noise {found.noise:.1%} (orange)"
    axes.set_title(f"{title_of(found.objective.key, found.objective.foreign)[0]}\n{told}", fontsize="small")
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    if found.doubt:
        text = "cannot be told:\n" + found.doubt.replace(": ", ":\n")
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize="small", wrap=True)


# two fronts ------------------------------------------------------------------------------------------------


def plot_against(comparison: Comparison, path: Path, names: tuple[str, str] = ("A", "B")) -> None:
    """The first objective that two fronts reach within each budget of the second, and the region between them.

    Raises ValueError for fronts of one objective.
    """
    if len(comparison.objectives) < 2:
        raise ValueError("two fronts of one objective are two numbers; there is nothing to draw")
    vertical, horizontal = comparison.objectives[:2]
    fronts = (comparison.first, comparison.second)
    costs = [costs_of(front.points, (vertical, horizontal)) for front in fronts]
    end = horizontal.cost(comparison.reference[horizontal.key])
    worst = vertical.cost(comparison.reference[vertical.key])
    budgets = np.unique(np.concatenate([*(c[:, 1] for c in costs), [end]]))
    reached = [attained(c, budgets) for c in costs]
    x = [shown(horizontal, horizontal.cost(float(budget))) for budget in budgets]
    heights = [[shown(vertical, vertical.cost(float(min(r, worst)))) for r in one] for one in reached]
    edges = np.repeat(x, 2)[1:-1]  # both ends of each stretch between two budgets, over which nothing changes
    flat = [np.repeat(height, 2)[:-2] for height in heights]
    with _canvas(path, 8, 5.5) as figure:
        axes = figure.add_subplot()
        for colour, ahead, name in zip((FIRST, SECOND), ((0, 1), (1, 0)), names, strict=True):
            where = np.repeat(reached[ahead[0]] < reached[ahead[1]], 2)[:-2]
            axes.fill_between(edges, *flat, where=where.tolist(), color=colour, alpha=0.25, linewidth=0)
            axes.fill_between([], [], color=colour, alpha=0.25, label=f"{name} ahead")
        for front, colour, marker, one, height, name in zip(
            fronts, (FIRST, SECOND), "os", reached, heights, names, strict=True
        ):
            steps = [h if np.isfinite(r) else np.nan for h, r in zip(height, one, strict=True)]
            axes.step(x, steps, where="post", color=colour, linewidth=1.6)
            across, up = values_of(front.points, horizontal), values_of(front.points, vertical)
            points = f"{name}: {len(front)} points"
            filled = colour if marker == "o" else "none"  # so that points at one place are both seen
            axes.plot(across, up, marker, color=colour, markerfacecolor=filled, markersize=7, label=points)
        axes.set_xlabel(label(horizontal, set()))
        axes.set_ylabel(label(vertical, set()))
        scale_axis(axes, "x", horizontal, x)
        shares = [f"{name} {share:.1%}" for name, share in zip(names, comparison.hypervolume, strict=True)]
        some = "" if len(comparison.objectives) == 2 else f" (of all {len(comparison.objectives)} objectives)"
        axes.set_title(f"hypervolume{some}: {', '.join(shares)}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


KINDS: Mapping[str, Callable[[ParetoFront, Path], None]] = {
    "front": plot_front,
    "parallel": plot_parallel,
    "choices": plot_choices,
    "3d": plot_3d,
}
