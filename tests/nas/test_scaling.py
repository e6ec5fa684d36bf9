"""Choosing a space: the Tiny formula against the published TinyNets and a scan, the ranking against a count by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware_profiles import DeviceProfile, load_device
from nas.costs import Infeasible, ProfiledDevice
from nas.plot import check_picture, plot_candidates
from nas.scaling import Candidate, fit_device, scale, tiny_multipliers
from search_spaces import CompactTransformer, MobileNet, NotScalable, build_space

# TinyNet A to E as its README lists them: millions of MACs, input side, depth multiplier; EfficientNet-B0: 390, 224
PUBLISHED = [(339, 192, 1.2), (202, 188, 1.1), (100, 184, 0.85), (52, 152, 0.695), (24, 106, 0.6)]


@pytest.mark.parametrize(("mmacs", "side", "depth"), PUBLISHED)
def test_the_published_tinynets_are_reproduced(mmacs: int, side: int, depth: float) -> None:
    resolution, blocks = tiny_multipliers(mmacs / 390)
    assert round(resolution * 224, 6) == side and round(blocks, 9) == depth


def test_multipliers_rise_with_the_ratio_and_hold_beyond_the_tinynets() -> None:
    found = [tiny_multipliers(ratio) for ratio in np.geomspace(1e-3, 1, 400)]
    assert found == sorted(found) and [depth for _, depth in found] == sorted(depth for _, depth in found)
    assert tiny_multipliers(0.001) == tiny_multipliers(24 / 390) == pytest.approx((106 / 224, 0.6))
    assert tiny_multipliers(1.0) == tiny_multipliers(339 / 390) == pytest.approx((192 / 224, 1.2))
    halfway = tiny_multipliers((52 * 100) ** 0.5 / 390)
    assert halfway == pytest.approx(((152 + 184) / 2 / 224, (0.695 + 0.85) / 2))


@pytest.mark.parametrize(
    ("mmacs", "side", "depth"),
    [
        # ln(35/24) / ln(52/24) = 0.377294 / 0.773190 = 0.487971: 106 + 46 * 0.487971, 0.6 + 0.095 * 0.487971
        (35, 128.4467, 0.646357),
        # ln(78/52) / ln(100/52) = 0.405465 / 0.653926 = 0.620047: 152 + 32 * 0.620047, 0.695 + 0.155 * 0.620047
        (78, 171.8415, 0.791107),
        # ln(195/100) / ln(202/100) = 0.667829 / 0.703098 = 0.949839: 184 + 4 * 0.949839, 0.85 + 0.25 * 0.949839
        (195, 187.7994, 1.087460),
    ],
)
def test_between_two_tinynets_by_hand(mmacs: int, side: float, depth: float) -> None:
    resolution, blocks = tiny_multipliers(mmacs / 390)
    assert resolution * 224 == pytest.approx(side, abs=1e-3) and blocks == pytest.approx(depth, abs=1e-5)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.0001, float("nan")])
def test_the_formula_only_shrinks(ratio: float) -> None:
    with pytest.raises(ValueError, match="expected a share above 0, at most 1; take a larger base"):
        tiny_multipliers(ratio)


BASES: dict[str, dict[str, Any]] = {
    "default": {},
    "imagenet": {
        "resolutions": [160, 224], "classes": 1000, "widths": [24, 40, 80, 112, 192], "strides": [2, 2, 2, 1, 2],
        "depths": [2, 3], "expansions": [6], "head_width": 640, "width_multipliers": [1.0], "precisions": ["int8"],
    },
    "coupled": {"coupled": True, "depths": [1, 2, 4], "expansions": [2, 3, 6], "widths": [24, 40, 80]},
    "fine": {"divisor": 1},
}  # fmt: skip


@pytest.mark.parametrize("ratio", [0.1, 0.6])
@pytest.mark.parametrize("name", BASES)
def test_the_reached_macs_are_the_nearest_of_a_scan(name: str, ratio: float) -> None:
    base = MobileNet(**BASES[name])
    target = ratio * base.lower(base.largest).macs
    scaled = scale(base, target)
    largest = scaled.space.lower(scaled.space.largest)
    assert scaled.macs == largest.macs and scaled.base_macs == base.lower(base.largest).macs
    off = abs(largest.macs - target)
    assert off <= (0.03 if name == "fine" else 0.2) * target
    for width in np.linspace(0.02, 1.6, 100):  # every width that rounds to other channels
        widths = [nearest_multiple(width * base_width, base) for base_width in listed(base, "widths")]
        other = build_space("mobilenet", {**scaled.space.settings, "widths": widths})
        assert abs(other.lower(other.largest).macs - target) >= off


class EfficientNetB0(MobileNet):
    """The blocks of EfficientNet-B0 (arXiv 1905.11946, table 1), without squeeze-excite; scaled as TinyNets are."""

    BLOCKS, WIDTHS, KERNELS = (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320), (3, 3, 5, 3, 5, 5, 3)

    @classmethod
    def scaled(
        cls, settings: Mapping[str, object], *, resolution: float, depth: float, width: float
    ) -> dict[str, object]:
        restrict: dict[str, list[int]] = {}
        blocks = [max(1, round(count * depth)) for count in cls.BLOCKS]
        for stage, (count, kernel) in enumerate(zip(blocks, cls.KERNELS, strict=True), start=1):
            restrict[f"stage{stage}.depth"] = [count]
            for block in range(count):
                restrict[f"stage{stage}.block{block}.kernel"] = [kernel]
                restrict[f"stage{stage}.block{block}.expansion"] = [1 if stage == 1 else 6]
        widths = [max(8, int(base * width / 8 + 0.5) * 8) for base in cls.WIDTHS]
        widths = [w + 8 if w < 0.9 * base * width else w for w, base in zip(widths, cls.WIDTHS, strict=True)]
        return {
            "resolutions": [round(224 * resolution)], "classes": 1000, "widths": widths, "width_multipliers": [1],
            "strides": [1, 2, 2, 2, 1, 2, 1], "stem_width": 32, "stem_stride": 2, "head_width": 1280,
            "depths": list(range(1, max(blocks) + 1)), "kernels": [3, 5], "expansions": [1, 6],
            "precisions": ["fp32"], "restrict": restrict,
        }  # fmt: skip


def test_widths_on_efficientnet_b0_are_those_of_the_released_tinynets() -> None:
    settings: dict[str, Any] = EfficientNetB0.scaled({}, resolution=1, depth=1, width=1)
    restrict = settings.pop("restrict")
    base = EfficientNetB0(**settings).restricted(restrict)
    assert base.lower(base.largest).macs == pytest.approx(390e6, rel=0.015)  # squeeze-excite has the rest
    for (mmacs, side, _), width in zip(PUBLISHED, (1.0, 0.75, 0.54, 0.54, 0.51), strict=True):
        scaled = scale(base, mmacs / 390 * base.lower(base.largest).macs)
        assert scaled.width == pytest.approx(width, abs=0.035)
        assert scaled.macs == pytest.approx(scaled.target_macs, rel=0.015)
        assert scaled.space.settings["resolutions"] == [side]


NARROW: dict[str, Any] = {  # 2 and 2.2 times 8 or 16 channels round to the same
    "widths": (64, 96), "stem_width": 64, "width_multipliers": (1,), "depths": (1, 2), "expansions": (2, 2.2),
}  # fmt: skip


def legal_macs(base: MobileNet, settings: Mapping[str, object]) -> dict[int, int]:
    """MACs of the largest network by the width of the first stage, for each width that makes a space."""
    found = {}
    first, *others = listed(base, "widths")
    for width in range(8, 2 * first, 8):
        widths = [width, *(nearest_multiple(other * width / first, base) for other in others)]
        try:
            space = build_space("mobilenet", {**settings, "widths": widths})
        except ValueError:
            continue
        found[width] = space.lower(space.largest).macs
    return found


def test_widths_too_narrow_for_a_space_are_passed_over() -> None:
    base = MobileNet(**NARROW)
    macs = base.lower(base.largest).macs
    with pytest.raises(ValueError, match="expected options that differ once 8 channels"):
        build_space("mobilenet", MobileNet.scaled(base.settings, resolution=1, depth=1, width=1e-3))
    scaled = scale(base, 0.5 * macs)
    legal = legal_macs(base, scaled.space.settings)
    assert min(legal) == 24 and scaled.macs in legal.values()
    assert scaled.macs == pytest.approx(0.5 * macs, rel=0.05)
    with pytest.raises(Infeasible, match="the narrowest blocks of mobilenet still make"):
        scale(base, 0.2 * macs)


def test_a_hole_among_the_widths_is_stepped_over() -> None:
    """2.4 and 2.6 times 24 round to 56 and 64, times 32 both to 80, times 40 to 96 and 104."""
    base = MobileNet(
        widths=(80,), stem_width=24, width_multipliers=(1,), expansions=(2.4, 2.6), strides=(1,), head_width=8
    )
    macs = base.lower(base.largest).macs
    reached = set()
    for ratio in np.geomspace(0.02, 0.9, 40):
        try:
            scaled = scale(base, ratio * macs)
        except Infeasible:
            continue
        legal = legal_macs(base, scaled.space.settings)
        assert not {8, 16, 32} & legal.keys()
        assert abs(scaled.macs - ratio * macs) == min(abs(made - ratio * macs) for made in legal.values())
        reached.update(listed(scaled.space, "widths"))  # type: ignore[arg-type]
    assert {24, 40, 48, 56} <= reached


def test_settings_that_scaling_cannot_keep_are_refused() -> None:
    base = MobileNet().restricted({"stage1.depth": [2]})
    with pytest.raises(ValueError, match=r"restrict = {'stage1.depth': \[2\]}: expected none, where the space is sc"):
        scale(base, 0.5 * base.lower(base.largest).macs)
    with pytest.raises(ValueError, match=r"restrict = {'stage1.depth': \[2\]}: expected none"):
        fit_device("mobilenet", {"restrict": {"stage1.depth": [2]}}, device(), **GRID)
    with pytest.raises(ValueError, match=r"resolutions = \[32\]: expected none, where the input side is set to 24"):
        fit_device("mobilenet", {"resolutions": [32]}, device(), **GRID)


def listed(space: MobileNet, setting: str) -> list[Any]:
    values = space.settings[setting]
    assert isinstance(values, list)
    return values


def nearest_multiple(width: float, base: MobileNet) -> int:
    """To the divisor's multiples, halves up, never more than a tenth below: as MobileNets round."""
    divisor = base.settings["divisor"]
    assert isinstance(divisor, int)
    below = max(divisor, int(np.floor(width / divisor + 0.5)) * divisor)
    return below if below >= 0.9 * width else below + divisor


