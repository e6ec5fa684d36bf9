"""Trust: reports by hand, what may be claimed of noise, and that each network is trained once."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from nas.cli import main
from nas.evaluate import accuracy, calibration_images, recalibrate
from nas.pipeline import Run
from nas.supernet import Supernet
from nas.train import train
from nas.train_settings import TrainSettings
from nas.trust import (
    ComparedNetwork,
    TrustReport,
    alone_settings,
    spread_over_macs,
    trust,
)
from search_spaces import Architecture
from tests.nas import tiny

SETTINGS = TrainSettings(epochs=2, batch_size=16, micro_batches=2, architectures=8, arithmetic="fp32")


def report(
    inherited: Sequence[float],
    alone: Sequence[float],
    macs: Sequence[int] | None = None,
    images: int = 1000,
    rollbacks: Sequence[int] = (),
) -> TrustReport:
    rows = zip(macs or range(10**6, 10**6 * len(alone) + 1, 10**6), inherited, alone, strict=True)
    networks = tuple(
        ComparedNetwork(f"{i:010x}", f"width={i}", m, a, b, 9000 * m, rollbacks[i] if rollbacks else 0)
        for i, (m, a, b) in enumerate(rows)
    )
    return TrustReport(networks, images, 100, 32, {"epochs": 2}, 0, "a space", "data", "weights")


# the report ----------------------------------------------------------------------------------------------


def test_a_report_by_hand() -> None:
    made = report([0.50, 0.60, 0.85, 0.80], [0.60, 0.80, 0.78, 0.90], images=1000)
    assert made.kendall.value == pytest.approx(2 / 6) and made.spearman.value == pytest.approx(0.4)
    assert made.regrets("inherited") == pytest.approx([0.0, 0.0, 0.02, 0.12])
    assert made.regrets("largest") == pytest.approx([0.0, 0.0, 0.02, 0.0])
    assert made.training_macs == 9000 * 10_000_000
    assert made.kendall_macs.value == pytest.approx(4 / 6) and made.kendall_gain.value == pytest.approx(-2 / 6)
    variances = [p * (1 - p) / 1000 for p in (0.60, 0.80, 0.78, 0.90)]
    assert made.noise_floor == pytest.approx(math.sqrt(2 * np.mean(variances)), rel=2e-3)
    assert made.is_real(3, 2) and not made.is_real(1, 2)  # 12 pp and 2 pp, where 90 % of equals differ by 3
    assert made.findings[0].startswith("No claim about the order")
    assert made.findings[1].startswith("5 of 6 pairs") and "orders 4 of them" in made.findings[1]
    assert "at 1 when picking by inherited accuracy and at 0 when taking the largest" in made.findings[2]
    assert made.findings[2].endswith("better by more than noise at 0, worse at 1.")
    assert len(made.findings) == 4  # nothing about collapses
    text = str(made)
    assert "rank correlation of MACs and stand-alone accuracy, which needs no supernet: Kendall tau-b 0.67 [" in text
    assert "1.82 pp on average; 2.99 pp between two, and 3.87 pp from the best of 4 to another may be noise" in text
    assert (
        "Kendall tau-b 0.33 [" in text and "regret of picking by inherited accuracy: mean 3.50 pp, max 12.00 pp" in text
    )
    assert "regret of taking the largest that fits: mean 0.50 pp, max 2.00 pp" in text
    assert text.splitlines()[1].split() == ["1", "0" * 10, "1", "50.00", "±1.58", "60.00", "±1.55", "-10.00", "±2.21"]


@pytest.mark.parametrize(
    ("inherited", "alone", "said"),
    [
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], "3 networks are too few"),
        ([0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4], "are equal"),
        ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], "better than chance"),
        ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], "worse than chance"),
        ([0.1, 0.2, 0.4, 0.3], [0.1, 0.2, 0.3, 0.4], "No claim about the order: one random order of 4"),
    ],
)
def test_what_may_be_claimed_about_the_order(inherited: list[float], alone: list[float], said: str) -> None:
    made = report(inherited, alone)
    assert said in made.findings[0] and made.findings[0] in str(made)
    json.dumps(made.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("inherited", "macs", "said"),
    [
        (
            range(12),
            [5, 1, 7, 3, 2, 9, 4, 11, 6, 10, 8, 12],
            "Inherited accuracy orders them better than their MACs do (tau of MACs",
        ),
        (
            [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10],
            range(1, 13),
            "Inherited accuracy orders them worse than their MACs do, which",
        ),
        (
            range(12),
            range(1, 13),
            "No claim that inherited accuracy orders them better than their MACs do, which need no supernet (tau",
        ),
        (
            [1, 0, *range(2, 12)],
            [2, 1, 4, 3, *range(5, 13)],
            "No claim that inherited accuracy orders them better than their MACs do",
        ),
        (range(12), [5] * 12, "MACs do not order the networks: all have the same."),
    ],
)
def test_the_first_finding_compares_with_the_order_of_macs(
    inherited: Sequence[float], macs: Sequence[int], said: str
) -> None:
    alone = np.linspace(0.5, 0.9, 12)
    made = report([0.4 + 0.01 * value for value in inherited], list(alone), list(macs))
    assert made.findings[0].startswith("Inherited accuracy orders the networks better than chance")
    assert said in made.findings[0]
    held = made.to_dict()
    assert {"value", "low", "high"} == set(held["kendall_tau_b_gain"]) == set(held["kendall_tau_b_macs"])  # type: ignore[call-overload]
    json.dumps(held, allow_nan=False)


@pytest.mark.parametrize(
    ("order", "tau"),
    [
        ([1, 0, 2, 3, 4], 8 / 10),
        ([1, 0, 3, 2, 4, 5], 11 / 15),
        ([5, 6, 7, 0, 1, 2, 3, 4, 9, 8, 10], 23 / 55),
        ([5, 6, 7, 8, 0, 1, 2, 3, 4, 9, 10, 11], 26 / 66),
    ],
)
def test_a_tau_at_the_bound_is_a_claim(order: list[int], tau: float) -> None:
    alone = [0.1 + 0.05 * i for i in range(len(order))]
    made = report([0.1 + 0.05 * i for i in order], alone)
    assert made.kendall.value == pytest.approx(tau)
    assert made.findings[0].startswith("Inherited accuracy orders the networks better than chance")
    worse = report([0.9 - 0.05 * i for i in order], alone)
    assert worse.findings[0].startswith("Inherited accuracy orders the networks worse than chance")
    order[-2:] = order[:-3:-1]  # one inversion more
    assert report([0.1 + 0.05 * i for i in order], alone).findings[0].startswith("No claim about the order")


@pytest.mark.parametrize("count", [3, 8, 20])
def test_equal_networks_seldom_have_a_regret_that_is_more_than_noise(count: int) -> None:
    rng = np.random.default_rng(0)
    alarms = {"inherited": 0, "largest": 0}
    for alone in rng.binomial(2000, 0.8, (1000, count)) / 2000:
        made = report(list(rng.random(count)), list(alone), images=2000)
        for rule in alarms:
            alarms[rule] += made.is_real_regret(made.picks[rule][-1])
    assert all(10 <= alarm <= 70 for alarm in alarms.values())  # 5 % at most, and not never


def test_a_real_regret_is_found() -> None:
    made = report([0.5] * 7 + [0.6], [0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.86], images=2000)
    assert "the regret is more than noise at 1 when picking by inherited accuracy and at 1" in made.findings[2]
    lower = report([0.5] * 7 + [0.6], [0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.88], images=2000)  # 2.02 standard errors
    assert lower.is_real(0, 7) and not lower.is_real_regret(lower.picks["largest"][-1])


def test_a_collapse_is_told() -> None:
    made = report([0.5, 0.6, 0.7, 0.8], [0.6, 0.1, 0.8, 0.9], rollbacks=[0, 2, 0, 1])
    assert made.findings[3].startswith("Trained alone, 2, 4 collapsed and went on with a lower learning rate")
    lines = str(made).splitlines()
    assert [line.partition("rollbacks: ")[2] for line in lines[2:5:2]] == ["2", "1"]
    assert not any("rollbacks" in line for line in lines[1:5:2])
    assert [row["rollbacks"] for row in made.to_dict()["networks"]] == [0, 2, 0, 1]  # type: ignore[attr-defined]


def test_the_file_holds_what_the_report_says(tmp_path: Path) -> None:
    made = report([0.50, 0.60, 0.85, 0.80], [0.60, 0.80, 0.78, 0.90])
    made.save(tmp_path / "trust.json")
    held = json.loads((tmp_path / "trust.json").read_text())
    assert held == made.to_dict() and held["schema"] == 1 and held["n"] == 4 and held["versions"]["torch"]
    assert held["networks"][2]["gap"] == pytest.approx(0.07)
    assert held["kendall_tau_b_macs"]["value"] == pytest.approx(4 / 6)
    last = held["regret"]["inherited"]["budgets"][-1]
    assert last["within"] == 4
    assert last["regret"] == pytest.approx(0.12)
    assert (last["picked"], last["best"], last["is_real"]) == (f"{2:010x}", f"{3:010x}", True)
    assert held["regret"]["largest"]["mean"] == pytest.approx(0.005)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of the pictures, kept while they are saved."""
    from matplotlib.figure import Figure

    kept: list[Axes] = []
    save = Figure.savefig

    def keep(figure: Any, *arguments: Any, **options: Any) -> None:
        kept.extend(figure.axes)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


