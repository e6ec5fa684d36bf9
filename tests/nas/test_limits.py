"""Limits judged before anything is evaluated, against lowering every architecture of a space."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from nas.candidates import Costs
from nas.costs import Infeasible, Limit, ProfiledDevice, maximize
from nas.dominance import dominated
from nas.limits import Range, Reachable, _not_worse, reachable
from search_spaces import MobileNet, SearchSpace
from tests.nas import tiny

ENERGY = {"origin": "fitted", "source": "made up", "power_mw": 40.0, "relative_error": 0.2, "held_out": {}}
PATCHES = {"value": True, "source": "made up"}
ARENA = {
    "planner": "tflm_greedy",
    "explicit_padding": "always",
    "storage": "tflite",
    "sram_overhead_bytes": {"value": 43, "source": "made up"},
    "flash_overhead_bytes": {"value": 1000, "source": "made up"},
}
MUCH = {"sram_bytes": {"value": 10**9, "source": "made up"}, "flash_bytes": {"value": 10**9, "source": "made up"}}


@cache
def small_space() -> SearchSpace:
    """Some thousand architectures: mixed precisions, depths, widths, resolutions and patches."""
    space = MobileNet(
        resolutions=(8, 12),
        channels=1,
        classes=3,
        widths=(8, 16),
        width_multipliers=(0.5, 1.0),
        strides=(1, 2),
        depths=(1, 2),
        kernels=(3, 5),
        expansions=(1, 2),
        stem_width=8,
        head_width=16,
        patches=(1, 2),
    )
    one = {"stage1.depth": [1], "stage1.block0.kernel": [3], "stage2.block1.kernel": [5], "head.width": [16]}
    one |= {"stage2.block0.expansion": [2], "stem.width": [8]}
    mixed = ("stem.precision", "stage2.block0.expand.precision", "stage2.block1.project.precision")
    genes = [choice.name for choice in space.choices if choice.role == "precision" and choice.name not in mixed]
    return space.restricted(one | {name: ["int8"] for name in genes})


def two_devices(folder: Path) -> dict[str, ProfiledDevice]:
    """One that runs patches and whose SRAM is a largest of slots; one with an arena and other prices."""
    toy = tiny.device(folder, energy=ENERGY, patches=PATCHES, limits=MUCH)
    coefficients = {"conv.int8.macs": 3e-6, "depthwise.int8.count": 0.05, "quantize.int8.bytes": 1e-6}
    coefficients |= {f"{f}.{p}.count": 0.01 for f in tiny.KERNELS for p in ("fp32", "int8")}
    coefficients |= {f"{f}.{p}.count": 0.0 for f in ("add", "average_pool", "reshape") for p in ("fp32", "int8")}
    coefficients["dequantize.int8.count"] = 0.02
    latency = {"origin": "derived", "source": "made up", "constant_ms": 0.5, "coefficients_ms": coefficients}
    arena = tiny.device(folder, "arena", memory=ARENA, latency=latency, limits=MUCH)
    return {device.name: ProfiledDevice(device) for device in (toy, arena)}


KINDS = ("macs", "params", "model_bytes", "int8_macs_share")
ON_DEVICES = ("latency_ms", "sram_bytes", "flash_bytes", "macs")


class Listed:
    """Every legal architecture with its figures, each lowered."""

    def __init__(self, devices: Mapping[str, ProfiledDevice]) -> None:
        self.devices = dict(devices)
        keys = [*KINDS, *(f"{name}@{device}" for name in ON_DEVICES for device in devices)]
        keys += ["energy_uj@toy"] if "toy" in devices else []
        asked = [_limit(key, "<=", 1e12 if key != "int8_macs_share" else 1.0) for key in keys]
        costs = Costs(small_space(), [maximize("accuracy")], asked, devices)
        able = set(map(costs.legalize, small_space().all()))
        self.figures = {a: costs.figures(small_space().lower(a)) for a in sorted(able, key=lambda a: a.codes)}
        self.keys = keys

    def values(self, limit: Limit) -> np.ndarray:
        figures = [figures[limit.key] for figures in self.figures.values()]
        if limit.confidence is None:
            return np.array([figure.value for figure in figures])
        return np.array([figure.high if limit.operator == "<=" else figure.low for figure in figures], float)

    def met(self, limits: Sequence[Limit]) -> np.ndarray:
        met = np.ones(len(self.figures), bool)
        for limit in limits:
            values = self.values(limit)
            met &= values <= limit.value if limit.operator == "<=" else values >= limit.value
        return met

    def judge(self, limits: Sequence[Limit]) -> Reachable:
        return reachable(Costs(small_space(), [maximize("accuracy")], limits, self.devices))


def _limit(key: str, operator: str, value: float, confidence: float | None = None) -> Limit:
    name, _, device = key.partition("@")
    return Limit(name, operator, value, device or None, confidence)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["patches", "arena"])
def listed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Listed:
    devices = two_devices(tmp_path_factory.mktemp("devices"))
    return Listed({"toy": devices["toy"]} if request.param == "patches" else devices)


def binding_of(message: str, limits: Sequence[Limit]) -> list[Limit]:
    told = message.split("what binds is ")[1].split(". The nearest")[0].partition(" (")[0].removesuffix(" together")
    named = told.removesuffix(" together, though each alone can be met").split(", ")
    return [limit for limit in limits if str(limit) in named]


def check(listed: Listed, limits: Sequence[Limit]) -> bool:
    """That the answer is the enumeration's; returns whether the limits can be met."""
    if listed.met(limits).any():
        found = listed.judge(limits)
        figures = listed.figures[found.architecture]
        assert all(limit.violation(figures[limit.key]) <= 0 for limit in limits)
        return True
    with pytest.raises(Infeasible) as caught:
        listed.judge(limits)
    binding = binding_of(str(caught.value), limits)
    assert binding and not listed.met(binding).any(), str(caught.value)
    for fewer in itertools.combinations(binding, len(binding) - 1):
        assert listed.met(fewer).any(), str(caught.value)
    return False


