"""Tables over codes: against sums written as loops, scikit-learn's ridge, and the clock."""

from __future__ import annotations

import time
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeCV

from predictors import CodeTables, code_tables
from predictors.code_tables import PAIR_SCALE, RIDGES


@pytest.mark.parametrize("rows_at_once", [7, 100])
def test_looks_up_what_a_loop_adds_up(
    rng: np.random.Generator, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_tables, "ROWS_AT_ONCE", rows_at_once)
    options = (2, 3, 4)
    entries = rng.normal(size=(2 + 3 + 4 + 6 + 8 + 12, 2))
    tables = CodeTables(options, True, np.array([0.5, -1.0]), entries, np.full(2, np.nan))
    codes = np.array(list(product(*map(range, options))))
    for row, found in zip(codes, tables.log_ms(codes), strict=True):
        total, start = tables.constant.copy(), 0
        for i, size in enumerate(options):
            total = total + entries[start + row[i]]
            start += size
        for i, j in combinations(range(3), 2):
            total = total + PAIR_SCALE * entries[start + row[i] * options[j] + row[j]]
            start += options[i] * options[j]
        np.testing.assert_allclose(found, total, rtol=1e-12)
    np.testing.assert_allclose(tables.encode(codes) @ entries + tables.constant, tables.log_ms(codes))


def test_milliseconds_are_summed_and_not_less_than_the_least() -> None:
    entries = np.array([[1.0, 0.0], [4.0, 1.0], [0.5, -2.0], [3.0, 2.0]])
    tables = CodeTables((2, 2), False, np.array([1.0, 0.5]), entries, np.array([3.0, np.nan]))
    found = tables.log_ms(np.array([[0, 0], [1, 0], [0, 1], [1, 1]]))
    np.testing.assert_allclose(np.exp(found[:, 0]), [3.0, 5.5, 5.0, 8.0])  # the first adds up to 2.5
    np.testing.assert_allclose(found[:, 1], [-1.5, -0.5, 2.5, 3.5])
    with pytest.raises(ValueError, match="milliseconds cannot be combined"):
        tables.combined(np.ones(2), 0.0)


def test_each_device_gets_the_sum_that_predicts_what_is_left_out(rng: np.random.Generator) -> None:
    """One adds up milliseconds, one their logarithms; a third of each is measured elsewhere."""
    codes = rng.integers(0, 3, size=(150, 12))
    parts = rng.uniform(0, 1, size=(3, 12))[codes, np.arange(12)] ** 3
    added, multiplied = np.log(0.3 + parts.sum(axis=1)), 3 * parts.sum(axis=1)
    logs = np.stack([added, multiplied, added], axis=1) + 0.01 * rng.normal(size=(150, 3))
    logs[100:, 2] = np.nan
    tables = CodeTables.fit(codes, logs, milliseconds=True)
    assert np.isnan(tables.least_ms).tolist() == [False, True, False]
    np.testing.assert_allclose(
        tables.least_ms[[0, 2]], [0.5 * np.exp(logs[:, 0]).min(), 0.5 * np.exp(logs[:100, 2]).min()]
    )
    one_hot = np.hstack([codes[:, [i]] == np.arange(3) for i in range(12)]).astype(float)
    for column, rows in ((0, slice(None)), (2, slice(100))):
        ms = np.exp(logs[rows, column])
        oracle = RidgeCV(alphas=RIDGES).fit(one_hot[rows], ms / ms.mean()).predict(one_hot) * ms.mean()
        np.testing.assert_allclose(np.exp(tables.log_ms(codes)[:, column]), np.maximum(oracle, ms.min() / 2), rtol=1e-6)
    alone = CodeTables.fit(codes, logs)
    np.testing.assert_allclose(tables.log_ms(codes)[:, 1], alone.log_ms(codes)[:, 1])
    assert np.isnan(alone.least_ms).all()