@pytest.mark.parametrize(("count", "equal"), [(3, True), (30, False)])
def test_every_report_can_be_drawn(count: int, equal: bool, tmp_path: Path) -> None:
    alone = [0.5] * count if equal else list(np.linspace(0.5, 1.0, count))
    report(alone, alone).plot(tmp_path / "new" / "trust.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "trust.png").convert("L"))
    assert pixels.shape[0] > 600 and pixels.std() > 5


def test_accuracies_and_regrets_are_where_they_belong(drawn: list[Axes], tmp_path: Path) -> None:
    report([0.50, 0.60, 0.85, 0.80], [0.60, 0.80, 0.78, 0.90]).plot(tmp_path / "trust.png")
    agreement, over_macs, below = drawn
    offsets = [np.asarray(drawn_.get_offsets()) for drawn_ in agreement.collections]
    (points,) = [offset for offset in offsets if len(offset) == 4]
    assert points[2].tolist() == pytest.approx([85, 78])
    assert agreement.get_xlim() == agreement.get_ylim()
    assert [text.get_text() for text in agreement.texts] == ["1", "2", "3", "4"]
    alone = np.asarray(over_macs.lines[0].get_xydata())
    assert alone[:, 0].tolist() == [1, 2, 3, 4] and alone[:, 1].tolist() == pytest.approx([60, 80, 78, 90])
    bars = [bar.get_segments() for container in over_macs.containers for bar in container.lines[2]]  # type: ignore[union-attr]
    errors = 100 * np.array([[0.6, 0.8, 0.78, 0.9], [0.5, 0.6, 0.85, 0.8]])
    for drawn_, values in zip(bars, errors, strict=True):  # the standard errors of the table
        lengths = [float(segment[1, 1] - segment[0, 1]) / 2 for segment in drawn_]
        assert lengths == pytest.approx(np.sqrt(values * (100 - values) / 1000), rel=5e-3)
    lines = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in below.lines}
    assert lines["picking by inherited: mean 3.50"] == pytest.approx([0, 0, 2, 12])
    assert lines["taking the largest: mean 0.50"] == pytest.approx([0, 0, 2, 0])
    assert over_macs.get_xscale() == below.get_xscale() == "log"