def test_what_is_scaled_and_what_stays_by_hand() -> None:
    base = MobileNet(**BASES["imagenet"])
    scaled = scale(base, 100 / 390 * base.lower(base.largest).macs)
    settings = dict(scaled.space.settings)
    assert (scaled.resolution, scaled.depth) == pytest.approx((184 / 224, 0.85)) and not scaled.extrapolated
    assert settings.pop("resolutions") == [131, 184]  # 160 * 184 / 224 is 131.4
    assert settings.pop("depths") == [2, 3]  # 1.7 and 2.55
    assert settings.pop("widths") != base.settings["widths"]
    assert settings == {name: value for name, value in base.settings.items() if name in settings}
    assert json.loads(json.dumps(scaled.to_dict()))["space"] == {"family": "mobilenet", **scaled.space.settings}


def test_depths_that_become_one_keep_the_expansion_of_the_deepest() -> None:
    base = MobileNet(depths=(2, 3, 5), expansions=(2, 3, 6), coupled=True)
    scaled = MobileNet.scaled(base.settings, resolution=0.1, depth=0.5, width=1.0)
    assert (scaled["depths"], scaled["expansions"]) == ([1, 2, 3], [2, 3, 6])  # 1, 1.5 and 2.5, halves up
    scaled = MobileNet.scaled(base.settings, resolution=0.1, depth=0.3, width=1.0)
    assert (scaled["depths"], scaled["expansions"]) == ([1, 2], [3, 6])  # 0.6, 0.9 and 1.5
    assert scaled["resolutions"] == [8]  # the product of the strides is 8
    assert build_space("mobilenet", scaled).choice("stage1.depth").options == (1, 2)


