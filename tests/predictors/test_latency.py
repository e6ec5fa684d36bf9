"""The latency predictor on networks whose latency is known by construction."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from hardware_profiles.cost_model import UnsupportedLayer
from predictors import LatencyPredictor, NotFitted
from search_spaces import CompactTransformer, MobileNet, Network

SPACE = MobileNet(resolutions=(8,), channels=1)


def price(network: Network) -> float:
    """A device of our own making: starting a layer, a float MAC, an integer MAC, each with its price in ms."""
    total = 0.004
    for layer in network.layers:
        per_mac = 1e-8 if layer.precision.is_quantized else 3e-8
        total += layer.macs * per_mac + (0.002 if layer.kind == "conv2d" else 0.0)
    return total


def measured(count: int, seed: int, noise: float = 0.0) -> tuple[list[Network], np.ndarray]:
    rng = np.random.default_rng(seed)
    networks = [SPACE.lower(SPACE.sample(rng)) for _ in range(count)]
    return networks, np.array([price(network) for network in networks]) * np.exp(rng.normal(0, noise, count))


@pytest.fixture(scope="module")
def fitted() -> LatencyPredictor:
    return LatencyPredictor().fit(*measured(72, seed=0, noise=0.02), provenance={"device": "made up", "threads": 1})


def test_it_finds_a_device_that_is_a_sum_over_layers() -> None:
    predictor = LatencyPredictor().fit(*measured(72, seed=0))
    networks, latency = measured(20, seed=1)
    means = [prediction.mean_ms for prediction in predictor.predict(networks)]
    assert means == pytest.approx(latency, rel=0.01)


def test_its_table_predicts_codes_as_it_predicts_networks(fitted: LatencyPredictor) -> None:
    codes = SPACE.encode([SPACE.sample(np.random.default_rng(5)) for _ in range(3)])
    single = fitted.predict([SPACE.lower(SPACE.from_codes(row)) for row in codes])
    together = fitted.table(SPACE).predict(codes)
    assert together.mean_ms.tolist() == pytest.approx([one.mean_ms for one in single])
    assert together.high_ms is not None
    assert together.high_ms.tolist() == pytest.approx([one.high_ms for one in single])
    with pytest.raises(NotFitted):
        LatencyPredictor().table(SPACE)


def block_price(network: Network, block: int = 8) -> float:
    """A device that computes so many channels at once, and has a slower kernel for convolutions with fewer."""
    total = 0.004
    for layer in network.layers:
        if layer.kind == "conv2d":
            inputs, outputs = (-(-count // block) * block for count in (layer.in_shapes[0][0], layer.out_shape[0]))
            products = layer.kernel**2 * outputs * (1 if layer.is_depthwise else inputs)
            total += 2e-8 * products * layer.out_shape[1] * layer.out_shape[2]
            total += 0.002 + 0.003 * (min(layer.in_shapes[0][0], layer.out_shape[0]) < block)
    return total


NARROW = MobileNet(resolutions=(8, 12), channels=1, widths=(4, 12, 20), width_multipliers=(0.5, 1.0, 2.0), divisor=4)


def narrow(count: int, seed: int, block: int = 8) -> tuple[list[Network], list[float]]:
    rng = np.random.default_rng(seed)
    networks = [NARROW.lower(NARROW.sample(rng)) for _ in range(count)]
    return networks, [block_price(network, block) for network in networks]


@pytest.mark.parametrize(("given", "block"), [(None, 8), (8, 8), (None, 16)])
def test_it_finds_how_many_channels_a_device_computes_at_once(given: int | None, block: int, tmp_path: Path) -> None:
    predictor = LatencyPredictor(channel_block=given).fit(*narrow(72, 0, block))
    networks, latency = narrow(40, 1, block)
    assert predictor.report()["channel_block"] == block
    assert [one.mean_ms for one in predictor.predict(networks)] == pytest.approx(latency, rel=0.01)
    codes = NARROW.encode([NARROW.sample(np.random.default_rng(2)) for _ in range(40)])
    single = predictor.predict([NARROW.lower(NARROW.from_codes(row)) for row in codes])
    assert predictor.table(NARROW).predict(codes).mean_ms == pytest.approx([one.mean_ms for one in single])
    predictor.save(tmp_path / "blocks.json")
    assert LatencyPredictor.load(tmp_path / "blocks.json").predict(networks) == predictor.predict(networks)


def test_a_block_that_is_given_is_taken() -> None:
    predictor = LatencyPredictor(channel_block=32).fit(*narrow(72, seed=0))
    assert predictor.report()["channel_block"] == predictor.model.channel_block == 32
    found = LatencyPredictor().fit(*narrow(72, seed=0))
    assert found.report()["mape"] < predictor.report()["mape"] / 2
    with pytest.raises(ValueError, match="blocks of one channel or more, got 0"):
        LatencyPredictor(channel_block=0)


def test_the_report_is_close_to_the_error_on_fresh_networks(fitted: LatencyPredictor) -> None:
    networks, latency = measured(60, seed=2, noise=0.02)
    error = np.abs([prediction.mean_ms for prediction in fitted.predict(networks)] / latency - 1)
    report = fitted.report()
    assert report["networks"] == 72 and report["folds"] == 10
    assert report["mape"] == pytest.approx(error.mean(), rel=0.5)
    assert report["mape"] < 0.05 < report["macs_only"]["mape"]
    assert report["spearman"] > report["macs_only"]["spearman"]
    assert report["within_10_percent"] > 0.9


def test_errors_and_interval_are_those_of_the_representative_networks() -> None:
    """The others, whose latencies are noisier here, teach the same model; errors of all are the mean over both."""
    networks, latency = measured(72, seed=0)
    drawn = np.arange(72) % 2 == 0
    latency = np.where(drawn, latency, latency * np.exp(np.random.default_rng(1).normal(0, 0.2, 72)))
    few, rest, every = (LatencyPredictor().fit(networks, latency, representative=m) for m in (drawn, ~drawn, None))
    assert few.model == rest.model == every.model
    reports = [predictor.report() for predictor in (few, rest, every)]
    assert [report["judged_on"] for report in reports] == [36, 36, 72]
    for name in ("mape", "within_10_percent"):
        for own, other, whole in (reports, [report["macs_only"] for report in reports]):
            assert own[name] != other[name] and whole[name] == pytest.approx((own[name] + other[name]) / 2, abs=1e-4)
    assert reports[0]["relative_error_90"] < reports[2]["relative_error_90"] < reports[1]["relative_error_90"]
    alike = [networks[0]] * 8 + networks[:9] + networks[20:30]  # 9 of those that are marked are distinct
    with pytest.raises(ValueError, match="at least 10 distinct representative networks, got 9"):
        LatencyPredictor().fit(alike, np.ones(27), representative=np.arange(27) < 17)
    with pytest.raises(ValueError, match=r"one mark for each of 72 networks, got shape \(71,\)"):
        LatencyPredictor().fit(networks, latency, representative=drawn[1:])


def test_the_interval_covers_nine_of_ten_fresh_networks(fitted: LatencyPredictor) -> None:
    networks, latency = measured(100, seed=3, noise=0.02)
    inside = [p.low_ms <= y <= p.high_ms for p, y in zip(fitted.predict(networks), latency, strict=True)]
    assert 0.8 <= np.mean(inside) <= 0.99
    half = fitted.report()["relative_error_90"]
    assert fitted.predict(networks[:1])[0].high_ms == pytest.approx(
        fitted.predict(networks[:1])[0].mean_ms * (1 + half)
    )


def test_the_same_measurements_and_seed_give_the_same_predictor(fitted: LatencyPredictor) -> None:
    again = LatencyPredictor().fit(*measured(72, seed=0, noise=0.02))
    assert again.report() == fitted.report() and again.model == fitted.model
    assert LatencyPredictor(seed=1).fit(*measured(72, seed=0, noise=0.02)).report() != fitted.report()


def test_it_reads_back_what_it_saved(fitted: LatencyPredictor, tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    fitted.save(path)
    loaded = LatencyPredictor.load(path)
    networks, _ = measured(5, seed=4)
    assert loaded.predict(networks) == fitted.predict(networks)
    assert loaded.report() == fitted.report()
    assert loaded.provenance == {"device": "made up", "threads": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_it_fits_again_as_before_it_was_saved(tmp_path: Path) -> None:
    predictor = LatencyPredictor(folds=5, seed=3).fit(*measured(40, seed=0, noise=0.02))
    predictor.save(tmp_path / "cpu.json")
    again = LatencyPredictor.load(tmp_path / "cpu.json").fit(*measured(40, seed=0, noise=0.02))
    assert again.report() == predictor.report()
    LatencyPredictor(channel_block=32).fit(*narrow(72, seed=0)).save(tmp_path / "given.json")
    given = LatencyPredictor.load(tmp_path / "given.json").fit(*narrow(72, seed=0))
    assert given.report()["channel_block"] == 32  # and not the one that predicts best


def test_nothing_is_written_where_saving_fails(fitted: LatencyPredictor, tmp_path: Path) -> None:
    (tmp_path / "cpu.json").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError):
        fitted.save(tmp_path / "cpu.json")
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.json"]


def test_an_old_foreign_or_damaged_file_is_refused(fitted: LatencyPredictor, tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    fitted.save(path)
    document = json.loads(path.read_text())
    for change, message in [
        ({"version": 1}, "version 1, this program reads 2; fit it again"),
        ({"schema": "other"}, "is not a saved latency predictor"),
        ({"coefficients_ms": [1, 2]}, "damaged"),
        ({"folds": "many"}, "damaged"),
    ]:
        path.write_text(json.dumps(document | change))
        with pytest.raises(ValueError, match=message):
            LatencyPredictor.load(path)
    for content, message in [("[1]", "is not a saved latency predictor"), ("{", "is not JSON"), ("", "is not JSON")]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            LatencyPredictor.load(path)


def test_unfitted_it_says_so() -> None:
    predictor = LatencyPredictor()
    for ask in (lambda: predictor.predict([]), predictor.report, lambda: predictor.model, lambda: predictor.provenance):
        with pytest.raises(NotFitted, match=r"call fit\(networks, latency_ms\)"):
            ask()
    assert issubclass(NotFitted, RuntimeError)


def test_layers_it_never_saw_are_refused(fitted: LatencyPredictor) -> None:
    space = CompactTransformer(resolutions=(8,), channels=1)
    with pytest.raises(UnsupportedLayer, match=r"tokenizer0\.pool"):
        fitted.predict([space.lower(space.smallest)])


def test_what_cannot_be_fitted_is_refused() -> None:
    networks, latency = measured(12, seed=5)
    with pytest.raises(ValueError, match="one latency for each of 12 networks, got shape"):
        LatencyPredictor().fit(networks, latency[:-1])
    with pytest.raises(ValueError, match="expected positive latencies"):
        LatencyPredictor().fit(networks, [*latency[:-1], 0.0])
    with pytest.raises(ValueError, match="expected positive latencies"):
        LatencyPredictor().fit(networks, [*latency[:-1], float("nan")])
    with pytest.raises(ValueError, match="at least 10 distinct networks to fit on, got 1"):
        LatencyPredictor().fit(networks[:1] * 12, latency)
    with pytest.raises(ValueError, match="at least 10 distinct networks to fit on, got 0"):
        LatencyPredictor().fit([], [])
    with pytest.raises(ValueError, match="at least two folds, got 1"):
        LatencyPredictor(folds=1)