# choosing ------------------------------------------------------------------------------------------------


def test_networks_are_spread_from_the_smallest_to_the_largest() -> None:
    space = tiny.space(precisions=("fp32", "int8"), width_multipliers=(0.5, 0.75, 1.0), expansions=(1, 2, 4))
    chosen = spread_over_macs(space, 9, np.random.default_rng(0))
    assert len(set(chosen)) == 9 and chosen[:2] == [space.smallest, space.largest]
    assert all(set(space.lower(a).precisions.values()) == {"fp32"} for a in chosen)
    logs = np.sort(np.log([space.lower(a).macs for a in chosen]))
    assert np.diff(logs).max() < 2.5 * (logs[-1] - logs[0]) / 8
    assert spread_over_macs(space, 5, np.random.default_rng(0)) == chosen[:5]
    assert spread_over_macs(space, 5, np.random.default_rng(1)) != chosen[:5]


ONE_STAGE = {"widths": (8,), "strides": (2,), "width_multipliers": (1.0,)}


@pytest.mark.parametrize(
    ("options", "networks"),
    [
        ({"depths": (1,), "width_multipliers": (1.0,)}, 4),  # two blocks of two expansions
        (ONE_STAGE | {"depths": (1, 2), "kernels": (3, 5, 7)}, 42),  # of which random ones miss a few
        (ONE_STAGE | {"depths": (1, 2, 3), "kernels": (3, 5)}, 84),
        ({}, 144),
        ({"kernels": (3, 5)}, 10**9),  # too many to list
    ],
)
def test_as_many_come_back_as_are_asked_for_where_the_space_has_them(options: dict[str, Any], networks: int) -> None:
    space = tiny.space(precisions=("fp32", "int8"), **options)
    for seed in range(3):
        for count in (3, 19, 64):
            chosen = spread_over_macs(space, count, np.random.default_rng(seed))
            assert len(set(chosen)) == len(chosen) == min(count, networks)
            assert all(space.undeployed(architecture) == architecture for architecture in chosen)