def test_more_or_far_less_than_the_base_is_refused() -> None:
    base = MobileNet()
    macs = base.lower(base.largest).macs
    with pytest.raises(ValueError, match=r"1\.5 of the base's MACs"):
        scale(base, 1.5 * macs)
    with pytest.raises(
        Infeasible, match=r"the narrowest blocks of mobilenet still make [0-9,]+ MACs, more than 1,000;"
    ):
        scale(base, 1_000)
    assert scale(base, macs).extrapolated


def test_a_family_that_does_not_say_how() -> None:
    space = CompactTransformer()
    with pytest.raises(NotScalable, match="CompactTransformer does not say how to scale its blocks"):
        scale(space, 0.5 * space.lower(space.largest).macs)
    with pytest.raises(NotScalable, match="CompactTransformer does not say how to set its input side"):
        fit_device("compact_transformer", {}, device(precisions={"conv2d": ("int8",), "linear": ("int8",)}))


# spaces for a device -------------------------------------------------------------------------------------


def device(**changed: Any) -> ProfiledDevice:
    profile: DeviceProfile = load_device("stm32f746")
    return ProfiledDevice(replace(profile, **{"name": "toy", **changed}))


GRID: dict[str, Any] = {"resolutions": (24, 48, 80), "widths": (0.5, 1.0), "samples": 40}
SETTINGS: dict[str, Any] = {"widths": [8, 16, 32], "depths": [1, 2], "classes": 3}