def test_the_small_space_has_what_is_hard(listed: Listed) -> None:
    architectures = list(listed.figures)
    assert 300 < len(architectures) < 3000
    assert {a["patches"] for a in architectures} == ({1} if "arena" in listed.devices else {1, 2})
    assert {a["stem.precision"] for a in architectures} == {"fp32", "int8"}


def test_ranges_are_those_of_the_enumeration(listed: Listed) -> None:
    plain = [_limit(key, op, 0.5) for key in listed.keys for op in ("<=", ">=")]
    sure = [
        _limit(key, op, 0.5, 0.95)
        for key in ("latency_ms@toy", "energy_uj@toy")
        for op in ("<=", ">=")
        if key in listed.keys
    ]
    exact = 0
    for limit in plain + sure:
        values = listed.values(limit)
        worst = max(values) if limit.operator == "<=" else min(values)
        anything = Limit(limit.name, limit.operator, float(worst), limit.device, limit.confidence)
        found = next(each for each in listed.judge([anything]).ranges if each.limit == anything)
        assert found.least is not None and found.most is not None and found.share is not None
        # what is only found must not be better than what there is
        assert found.least >= min(values) * (1 - 1e-12) and found.most <= max(values) * (1 + 1e-12), found
        if found.least_is_exact:
            assert found.least == pytest.approx(min(values), rel=1e-12), found
        if found.most_is_exact:
            assert found.most == pytest.approx(max(values), rel=1e-12), found
        assert found.least <= min(values) * 1.02 and found.most >= max(values) * 0.98, found
        exact += found.least_is_exact + found.most_is_exact
        assert found.share == 1.0
    assert exact > len(plain + sure)


