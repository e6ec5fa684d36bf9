"""Pictures: of any front, in the format asked for, with what a reader needs on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from nas.costs import Figure, at_least, at_most, maximize, minimize
from nas.front import Evaluation, ParetoFront

OBJECTIVES = (maximize("accuracy"), minimize("latency_ms", "cpu"), minimize("model_bytes"))


def front(count: int = 3, objectives: int = 3, known: bool = True) -> ParetoFront:
    def point(i: int) -> Evaluation:
        latency = 0.5 * (i + 1)
        low, high = (latency * 0.9, latency * 1.1) if known else (None, None)
        figures = {
            "accuracy": Figure.share(0.7 + 0.005 * i, 500),
            "latency_ms@cpu": Figure(latency, low, high, "predicted"),
            "model_bytes": Figure.exact(1024 * (i + 1)),
        }
        return Evaluation(str(i), f"width={i}", figures, {})

    points = tuple(point(i) for i in range(count))
    worse = replace(points[0], id="worse")
    return ParetoFront(OBJECTIVES[:objectives], points, (worse,))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of each picture, kept while it is saved."""
    from matplotlib.figure import Figure as Canvas

    kept: list[Axes] = []
    save = Canvas.savefig

    def keep(figure: Any, *arguments: Any, **options: Any) -> None:
        kept.append(figure.axes[0])
        save(figure, *arguments, **options)

    monkeypatch.setattr(Canvas, "savefig", keep)
    return kept


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("known", [True, False])
def test_every_front_can_be_drawn(count: int, objectives: int, known: bool, tmp_path: Path) -> None:
    front(count, objectives, known).plot(tmp_path / "new" / "front.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "front.png").convert("L"))
    assert pixels.shape[0] > 400 and pixels.std() > 5
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["front.png"]


def test_axes_have_names_units_and_the_device_and_limits_are_drawn(drawn: list[Axes], tmp_path: Path) -> None:
    limits = (at_most("latency_ms", 1.2, "cpu"), at_least("accuracy", 0.71), at_most("flash_bytes", 99, "mcu"))
    replace(front(), limits=limits).plot(tmp_path / "front.png")
    (axes,) = drawn
    assert axes.get_xlabel() == "latency (ms) on cpu, predicted" and axes.get_ylabel() == "accuracy (%)"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert set(labels) == {"not on the front", "front", *map(str, limits)}
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["latency_ms@cpu<=1.2"].get_xdata()) == [1.2, 1.2]  # type: ignore[arg-type]
    assert list(lines["accuracy>=0.71"].get_ydata()) == [71.0, 71.0]  # type: ignore[arg-type]


def test_points_and_error_bars_are_where_they_belong(drawn: list[Axes], tmp_path: Path) -> None:
    front(objectives=2).plot(tmp_path / "front.png")
    front(objectives=2, known=False).plot(tmp_path / "front.png")
    for axes, half in zip(drawn, (0.05, 0.0), strict=True):
        line = next(line for line in axes.lines if line.get_label() == "front")
        assert list(line.get_xdata()) == [0.5, 1.0, 1.5]  # type: ignore[arg-type]
        assert list(line.get_ydata()) == pytest.approx([70, 70.5, 71])  # type: ignore[arg-type]
        segments = [s for c in axes.collections if hasattr(c, "get_segments") for s in c.get_segments()]
        assert segments[0][:, 0].tolist() == pytest.approx([0.5 - half, 0.5 + half])


def test_what_was_not_measured_anew_is_told_from_what_was(drawn: list[Axes], tmp_path: Path) -> None:
    plain = front()
    (worse,) = plain.others
    anew = {"accuracy": worse.figures["accuracy"]}
    points = tuple(replace(point, predicted=anew) for point in plain.points)
    others = (*(replace(worse, id=f"before{i}") for i in range(3)), replace(worse, id="anew", predicted=anew))
    replace(plain, points=points, others=others).plot(tmp_path / "front.png")
    counts = {each.get_label(): len(each.get_offsets()) for each in drawn[0].collections if len(each.get_offsets())}  # type: ignore[arg-type]
    assert counts["as the search saw it, not measured anew"] == 3 and counts["not on the front"] == 1


def test_what_left_the_front_is_marked_where_it_is(drawn: list[Axes], tmp_path: Path) -> None:
    plain = front()
    (worse,) = plain.others
    replace(plain, others=(worse, replace(worse, id="was best")), left=("was best",)).plot(tmp_path / "front.png")
    (marks,) = [each for each in drawn[0].collections if each.get_label() == "left the front once measured"]
    assert np.asarray(marks.get_offsets()).tolist() == [pytest.approx([0.5, 70])]


@pytest.mark.parametrize(
    ("points", "others", "said"),
    [
        ([False, False], [False], {"not on the front"}),
        ([False, False], [True], {"not on the front"}),
        ([False, False], [], set()),
        ([True, False], [False], {"as the search saw it, not measured anew"}),
        ([True, True], [True], {"not on the front"}),
        ([True, True], [], set()),
    ],
)
def test_others_are_called_by_what_is_known_of_them(
    points: list[bool], others: list[bool], said: set[str], drawn: list[Axes], tmp_path: Path
) -> None:
    """Of points and others, which were measured anew."""
    plain = front(len(points))
    anew = {"accuracy": plain.points[0].figures["accuracy"]}
    shown, rest = (
        tuple(replace(one, predicted=anew if told else {}) for one, told in zip(those, marks, strict=True))
        for those, marks in ((plain.points, points), (plain.others * len(others), others))
    )
    replace(plain, points=shown, others=rest).plot(tmp_path / "front.png")
    labels = {text.get_text() for text in drawn[0].get_legend().get_texts()}  # type: ignore[union-attr]
    assert labels - {"front"} == said


def test_other_formats_and_refusals(tmp_path: Path) -> None:
    front().plot(tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(ValueError, match="no point to draw"):
        ParetoFront(OBJECTIVES, ()).plot(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="nosuch"):
        front().plot(tmp_path / "front.nosuch")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["front.svg"]