def ranked(**changed: Any) -> list[Candidate]:
    chosen = {**GRID, **{name: changed.pop(name) for name in list(changed) if name in (*GRID, "seed", "least_share")}}
    limits = {"sram_limit_bytes": 40_000, "flash_limit_bytes": 110_000, **changed}
    return fit_device("mobilenet", SETTINGS, device(**limits), **chosen)


def test_networks_that_fit_are_those_of_a_count_by_hand() -> None:
    candidates = ranked(seed=3)
    assert {(c.resolution, c.width) for c in candidates} == {(r, w) for r in (24, 48, 80) for w in (0.5, 1.0)}
    target = device(sram_limit_bytes=40_000, flash_limit_bytes=110_000).profile
    shares = []
    for candidate in candidates:
        multipliers = [candidate.width * multiplier for multiplier in (0.5, 0.75, 1.0)]
        space = MobileNet(
            **SETTINGS, resolutions=[candidate.resolution], width_multipliers=multipliers, precisions=["int8"]
        )
        rng = np.random.default_rng(3)
        networks = [space.lower(space.sample(rng)) for _ in range(40)]
        fit = [n.macs for n in networks if target.sram_bytes(n) <= 40_000 and target.flash_bytes(n) <= 110_000]
        assert candidate.macs == tuple(sorted(fit)) and candidate.samples == 40
        assert candidate.mean_macs == pytest.approx(np.mean(fit) if fit else 0)
        assert build_space("mobilenet", candidate.settings).name == space.name
        shares.append(len(fit) / 40)
    assert min(shares) < 0.1 < max(shares) and 0.0 in shares  # so that the test tells


def test_the_mean_ranks_among_spaces_of_which_enough_fit() -> None:
    candidates = ranked()
    enough = [candidate for candidate in candidates if candidate.share >= 0.1]
    assert candidates[: len(enough)] == enough and len(enough) >= 2
    for part in (enough, candidates[len(enough) :]):
        assert [c.mean_macs for c in part] == sorted((c.mean_macs for c in part), reverse=True)
    all_of_them = ranked(least_share=0.0)
    assert [c.mean_macs for c in all_of_them] == sorted((c.mean_macs for c in all_of_them), reverse=True)
    assert ranked(least_share=1.0)[0].share == 1.0


def test_tighter_limits_never_let_more_networks_in() -> None:
    wide = {(c.resolution, c.width): c.fitting for c in ranked()}
    for tighter in ({"sram_limit_bytes": 25_000}, {"flash_limit_bytes": 82_000}):
        narrow = {(c.resolution, c.width): c.fitting for c in ranked(**tighter)}
        assert all(narrow[place] <= wide[place] for place in wide) and narrow != wide


def test_same_seed_same_ranking_and_other_seed_other_draws() -> None:
    assert ranked(seed=1) == ranked(seed=1)
    assert [c.macs for c in ranked(seed=1)] != [c.macs for c in ranked(seed=2)]


def test_draws_are_in_the_precisions_that_the_device_has() -> None:
    both = dict.fromkeys(("conv2d", "linear", "pool", "add", "reshape"), ("fp32", "int8"))
    for offered, options in ((both, ["fp32", "int8"]), (dict.fromkeys(both, ("int8",)), ["int8"])):
        candidates = ranked(samples=2, sram_limit_bytes=10**6, precisions=offered)
        assert all(candidate.settings["precisions"] == options for candidate in candidates)
    with pytest.raises(ValueError, match="toy runs none of the precisions of the space: fp32"):
        fit_device("mobilenet", {"precisions": ["fp32"]}, device())