def test_sums_are_compared_by_the_squares_of_what_logarithms_are_off(rng: np.random.Generator) -> None:
    """Of a device that adds up logarithms which differ little, milliseconds are not far off either."""
    codes = rng.integers(0, 3, size=(150, 12))
    logs = 0.3 * (rng.uniform(0, 1, size=(3, 12))[codes, np.arange(12)] ** 3).sum(axis=1)
    tables = CodeTables.fit(codes, (logs + 0.02 * rng.normal(size=150))[:, None], milliseconds=True)
    assert np.isnan(tables.least_ms).all()


def test_a_sum_below_zero_counts_as_the_least(rng: np.random.Generator) -> None:
    """One architecture is so fast that the others' milliseconds add up to less than nothing for it."""
    codes = rng.integers(0, 3, size=(150, 12))
    parts = (rng.uniform(0, 1, size=(3, 12))[codes, np.arange(12)] ** 3).sum(axis=1)
    latency_ms = np.maximum(parts - parts.min() - 0.15, 0.05)
    assert (latency_ms == 0.05).sum() == 1
    assert CodeTables.fit(codes, np.log(latency_ms)[:, None], milliseconds=True).least_ms == pytest.approx([0.025])


def test_what_is_left_out_is_predicted_as_by_fitting_the_others(rng: np.random.Generator) -> None:
    """For a column with much noise and one with little, whose ridges differ."""
    inputs = rng.normal(size=(25, 6))
    targets = inputs @ rng.normal(size=(6, 2)) + np.array([3.0, 0.1]) * rng.normal(size=(25, 2)) + 5
    _, _, left_out = code_tables._ridge(inputs, targets)
    ridges = []
    for column in range(2):
        y, errors = targets[:, column], {}
        for ridge in RIDGES:
            again = np.empty(25)
            for i in range(25):
                kept = np.arange(25) != i
                again[i] = Ridge(ridge).fit(inputs[kept], y[kept]).predict(inputs[[i]])[0]
            errors[ridge] = again
        best = min(errors, key=lambda ridge: np.square(errors[ridge] - y).mean())
        ridges.append(best)
        np.testing.assert_allclose(left_out[:, column], errors[best], rtol=1e-6)
    assert ridges[0] > ridges[1]


