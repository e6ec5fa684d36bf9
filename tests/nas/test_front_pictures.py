"""Every kind of picture, of fronts of one to four objectives, and of two fronts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas import importance
from nas.costs import Figure, Objective, maximize, minimize
from nas.front import Evaluation, ParetoFront
from nas.front_pictures import KINDS, plot_against

OBJECTIVES = (
    maximize("accuracy"),
    minimize("latency_ms", "cpu"),
    minimize("model_bytes"),
    Objective("speed", "maximize", foreign=True),
)


@pytest.fixture(autouse=True)
def _small_forests(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good the shares are is not what the pictures are tested for."""
    monkeypatch.setattr(importance, "TREES", 3)


def front(objectives: int, seed: int = 0, count: int = 40) -> ParetoFront:
    rng = np.random.default_rng(seed)
    evaluations = []
    for i in range(count):
        depth, width = (int(x) for x in rng.integers(0, 3, 2))
        values = (0.6 + 0.1 * depth + 0.01 * rng.uniform(), 4.0**depth, 2000.0 * 3**width, float(rng.uniform(-1, 1)))
        figures = {o.key: Figure(v, None, None, "given") for o, v in zip(OBJECTIVES, values, strict=True)}
        evaluations.append(Evaluation(str(i), f"depth={depth},block0.width={width}", figures, {}))
    return ParetoFront.of(evaluations, OBJECTIVES[:objectives])


def is_drawn(path: Path) -> bool:
    pixels = np.asarray(Image.open(path).convert("L"))
    return pixels.shape[0] > 200 and pixels.std() > 5 and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_every_front_is_drawn_or_the_reason_told(kind: str, objectives: int, tmp_path: Path) -> None:
    path = tmp_path / "new" / "front.png"
    if kind == "3d" and objectives != 3:
        with pytest.raises(ValueError, match="needs three objectives"):
            front(objectives).plot(path, kind)
        assert not path.parent.exists()
    else:
        front(objectives).plot(path, kind)
        assert is_drawn(path)


def test_small_and_wrong_fronts(tmp_path: Path) -> None:
    for kind in ("parallel", "choices", "3d"):
        front(3, count=3).plot(tmp_path / kind / "few.png", kind)
        assert is_drawn(tmp_path / kind / "few.png")
    with pytest.raises(ValueError, match="no picture of kind 'pie'; expected one of front, parallel"):
        front(2).plot(tmp_path / "x.png", "pie")
    with pytest.raises(ValueError, match="no point to draw"):
        ParetoFront(OBJECTIVES, ()).plot(tmp_path / "x.png", "choices")


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_region_between_two_fronts_is_shaded_where_one_is_ahead(
    objectives: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    shaded: list[tuple[str, int]] = []
    fill = Axes.fill_between

    def keep(axes: Axes, x: list[float], *heights: list[float], **options: object) -> object:
        if len(x):
            shaded.append((str(options["color"]), int(np.sum(options["where"]))))  # type: ignore[arg-type]
        return fill(axes, x, *heights, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "fill_between", keep)
    better = front(objectives)
    worse = ParetoFront.of([e for e in better.points if e["latency_ms@cpu"] < 4], better.objectives)
    plot_against(better.against(worse), tmp_path / "a" / "p.png")
    assert is_drawn(tmp_path / "a" / "p.png")
    assert shaded[0][1] > 0 and shaded[1][1] == 0
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_against(front(1).against(front(1)), tmp_path / "x.png")