def test_figures_of_a_candidate_by_hand() -> None:
    candidate = Candidate("mobilenet", {"depths": [1]}, 48, 0.5, 20, (10, 20, 30, 40, 100))
    assert (candidate.fitting, candidate.share, candidate.mean_macs) == (5, 0.25, 40)
    assert [candidate.percentile(percent) for percent in (0, 25, 50, 100)] == [10, 20, 30, 100]
    assert candidate.to_dict() == {
        "resolution": 48, "width": 0.5, "samples": 20, "fitting": 5, "mean_macs": 40.0,
        "p10_macs": 14.0, "p50_macs": 30.0, "p90_macs": 76.0, "space": {"family": "mobilenet", "depths": [1]},
    }  # fmt: skip
    empty = replace(candidate, macs=())
    assert (empty.mean_macs, empty.percentile(50), empty.share) == (0, 0, 0)


def test_where_nothing_fits_the_nearest_is_named() -> None:
    with pytest.raises(Infeasible) as caught:
        ranked(sram_limit_bytes=2_000)
    assert "no network fits toy; the nearest, at resolution 24 and width 0.5, needs sram_bytes " in str(caught.value)
    needed = int(str(caught.value).split("sram_bytes ")[1].split(" of 2,000")[0].replace(",", ""))
    space = build_space("mobilenet", {**SETTINGS, "resolutions": [24], "width_multipliers": [0.25, 0.375, 0.5]})
    rng = np.random.default_rng(0)
    bytes_ = [
        device().profile.sram_bytes(space.lower(space.with_precision(space.sample(rng), "int8"))) for _ in range(80)
    ]
    assert min(bytes_) <= needed <= np.median(bytes_)


def test_layers_that_the_device_lacks_are_named() -> None:
    with pytest.raises(Infeasible, match=r"no network of the family can run: toy runs no .* hardswish"):
        fit_device("mobilenet", {**SETTINGS, "nonlinearity": "hardswish"}, device(), **{**GRID, "samples": 2})


def test_grids_and_devices_that_make_no_choice() -> None:
    for changed in ({"resolutions": ()}, {"widths": ()}, {"samples": 0}):
        with pytest.raises(ValueError, match="expected one or more resolutions, widths and samples"):
            ranked(**changed)
    with pytest.raises(ValueError, match="host-cpu has no limit on SRAM or flash"):
        fit_device("mobilenet", {}, ProfiledDevice(load_device("host-cpu")))
    with pytest.raises(
        ValueError, match=r"1 of 1 spaces cannot be built; .* resolutions = 300: expected a number from"
    ):
        ranked(resolutions=(300,), widths=(1.0,))
    with pytest.raises(ValueError, match="seed = -1; expected 0 or more"):
        ranked(seed=-1)


def test_places_of_the_grid_without_a_space_are_counted_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    settings = {**SETTINGS, "widths": [32, 64], "stem_width": 32, "width_multipliers": [1], "expansions": [2, 2.2]}
    with caplog.at_level(logging.WARNING):
        candidates = fit_device("mobilenet", settings, device(), resolutions=(24, 48), widths=(0.5, 1), samples=3)
    assert sorted((c.resolution, c.width) for c in candidates) == [(24, 1), (48, 1)]
    (told,) = caplog.messages
    assert told.startswith("left out: 2 of 4 spaces cannot be built; resolution 24, width 0.5: space mobilenet: expans")
    caplog.clear()
    ranked(samples=1)
    assert not caplog.messages


def test_the_picture(tmp_path: Path) -> None:
    candidates = [Candidate("mobilenet", {}, side, 1.0, 10, macs) for side, macs in ((48, (1, 2)), (64, ()))]
    plot_candidates(candidates, tmp_path / "cdf.png")
    assert (tmp_path / "cdf.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"cannot draw .*cdf\.zip: expected one of the formats"):
        check_picture(tmp_path / "cdf.zip")
    check_picture(tmp_path / "cdf")
    check_picture(tmp_path / "cdf.PNG")
    plot_candidates(candidates, tmp_path / "cdf.PNG")
    assert (tmp_path / "cdf.PNG").read_bytes().startswith(b"\x89PNG")