def test_pairs_are_used_where_they_are_few_enough_to_fit(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, logs = rng.integers(0, 3, size=(54, 3)), rng.normal(size=(54, 1))
    assert CodeTables.fit(codes, logs).pairs and not CodeTables.fit(codes[1:], logs[1:]).pairs  # 27 entries
    for most, pairs in ((27, True), (26, False)):
        monkeypatch.setattr(code_tables, "MOST_PAIR_ENTRIES", most)
        assert CodeTables.fit(codes, logs).pairs == pairs


def test_fits_as_the_ridge_of_scikit_learn(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 3, size=(120, 4))
    logs = rng.normal(size=(3, 4))[codes, np.arange(4)].sum(axis=1) + 0.3 * rng.normal(size=120) + 2
    tables = CodeTables.fit(codes, np.column_stack([logs, rng.normal(size=120)]))
    one_hot = np.hstack([codes[:, [i]] == np.arange(3) for i in range(4)]).astype(float)
    pairs = [codes[:, [i]] * 3 + codes[:, [j]] == np.arange(9) for i, j in combinations(range(4), 2)]
    inputs = np.hstack([one_hot, 0.5 * np.hstack(pairs).astype(float)])
    oracle = RidgeCV(alphas=RIDGES).fit(inputs, logs)
    assert tables.pairs
    np.testing.assert_allclose(tables.log_ms(codes)[:, 0], oracle.predict(inputs), atol=1e-6)


def test_a_missing_measurement_is_a_row_left_out(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 3, size=(60, 3))
    logs = rng.normal(size=(60, 2))
    logs[40:, 1] = np.nan
    both, alone = CodeTables.fit(codes, logs), CodeTables.fit(codes[:40], logs[:40, 1:], options=(3, 3, 3))
    assert not both.pairs  # 27 entries of pairs, 40 measurements
    np.testing.assert_allclose(both.log_ms(codes)[:, 1], alone.log_ms(codes)[:, 0])


def test_combines_devices(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 4, size=(300, 3))
    tables = CodeTables.fit(codes, rng.normal(size=(300, 3)))
    more = rng.normal(size=len(tables.entries))
    combined = tables.combined(np.array([0.5, -2.0, 1.0]), 0.25, more)
    expected = tables.log_ms(codes) @ [0.5, -2.0, 1.0] + 0.25 + tables.encode(codes) @ more
    np.testing.assert_allclose(combined.log_ms(codes)[:, 0], expected)


@pytest.mark.parametrize("least_ms", [np.nan, 1.0])
@pytest.mark.parametrize(("choices", "pairs"), [(6, True), (22, False)])
def test_a_million_architectures_in_a_second(
    rng: np.random.Generator, choices: int, pairs: bool, least_ms: float
) -> None:
    options = (5,) * choices
    width = 5 * choices + 25 * (choices * (choices - 1) // 2 if pairs else 0)
    tables = CodeTables(options, pairs, np.full(1, 1e3), rng.normal(size=(width, 1)), np.array([least_ms]))
    codes = rng.integers(0, 5, size=(1_000_000, choices))
    start = time.process_time()
    tables.log_ms(codes)
    assert time.process_time() - start < 1.0


def test_saves_and_loads(rng: np.random.Generator, tmp_path: Path) -> None:
    codes = rng.integers(0, 3, size=(90, 3))
    latency_ms = 0.1 + rng.uniform(size=(3, 2))[codes].sum(axis=1) * rng.uniform(0.99, 1.01, size=(90, 2))
    tables = CodeTables.fit(codes, np.log(latency_ms), milliseconds=True)
    assert np.isfinite(tables.least_ms).any()
    tables.save(tmp_path / "tables.npz")
    loaded = CodeTables.load(tmp_path / "tables.npz")
    assert loaded.options == tables.options
    assert np.array_equal(loaded.log_ms(codes), tables.log_ms(codes))


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "tables.npz"
    path.write_text("no")
    with pytest.raises(ValueError, match="holds no tables"):
        CodeTables.load(path)
    np.savez(path, schema="fitnest.code_tables", version=99)
    with pytest.raises(ValueError, match="version is 99, this program reads 2"):
        CodeTables.load(path)
    np.savez(path, schema="other")
    with pytest.raises(ValueError, match="schema is 'other'"):
        CodeTables.load(path)
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="holds no tables"):
        CodeTables.load(path)
    for constant, entries in ((2, (4, 2)), (1, (5, 2)), (2, (5, 1)), (2, (5,))):
        tables = CodeTables((2, 3), False, np.zeros(constant), np.zeros(entries), np.zeros(2))
        tables.save(path)
        with pytest.raises(ValueError, match="is damaged"):
            CodeTables.load(path)


def test_refuses_codes_out_of_range(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 3, size=(30, 3))
    tables = CodeTables.fit(codes, rng.normal(size=(30, 1)), options=(3, 3, 3))
    with pytest.raises(ValueError, match=r"expected codes below \(3, 3, 3\), got up to \(3, 0, 0\)"):
        tables.log_ms(np.array([[3, 0, 0]]))
    with pytest.raises(ValueError, match=r"shape \(n, 3\)"):
        tables.log_ms(np.array([[0, 0]]))
    with pytest.raises(ValueError, match=r"integer codes of shape \(n, 3\), got float64"):
        tables.log_ms(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"log-latencies of shape \(30, devices\), got \(29, 1\)"):
        CodeTables.fit(codes, np.zeros((29, 1)))
    for measured in (0, 2):
        logs = np.zeros((30, 2))
        logs[measured:, 1] = np.nan
        with pytest.raises(ValueError, match=f"at least 3 measurements of each device, got {measured}"):
            CodeTables.fit(codes, logs)