def test_a_small_space_has_few_networks_and_too_few_are_refused() -> None:
    small = tiny.space(width_multipliers=(1.0,), depths=(1,), precisions=("fp32",))
    assert len(spread_over_macs(small, 8, np.random.default_rng(0))) == small.size < 8
    even = {"widths": (8, 8), "strides": (1, 1), "depths": (2,)}  # four blocks alike: 16 networks, five numbers of MACs
    alike = tiny.space(width_multipliers=(1.0,), precisions=("fp32",), **even)
    chosen = spread_over_macs(alike, 12, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen) > 5 and len({alike.lower(a).macs for a in chosen}) == 5
    for count in (2, 65):
        with pytest.raises(ValueError, match=f"networks = {count}; expected 3 to 64"):
            spread_over_macs(small, count, np.random.default_rng(0))
    with pytest.raises(ValueError, match="the space has 1 networks"):
        spread_over_macs(small.only(small.largest), 3, np.random.default_rng(0))


def test_settings_alone_keep_the_budget() -> None:
    settings = TrainSettings(strategy="sandwich", micro_batches=3, flip=True, kernel_transforms=True, warmup=0.2)
    alone = alone_settings(settings)
    assert alone.images_a_step == settings.images_a_step == 192
    assert replace(alone, strategy="sandwich", kernel_transforms=True) == settings and alone.strategy == "uniform"


