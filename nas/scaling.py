"""Choosing a space before anything is trained: for a number of MACs, or for the memory of a device.

`scale` is the Tiny formula of TinyNets (arXiv 2010.14819) calibrated on measured MACs; `fit_device` is the choice
of a space of MCUNet's TinyNAS (arXiv 2007.10319, section 3.1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nas.costs import Infeasible, ProfiledDevice
from nas.progress import progress_bar
from search_spaces import FAMILIES, KINDS, Network, SearchSpace, build_space

# (millions of MACs, input side, depth multiplier) of TinyNet E to A: README of the TinyNet code in
# huawei-noah/Efficient-AI-Backbones; their base, EfficientNet-B0, has 390 million MACs at a side of 224
TINYNETS = ((24, 106, 0.6), (52, 152, 0.695), (100, 184, 0.85), (202, 188, 1.1), (339, 192, 1.2))
BASE_MMACS, BASE_SIDE = 390, 224

# the grid of MCUNet: 12 input sides, 9 widths
RESOLUTIONS = tuple(range(48, 225, 16))
WIDTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scaled:
    """A space scaled by the Tiny formula.

    ratio: target over the MACs of the largest network of the base; resolution, depth and width are the multipliers
    of that network, before rounding; macs: what the largest network of the scaled space has; extrapolated: the ratio
    is outside those of the TinyNets, where resolution and depth keep their last multipliers.
    """

    space: SearchSpace
    target_macs: float
    base_macs: int
    resolution: float
    depth: float
    width: float

    @property
    def macs(self) -> int:
        return self.space.lower(self.space.largest).macs

    @property
    def ratio(self) -> float:
        return self.target_macs / self.base_macs

    @property
    def extrapolated(self) -> bool:
        return not TINYNETS[0][0] <= self.ratio * BASE_MMACS <= TINYNETS[-1][0]

    def to_dict(self) -> dict[str, object]:
        names = ("target_macs", "macs", "base_macs", "ratio", "resolution", "depth", "width", "extrapolated")
        return {name: getattr(self, name) for name in names} | {"space": _plain(self.space.family, self.space.settings)}


def tiny_multipliers(ratio: float) -> tuple[float, float]:
    """Multipliers (resolution, depth) of a network that may take `ratio` of the base's MACs.

    Piecewise linear over the logarithm of the ratio, through the five released TinyNets. The paper fits a Gaussian
    process to several hundred random networks, which are not released; with five points its length scale would be a
    guess, while this is monotone, passes through all five and differs from a smooth curve by less than the rounding
    to whole blocks. Outside the released ratios, 0.062 to 0.87, the multipliers of the nearest TinyNet hold.

    Raises ValueError for a ratio not above 0 and up to 1: the formula shrinks a base.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"{ratio:.3g} of the base's MACs: expected a share above 0, at most 1; take a larger base")
    known = np.log([macs / BASE_MMACS for macs, _, _ in TINYNETS])
    sides, depths = [side / BASE_SIDE for _, side, _ in TINYNETS], [depth for _, _, depth in TINYNETS]
    return float(np.interp(np.log(ratio), known, sides)), float(np.interp(np.log(ratio), known, depths))