def test_random_limits_are_met_or_refused_as_the_enumeration_says(listed: Listed) -> None:
    rng = np.random.default_rng(5)
    reached: list[tuple[int, bool]] = []
    for count in (1, 2, 2, 2, 3, 3, 3, 3) * 3:
        limits = []
        middle = listed.figures[list(listed.figures)[int(rng.integers(len(listed.figures)))]]
        for key in rng.choice(listed.keys, count, replace=False):
            operator = "<=" if rng.random() < 0.7 else ">="
            able = key.split("@")[0] in ("latency_ms", "energy_uj") and key.endswith("toy")
            confidence = 0.95 if able and rng.random() < 0.5 else None
            limit = _limit(key, operator, 0.5, confidence)
            values = np.unique(listed.values(limit))
            place = values[int(np.clip(len(values) * rng.choice([0.02, 0.1, 0.4]), 0, len(values) - 1))]
            place = place if operator == "<=" else values[-1] - (place - values[0])
            if rng.random() < 0.3:
                place = middle[str(key)].value
            bound = float(place) * (1 + 1e-9 if operator == "<=" else 1 - 1e-9)
            limits.append(_limit(key, operator, min(bound, 1.0) if key == "int8_macs_share" else bound, confidence))
        reached.append((count, check(listed, limits)))
    assert {met for count, met in reached if count > 1} == {True, False}


def test_just_beyond_the_least_is_refused_and_just_within_is_met(listed: Listed) -> None:
    for place, key in enumerate(listed.keys):
        for operator in ("<=", ">=")[place % 2 :]:
            values = listed.values(_limit(key, operator, 0.5))
            best = float(min(values) if operator == "<=" else max(values))
            if key == "int8_macs_share" and best in (0.0, 1.0):
                continue
            sign = 1 if operator == "<=" else -1
            assert not check(listed, [_limit(key, operator, best * (1 - sign * 1e-6))])
            assert check(listed, [_limit(key, operator, best * (1 + sign * 1e-9))])


def test_limits_at_a_confidence_are_proven_impossible_together_by_the_ends_of_intervals(listed: Listed) -> None:
    macs = listed.values(_limit("macs", ">=", 1.0))
    bound = float(np.median(macs))
    ends = listed.values(_limit("latency_ms@toy", "<=", 1.0, 0.95))
    least = float(ends[macs >= bound].min())
    for value, can in ((least * 1.0001, True), (least * 0.9999, False)):
        limits = [_limit("macs", ">=", bound), _limit("latency_ms@toy", "<=", value, 0.95)]
        assert check(listed, limits) == can
    with pytest.raises(Infeasible, match=r"no architecture meets .* together, though each alone can be met"):
        listed.judge(limits)


@pytest.mark.parametrize(
    ("operator", "value", "always", "never"),
    [
        ("<=", 4, False, True),
        ("<=", 5, False, False),
        ("<=", 8, False, False),
        ("<=", 9, True, False),
        (">=", 5, True, False),
        (">=", 6, False, False),
        (">=", 9, False, False),
        (">=", 10, False, True),
    ],
)
def test_what_a_range_from_5_to_9_says_of_a_limit(operator: str, value: float, always: bool, never: bool) -> None:
    found = Range(_limit("macs", operator, value), 5.0, 9.0, True, True, None, 0)
    assert (found.always_met, found.never_met) == (always, never)
    worst_is_found = Range(found.limit, 5.0, 9.0, operator == "<=", operator == ">=", None, 0)
    assert not worst_is_found.always_met and worst_is_found.never_met == never and worst_is_found.best_is_exact


def test_a_figure_with_and_without_a_confidence_has_two_ranges(listed: Listed) -> None:
    limits = [_limit("latency_ms@toy", "<=", 1e6, confidence) for confidence in (None, 0.95)]
    found = {each.limit: each for each in listed.judge(limits).ranges}
    assert len({found[limit].least for limit in limits}) == 2
    for limit in limits:
        assert found[limit].least == pytest.approx(min(listed.values(limit)), rel=1e-9)


