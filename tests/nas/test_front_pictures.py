"""Every kind of picture, of fronts of one to four objectives, and of two fronts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def test_the_region_between_two_fronts_is_shaded_for_who_is_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    areas: list[float] = []
    fill = Axes.fill_between

    def keep(axes: Axes, x: list[float], *heights: list[float], where: list[bool] | None = None, **options: Any) -> Any:
        if where is not None:
            filled = np.array(where[:-1]) & np.array(where[1:])
            apart = np.abs(np.subtract(*heights))
            areas.append(float((np.diff(x) * (apart[:-1] + apart[1:]) / 2)[filled].sum()))
        return fill(axes, x, *heights, where=where, **options)

    def of(*values: tuple[float, float]) -> ParetoFront:
        objectives = (Objective("acc", "maximize", foreign=True), Objective("ms", "minimize", foreign=True))
        figures = [{"acc": Figure.exact(acc), "ms": Figure.exact(ms)} for acc, ms in values]
        return ParetoFront.of([Evaluation(str(i), "", f, {}) for i, f in enumerate(figures)], objectives)

    monkeypatch.setattr(Axes, "fill_between", keep)
    first, second = of((0, 1), (10, 3)), of((5, 2), (8, 3), (10, 5))
    plot_against(first.against(second, {"acc": -5, "ms": 6}), tmp_path / "a" / "p.png")
    assert is_drawn(tmp_path / "a" / "p.png")
    assert areas == pytest.approx([5 + 2 * 2, 5])  # where the other has no point, down to the reference
    plot_against(front(3).against(front(3, seed=1)), tmp_path / "b" / "p.png")
    assert is_drawn(tmp_path / "b" / "p.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_against(front(1).against(front(1)), tmp_path / "x.png")