# training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Supernet:
    made = Supernet(tiny.space())
    train(made, tiny.data(), folder=tmp_path_factory.mktemp("supernet"), settings=SETTINGS)
    return made.eval()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the trainings that were begun."""
    begun: list[Path] = []
    module = importlib.import_module("nas.trust")
    real = module.train

    def counted(*arguments: Any, **options: Any) -> Any:
        begun.append(options["folder"])
        return real(*arguments, **options)

    monkeypatch.setattr(module, "train", counted)
    return begun


def compare(supernet: Supernet, folder: Path, **options: Any) -> TrustReport:
    asked: dict[str, Any] = {"settings": SETTINGS, "networks": 3} | options
    return trust(supernet, tiny.data(), folder=folder, **asked)


def held_accuracy(supernet: Supernet, architecture: Architecture) -> float:
    subnet = supernet.extract(architecture)
    recalibrate(subnet, calibration_images(tiny.data(), subnet))
    return accuracy(subnet, tiny.data(), "val_front")


def test_both_accuracies_are_those_of_networks_trained_by_hand(supernet: Supernet, tmp_path: Path) -> None:
    before = supernet.digest()
    made = compare(supernet, tmp_path)
    assert supernet.digest() == before == made.supernet_sha256
    space, data = supernet.space, tiny.data()
    assert [n.architecture for n in (made.networks[0], made.networks[-1])] == [str(space.smallest), str(space.largest)]
    assert made.validation_images == len(data["val_front"])
    assert made.images_a_step == 32 and made.steps == 2 * (len(data["train"]) // 32)
    for network in made.networks:
        architecture = space.parse(network.architecture)
        assert network.id == architecture.id and network.macs == space.lower(architecture).macs
        assert network.inherited == held_accuracy(supernet, architecture)
        assert network.training_macs == 3 * network.macs * made.steps * 32 and network.rollbacks == 0
        alone = Supernet(space.only(architecture), seed=0)
        train(alone, data, seed=0, settings=replace(SETTINGS, strategy="uniform"))
        assert network.alone == held_accuracy(alone, alone.space.largest)


def test_what_was_trained_is_not_trained_again(supernet: Supernet, tmp_path: Path, trained: list[Path]) -> None:
    first = compare(supernet, tmp_path)
    assert len(trained) == 3
    for folder in trained:
        assert {path.name for path in folder.iterdir()} == {"result.json", "metrics.jsonl"}
    held = json.loads((trained[0] / "result.json").read_text())
    assert len(held["weights_sha256"]) == 64 and held["rollbacks"] == 0
    assert held["macs"] in [network.training_macs for network in first.networks]
    assert held["key"]["settings"]["strategy"] == "uniform" and held["key"]["data"] == tiny.data().key
    trained.clear()
    again = compare(supernet, tmp_path)
    assert again == first and trained == [] and again.kendall == first.kendall
    more = compare(supernet, tmp_path, networks=4)
    assert len(trained) == 1 and set(first.networks) < set(more.networks)


def test_what_it_depends_on_makes_it_anew(supernet: Supernet, tmp_path: Path, trained: list[Path]) -> None:
    short = replace(SETTINGS, epochs=1)
    folder = tmp_path / supernet.space.smallest.id
    for changed in ({"settings": short}, {"settings": replace(short, learning_rate=0.2)}, {"settings": short}):
        trained.clear()
        compare(supernet, tmp_path, **changed)
        assert len(trained) == 3
    trained.clear()
    (folder / "result.json").write_text("{")
    compare(supernet, tmp_path, settings=short)
    assert trained == [folder]
    first = json.loads((folder / "result.json").read_text())
    compare(supernet, tmp_path, settings=short, seed=5)
    second = json.loads((folder / "result.json").read_text())
    assert len(trained) == 4 and first["weights_sha256"] != second["weights_sha256"]


def test_a_report_that_was_killed_goes_on(
    supernet: Supernet, tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(supernet, tmp_path / "whole")
    trainer = importlib.import_module("nas.train")._Trainer
    real = trainer._train_step
    done: list[int] = []

    def dying(self: Any, *arguments: Any) -> Any:
        if len(done) == whole.steps + whole.steps * 3 // 4:  # in the second epoch of the second network
            raise KeyboardInterrupt
        done.append(self.step)
        return real(self, *arguments)

    monkeypatch.setattr(trainer, "_train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        compare(supernet, tmp_path / "killed")
    trained.clear()
    done.clear()
    assert compare(supernet, tmp_path / "killed") == whole
    assert len(trained) == 2 and done[0] == whole.steps // 2  # from the end of the first epoch
    digests = [
        [json.loads((tmp_path / name / n.id / "result.json").read_text())["weights_sha256"] for n in whole.networks]
        for name in ("whole", "killed")
    ]
    assert digests[0] == digests[1]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_collapse_is_kept_with_what_it_cost(
    supernet: Supernet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Path]
) -> None:
    trainer = importlib.import_module("nas.train")._Trainer
    real = trainer._train_step
    spoilt: list[int] = []

    def once(self: Any, *arguments: Any) -> float:
        loss = float(real(self, *arguments))
        if self.step == 5 and not spoilt:  # in the second epoch of the first network
            spoilt.append(self.step)
            with torch.no_grad():
                next(iter(self.supernet.parameters())).fill_(float("nan"))
        return loss

    monkeypatch.setattr(trainer, "_train_step", once)
    made = compare(supernet, tmp_path)
    assert spoilt and sorted(network.rollbacks for network in made.networks) == [0, 0, 1]
    (fallen,) = [network for network in made.networks if network.rollbacks]
    planned = 3 * fallen.macs * made.steps * 32
    assert fallen.training_macs > planned and made.training_macs > planned
    assert "collapsed" in made.findings[-2] and compare(supernet, tmp_path) == made


# the command ---------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Run, "open", lambda *_: pytest.fail("the run was opened"))
    assert main(["trust", str(tmp_path), "--plot", str(tmp_path / "x.zip")]) == 2
    out, err = capsys.readouterr()
    assert "expected one of the formats" in err and "svg" in err and not out


def test_the_table_is_printed_before_the_picture_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = report([0.50, 0.60, 0.85, 0.80], [0.60, 0.80, 0.78, 0.90])
    (tmp_path / "file").write_text("")
    run = Run(tmp_path, None)  # type: ignore[arg-type]
    monkeypatch.setattr(Run, "open", lambda *_: run)
    monkeypatch.setattr(Run, "trust", lambda *_: made)
    assert main(["trust", str(tmp_path), "--plot", str(tmp_path / "file" / "x.png")]) != 0  # no folder
    assert capsys.readouterr().out.rstrip("\n") == str(made)