def scale(base: SearchSpace, target_macs: float) -> Scaled:
    """The base scaled so that its largest network has about `target_macs` MACs.

    Resolution and depth follow `tiny_multipliers`; the width is the one whose lowered network comes nearest, found
    by bisection. (The closed form of the paper, width = sqrt(ratio / (resolution^2 depth)), gives 0.82, 0.67, 0.64
    and 0.68 where TinyNet B to E have 0.75, 0.54, 0.54 and 0.51: stem and head do not shrink with the blocks. Found
    this way on EfficientNet-B0's blocks they are 0.75, 0.54, 0.54 and 0.48.)
    Widths that make no legal space, such as those at which two expansions round to the same channels, are left out.

    Raises ValueError for more MACs than the base has, for a base with `restrict` and where no width makes a space,
    NotScalable for a family that cannot be scaled, and Infeasible where the narrowest blocks still have more.
    """
    base_macs = base.lower(base.largest).macs
    resolution, depth = tiny_multipliers(target_macs / base_macs)

    def at(width: float) -> Scaled:
        settings = type(base).scaled(base.settings, resolution=resolution, depth=depth, width=width)
        return Scaled(build_space(base.family, settings), target_macs, base_macs, resolution, depth, width)

    low = _first_legal(at, np.geomspace(1e-3, 1.0, 200))  # 3.5 % apart
    if low.macs > target_macs:
        raise Infeasible(
            f"the narrowest blocks of {base.family} still make {low.macs:,} MACs, more than {target_macs:,.0f}; start "
            f"from a base with a narrower stem and head, fewer stages or a smaller input"
        )
    high = _first_legal(at, np.geomspace(1.0, 2.0, 20))
    while high.macs < target_macs:
        low, high = high, _first_legal(at, high.width * np.geomspace(2.0, 4.0, 20))
    while high.width - low.width > 1e-4 * high.width:
        try:
            middle = _first_legal(at, _from_the_middle(low.width, high.width))
        except ValueError:  # there is no space between the two
            break
        low, high = (middle, high) if middle.macs < target_macs else (low, middle)
    return min(low, high, key=lambda scaled: abs(scaled.macs - target_macs))


def _first_legal(at: Callable[[float], Scaled], widths: Iterable[float]) -> Scaled:
    """The space of the first of the widths that makes one; raises the ValueError of the last where none does."""
    refusal = ValueError("no width to try")
    for width in widths:
        try:
            return at(float(width))
        except ValueError as error:
            refusal = error
    raise refusal


def _from_the_middle(low: float, high: float) -> list[float]:
    """15 widths between the two, the middle first."""
    between = np.linspace(low, high, 17)[1:-1]
    return sorted(between.tolist(), key=lambda width: abs(width - (low + high) / 2))


@dataclass(frozen=True)
class Candidate:
    """A space of the grid, and what its random networks are.

    macs: of the networks that fit the device, sorted; samples: how many were drawn.
    """

    family: str
    settings: Mapping[str, object]
    resolution: int
    width: float
    samples: int
    macs: tuple[int, ...]

    @property
    def fitting(self) -> int:
        return len(self.macs)

    @property
    def share(self) -> float:
        """Of the networks drawn, how many fit."""
        return self.fitting / self.samples

    @property
    def mean_macs(self) -> float:
        """Of the networks that fit; 0 where none does."""
        return sum(self.macs) / len(self.macs) if self.macs else 0.0

    def percentile(self, percent: float) -> float:
        """The MACs that `percent` of the networks that fit do not exceed; 0 where none fits."""
        return float(np.percentile(self.macs, percent)) if self.macs else 0.0

    def to_dict(self) -> dict[str, object]:
        return {
            "resolution": self.resolution,
            "width": self.width,
            "samples": self.samples,
            "fitting": self.fitting,
            "mean_macs": self.mean_macs,
            **{f"p{percent}_macs": self.percentile(percent) for percent in (10, 50, 90)},
            "space": _plain(self.family, self.settings),
        }


