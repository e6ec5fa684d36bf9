"""Trust: the statistics against definitions and tables, regrets by hand, and that each network is trained once."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from nas.evaluate import accuracy, calibration_images, recalibrate
from nas.supernet import Supernet
from nas.train import train
from nas.train_settings import TrainSettings
from nas.trust import (
    ComparedNetwork,
    TrustReport,
    alone_settings,
    bootstrap,
    chance_tau,
    kendall_tau,
    picks,
    regrets,
    spearman_rho,
    spread_over_macs,
    standard_error,
    trust,
)
from search_spaces import Architecture
from tests.nas import tiny

SETTINGS = TrainSettings(epochs=2, batch_size=16, micro_batches=2, architectures=8, arithmetic="fp32")


def report(
    inherited: list[float], alone: list[float], macs: list[int] | None = None, images: int = 1000
) -> TrustReport:
    rows = zip(macs or range(10**6, 10**6 * len(alone) + 1, 10**6), inherited, alone, strict=True)
    networks = tuple(ComparedNetwork(f"{i:010x}", f"width={i}", m, a, b) for i, (m, a, b) in enumerate(rows))
    return TrustReport(networks, images, 100, 32, {"epochs": 2}, 0, "a space", "data", "weights")


# statistics ----------------------------------------------------------------------------------------------


def tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """By the definition: over all pairs."""
    agree = ties_x = ties_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        agree += int(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]))
        ties_x += x[i] == x[j]
        ties_y += y[i] == y[j]
    pairs = len(x) * (len(x) - 1) // 2
    return float(agree / math.sqrt((pairs - ties_x) * (pairs - ties_y)))


def ranks(x: np.ndarray) -> np.ndarray:
    return np.array([sum(x < v) + (sum(x == v) + 1) / 2 for v in x])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 1000])  # with and without ties
def test_rank_correlations_are_those_of_their_definitions(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(levels, size=9).astype(float)
    y = x + rng.integers(levels, size=9)
    assert kendall_tau(x, y) == pytest.approx(tau_b(x, y))
    assert spearman_rho(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    assert kendall_tau(x, -x) == spearman_rho(x, -x) == pytest.approx(-1.0)


def test_a_correlation_with_equals_only_is_not_defined() -> None:
    x, y = np.arange(4.0), np.full(4, 0.5)
    for statistic in (kendall_tau, spearman_rho):
        assert statistic(x, y) is None and statistic(y, x) is None
        assert bootstrap(statistic, x, y, np.random.default_rng(0), 20).low is None


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    x = np.random.default_rng(1).normal(2.0, 3.0, 400)
    found = bootstrap(lambda a, b: float((a + b).mean()), x, -x / 2, np.random.default_rng(0), 4000)
    middle, half = (x / 2).mean(), 1.645 * (x / 2).std() / 20
    assert found.value == pytest.approx(middle)
    assert [found.low, found.high] == pytest.approx([middle - half, middle + half], abs=0.1 * half)


def test_pairs_are_drawn_together_and_undefined_draws_left_out() -> None:
    x = np.array([1.0, 2.0, 3.0])
    found = bootstrap(kendall_tau, x, 10 * x, np.random.default_rng(0), 200)  # a ninth of the draws are constant
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    again = [bootstrap(kendall_tau, x, x[::-1] ** 2, np.random.default_rng(3), 50) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("count", "tau"), [(4, 1.0), (5, 0.8), (6, 11 / 15), (7, 13 / 21), (8, 16 / 28), (9, 0.5), (10, 21 / 45)]
)  # the published table: two-tailed, 10 %
def test_chance_is_that_of_kendalls_table(count: int, tau: float) -> None:
    assert chance_tau(count) == pytest.approx(tau)


def test_chance_is_that_of_all_orders() -> None:
    assert chance_tau(2) is None and chance_tau(3) is None
    for count in (4, 5, 6):
        pairs = list(itertools.combinations(range(count), 2))
        orders = list(itertools.permutations(range(count)))
        taus = np.array([sum(1 if o[i] < o[j] else -1 for i, j in pairs) for o in orders]) / len(pairs)
        bound = min(t for t in set(taus[taus > 0]) if np.mean(np.abs(taus) >= t - 1e-9) <= 0.1 + 1e-9)
        assert chance_tau(count) == pytest.approx(bound)


def test_standard_errors_of_shares() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 98) == pytest.approx(math.sqrt(0.99 * 0.01 / 98)) == standard_error(0.0, 98)
    drawn = np.random.default_rng(0).binomial(500, 0.8, 20_000) / 500
    assert standard_error(0.8, 500) == pytest.approx(drawn.std(), rel=0.02)


# regrets -------------------------------------------------------------------------------------------------


def test_regrets_by_hand_with_ties() -> None:
    macs = np.array([20, 10, 30, 20])
    alone = np.array([0.80, 0.70, 0.78, 0.75])
    inherited = np.array([0.6, 0.6, 0.7, 0.7])
    found = picks(macs, alone, inherited)
    assert [p.budget_macs for p in found] == [10, 20, 30]
    assert [p.best for p in found] == [1, 0, 0]
    assert [p.picked for p in found] == [1, 3, 3]  # at 30 two have 0.7: the one with fewer MACs
    assert regrets(found, alone) == pytest.approx([0.0, 0.05, 0.05])
    largest = picks(macs, alone, macs)
    assert [p.picked for p in largest] == [1, 0, 2]  # at 20 two have 20 MACs: the first
    assert regrets(largest, alone) == pytest.approx([0.0, 0.0, 0.02])
    equal = picks(macs, alone, np.full(4, 0.5))
    assert [p.picked for p in equal] == [1, 1, 1]
    assert regrets(equal, alone) == pytest.approx([0.0, 0.10, 0.10])


@pytest.mark.parametrize("seed", range(5))
def test_regrets_are_those_of_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    macs, alone, score = rng.permutation(12) + 1, rng.random(12), rng.random(12)
    expected = []
    for budget in sorted(macs):
        fits = [i for i in range(12) if macs[i] <= budget]
        expected.append(max(alone[i] for i in fits) - alone[max(fits, key=lambda i: score[i])])
    assert regrets(picks(macs, alone, score), alone) == pytest.approx(expected)
    assert not regrets(picks(macs, alone, 3 * alone), alone).any()


# the report ----------------------------------------------------------------------------------------------


def test_a_report_by_hand() -> None:
    made = report([0.50, 0.60, 0.85, 0.80], [0.60, 0.80, 0.78, 0.90], images=1000)
    assert made.kendall.value == pytest.approx(2 / 6) and made.spearman.value == pytest.approx(0.4)
    assert made.regrets("inherited") == pytest.approx([0.0, 0.0, 0.02, 0.12])
    assert made.regrets("largest") == pytest.approx([0.0, 0.0, 0.02, 0.0])
    assert made.training_macs == 3 * 10_000_000 * 100 * 32
    variances = [p * (1 - p) / 1000 for p in (0.60, 0.80, 0.78, 0.90)]
    assert made.noise_floor == pytest.approx(math.sqrt(2 * np.mean(variances)), rel=2e-3)
    assert made.is_real(3, 2) and not made.is_real(1, 2)  # 12 pp and 2 pp, where 90 % of equals differ by 3
    assert made.findings[0].startswith("No claim about the order")
    assert made.findings[1].startswith("5 of 6 pairs") and "orders 4 of them" in made.findings[1]
    assert "at 1 when picking by inherited accuracy and at 0 when taking the largest" in made.findings[2]
    assert made.findings[2].endswith("better by more than noise at 0, worse at 1.")
    text = str(made)
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


def test_the_file_holds_what_the_report_says(tmp_path: Path) -> None:
    made = report([0.50, 0.60, 0.85, 0.80], [0.60, 0.80, 0.78, 0.90])
    made.save(tmp_path / "trust.json")
    held = json.loads((tmp_path / "trust.json").read_text())
    assert held == made.to_dict() and held["schema"] == 1 and held["n"] == 4 and held["versions"]["torch"]
    assert held["networks"][2]["gap"] == pytest.approx(0.07)
    last = held["regret"]["inherited"]["budgets"][-1]
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
        alone = Supernet(space.only(architecture), seed=0)
        train(alone, data, seed=0, settings=replace(SETTINGS, strategy="uniform"))
        assert network.alone == held_accuracy(alone, alone.space.largest)


def test_what_was_trained_is_not_trained_again(supernet: Supernet, tmp_path: Path, trained: list[Path]) -> None:
    first = compare(supernet, tmp_path)
    assert len(trained) == 3
    for folder in trained:
        assert {path.name for path in folder.iterdir()} == {"result.json", "metrics.jsonl"}
    held = json.loads((trained[0] / "result.json").read_text())
    assert len(held["weights_sha256"]) == 64 and held["steps"] == first.steps
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