def test_two_limits_that_meet_in_a_point_are_told_from_two_that_just_miss(listed: Listed) -> None:
    keys = [key for key in listed.keys if not key.startswith(("sram_bytes", "int8_macs_share"))]
    tried = 0
    for key, other in itertools.permutations(keys, 2):
        values, others = (listed.values(_limit(each, "<=", 1.0)) for each in (key, other))
        least = float(np.quantile(values, 0.3))
        most = float(others[values >= least].min())
        if most <= others.min() * (1 + 1e-6) or (key.endswith("@toy") and "arena" not in listed.devices):
            continue
        assert check(listed, [_limit(key, ">=", least), _limit(other, "<=", most * (1 + 1e-12))])
        assert not check(listed, [_limit(key, ">=", least), _limit(other, "<=", most * (1 - 1e-6))])
        tried += 1
    assert tried > 5


def test_limits_that_one_architecture_just_meets_are_met(listed: Listed) -> None:
    """Those of each architecture that does the most MACs for what it costs: next to nothing else meets them."""
    keys = ["macs", "model_bytes", "latency_ms@toy"]
    keys += ["latency_ms@arena"] if "arena" in listed.devices else []
    signs = np.array([-1.0, *[1.0] * (len(keys) - 1)])
    costs = np.unique(signs * np.stack([listed.values(_limit(key, "<=", 1.0)) for key in keys], axis=1), axis=0)
    best = costs[~dominated(costs)]
    assert len(best) > 10
    for row in best[:: max(1, len(best) // 40)]:
        least, *most = signs * row
        limits = [_limit("macs", ">=", least)]
        limits += [_limit(key, "<=", value * (1 + 1e-12)) for key, value in zip(keys[1:], most, strict=True)]
        assert check(listed, limits)


def test_what_binds_leaves_out_limits_that_have_no_part_in_it(listed: Listed) -> None:
    macs, latency = (listed.values(_limit(key, "<=", 1.0)) for key in ("macs", "latency_ms@toy"))
    bound = float(np.median(macs))
    conflict = [
        _limit("macs", ">=", bound),
        _limit("latency_ms@toy", "<=", float(latency[macs >= bound].min()) * 0.99),
    ]
    params = listed.values(_limit("params", "<=", 1.0))
    idle = [_limit("params", "<=", float(np.quantile(params, 0.9))), _limit("model_bytes", ">=", 1.0)]
    for limits in ([*idle, *conflict], [conflict[0], *idle, conflict[1]], [*conflict, *idle]):
        with pytest.raises(Infeasible) as caught:
            listed.judge(limits)
        assert binding_of(str(caught.value), limits) == conflict


def test_a_refusal_that_is_not_proven_says_that_nothing_was_found(listed: Listed) -> None:
    """The most of a latency that may run in patches is only found."""
    macs, latency = (listed.values(_limit(key, "<=", 1.0)) for key in ("macs", "latency_ms@toy"))
    bound = float(np.quantile(macs, 0.1))
    limits = [
        _limit("macs", "<=", bound),
        _limit("latency_ms@toy", ">=", float(latency[macs <= bound].max()) * 1.05),
    ]
    alone = [_limit("latency_ms@toy", ">=", float(latency.max()) * 1.05)]
    known = "arena" in listed.devices  # which runs nothing in patches
    for asked in (limits, alone):
        with pytest.raises(Infeasible) as caught:
            listed.judge(asked)
        assert str(caught.value).startswith("no architecture meets" if known else "no architecture found meets")


def test_the_share_that_meets_a_limit_is_of_architectures_that_the_seed_draws() -> None:
    space = small_space()
    macs = float(np.median([space.lower(architecture).macs for architecture in itertools.islice(space.all(), 200)]))
    costs = Costs(space, [maximize("accuracy")], [_limit("macs", "<=", macs)], {})
    first, again, other = (reachable(costs, seed).ranges[0].share for seed in (0, 0, 1))
    assert first is not None and other is not None and first == again != other
    assert abs(first - other) < 0.05  # of 4,000 each


def test_partial_architectures_are_dropped_only_for_others_at_the_same_state(rng: np.random.Generator) -> None:
    state, sums = rng.integers(3, size=80), rng.integers(6, size=(80, 3)).astype(float)
    expected = [i for i in range(80) if not any(state[j] == state[i] and (sums[j] <= sums[i]).all() for j in range(i))]
    assert _not_worse(state, sums).tolist() == expected and len(expected) < 60