def fit_device(
    family: str,
    settings: Mapping[str, object],
    device: ProfiledDevice,
    *,
    resolutions: Sequence[int] = RESOLUTIONS,
    widths: Sequence[float] = WIDTHS,
    samples: int = 1000,
    least_share: float = 0.1,
    seed: int = 0,
) -> list[Candidate]:
    """The spaces of a grid, the one whose networks make the most of the device's memory first.

    Each input side and each width multiplier makes a space of the family; of its random networks, those whose peak
    SRAM and flash the device holds are kept, and the spaces are ranked by the mean MACs of these: at the same memory,
    more computation is taken for more capacity. Spaces of which less than `least_share` fit come after all others:
    a few networks just below the limits have many MACs, but a supernet would be trained for the rest.
    Places of the grid that make no legal space, such as a width at which two expansions round to the same channels,
    are left out; a warning is logged with their number and the reason of the first.

    Raises ValueError for a device without memory limits, for settings with `restrict` or an input side and where
    no place makes a space, NotScalable for a family that cannot be placed on a grid, and Infeasible, with the
    network that comes nearest, where no network of any space fits.
    """
    limits = device.memory_limits
    if not resolutions or not widths or samples < 1:
        raise ValueError("no space to choose from: expected one or more resolutions, widths and samples")
    if seed < 0:
        raise ValueError(f"seed = {seed}; expected 0 or more")
    if not limits:
        raise ValueError(f"{device.name} has no limit on SRAM or flash; name a device that has, see 'nas devices'")
    precisions = _legal_precisions(build_space(family, settings), device)
    grid = [
        (side, width, FAMILIES[family].placed(settings, resolution=side, width=width, precisions=precisions))
        for side in resolutions
        for width in widths
    ]
    places = _legal_places(family, grid)
    candidates: list[Candidate] = []
    nearest: list[tuple[float, Candidate, Network]] = []
    for side, width, placed, space in progress_bar(places, desc=f"spaces for {device.name}", unit="space"):
        rng = np.random.default_rng(seed)  # the same draws in every space, so that luck does not rank them
        networks = [space.lower(space.sample(rng)) for _ in range(samples)]
        beyond = [max(limit.violation(device.figure(network, limit.name)) for limit in limits) for network in networks]
        fitting = sorted(network.macs for network, over in zip(networks, beyond, strict=True) if over <= 0)
        candidates.append(Candidate(family, placed, side, width, samples, tuple(fitting)))
        least = min(range(samples), key=beyond.__getitem__)
        nearest.append((beyond[least], candidates[-1], networks[least]))
    if not any(candidate.macs for candidate in candidates):
        _, candidate, network = min(nearest, key=lambda found: found[0])
        raise Infeasible(_nothing_fits(device, candidate, network))
    return sorted(candidates, key=lambda candidate: (candidate.share < least_share, -candidate.mean_macs))


def _legal_places(
    family: str, grid: Sequence[tuple[int, float, Mapping[str, object]]]
) -> list[tuple[int, float, Mapping[str, object], SearchSpace]]:
    """Those of (resolution, width, settings) that make a space, and the space; logs what does not.

    Raises ValueError where none does.
    """
    legal: list[tuple[int, float, Mapping[str, object], SearchSpace]] = []
    refused: list[tuple[int, float, str]] = []
    for side, width, settings in grid:
        try:
            legal.append((side, width, settings, build_space(family, settings)))
        except ValueError as error:
            refused.append((side, width, str(error)))
    if refused:
        side, width, why = refused[0]
        told = f"{len(refused)} of {len(grid)} spaces cannot be built; resolution {side}, width {width:g}: {why}"
        if not legal:
            raise ValueError(told)
        _log.warning("left out: %s", told)
    return legal


def _legal_precisions(space: SearchSpace, device: ProfiledDevice) -> list[str]:
    """What the space offers for its layers and the device has for every kind of layer with weights."""
    weighted = [kind for kind, record in KINDS.items() if record.quantization == "weights"]
    offered = dict.fromkeys(str(o) for choice in space.choices if choice.role == "precision" for o in choice.options)
    legal = [name for name in offered if all(name in device.profile.precisions.get(kind, ()) for kind in weighted)]
    if not legal:
        raise ValueError(f"{device.name} runs none of the precisions of the space: {', '.join(offered)}")
    return legal


def _nothing_fits(device: ProfiledDevice, candidate: Candidate, network: Network) -> str:
    refusal = device.refusal(network) if device.profile.illegal_layers(network) else ""
    if refusal:
        return f"no network of the family can run: {refusal}"
    needs = [
        f"{limit.name} {device.figure(network, limit.name).value:,.0f} of {limit.value:,.0f}"
        for limit in device.memory_limits
    ]
    return (
        f"no network fits {device.name}; the nearest, at resolution {candidate.resolution} and width "
        f"{candidate.width:g}, needs {' and '.join(needs)}; "
        f"try smaller resolutions or widths"
    )


def _plain(family: str, settings: Mapping[str, object]) -> dict[str, object]:
    """The space as an experiment states it."""
    return {"family": family, **settings}
