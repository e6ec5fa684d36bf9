"""Objectives, limits, and the figures an architecture has: what each is called, its unit and where it comes from."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from hardware_profiles import DeviceProfile, Prediction, UnsupportedLayer
from predictors import LatencyPredictor, NewDevicePredictor
from search_spaces import Network

Origin = Literal["measured", "simulated", "predicted", "exact", "given"]  # given: by a table or study of others
UPPER_CONFIDENCE = 0.95  # a 90 % interval has 95 % of the values below its upper end
Z_90 = 1.6448536269514722  # standard deviations from the mean to either end of a normal's central 90 %
MOST_OBJECTIVES = 4  # beyond, nearly all that is evaluated is non-dominated

# name -> (unit, whether more is better, whether it belongs to a device)
FIGURES: Mapping[str, tuple[str, bool, bool]] = {
    "accuracy": ("fraction", True, False),
    "macs": ("macs", False, False),
    "params": ("params", False, False),
    "model_bytes": ("bytes", False, False),
    "int8_macs_share": ("fraction", True, False),
    "latency_ms": ("ms", False, True),
    "energy_uj": ("uJ", False, True),
    "sram_bytes": ("bytes", False, True),
    "flash_bytes": ("bytes", False, True),
}
WITH_INTERVAL = ("latency_ms", "energy_uj")  # what is predicted with an error, so that a confidence can be asked for
ALSO_OF_DEVICES = ("macs",)  # with a device: those that it does, halos that patches compute again included
ALWAYS = ("macs", "params", "model_bytes", "int8_macs_share")  # exact and free, so every evaluation has them

# unit of a figure -> what else it may be written in
CONVERTIBLE: Mapping[str, Mapping[str, float]] = {
    "ms": {"ms": 1.0, "us": 1e-3, "s": 1e3},
    "uJ": {"uJ": 1.0, "mJ": 1e3, "J": 1e6},
    "bytes": {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1024.0**2, "bytes": 1.0},
    "fraction": {"%": 0.01},
    "macs": {"k": 1e3, "M": 1e6, "G": 1e9, "MMACs": 1e6},
    "params": {"k": 1e3, "M": 1e6},
}


class UnknownFigure(ValueError):
    """An objective or limit on something that is not a figure, or that a device has no figure of."""


class Infeasible(RuntimeError):
    """Limits that no architecture found can meet; says which binds and the nearest reachable point."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its 90 % interval and where it comes from; low and high are None where the error is not known."""

    value: float
    low: float | None
    high: float | None
    origin: Origin

    @classmethod
    def exact(cls, value: float) -> Figure:
        return cls(value, value, value, "exact")

    @classmethod
    def share(cls, value: float, count: int) -> Figure:
        """A share measured on `count` independent images, with Wilson's score interval (E. B. Wilson, 1927)."""
        spread = Z_90**2 / count
        middle = (value + spread / 2) / (1 + spread)
        half = math.sqrt(spread * (value * (1 - value) + spread / 4)) / (1 + spread)
        # rounding must not leave a share of 0 or 1 outside its own interval
        return cls(value, min(value, max(0.0, middle - half)), max(value, min(1.0, middle + half)), "measured")

    def to_dict(self) -> dict[str, float | str | None]:
        return asdict(self)


Figures = Mapping[str, Figure]


@dataclass(frozen=True)
class ProfiledDevice:
    """A device, and the latency predictor fitted for it where its profile does not ship one."""

    profile: DeviceProfile
    predictor: LatencyPredictor | NewDevicePredictor | None = None

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def key(self) -> str:
        """Digest of what its figures depend on besides the network."""
        fitted = (self.predictor.model, self.predictor.report()) if self.predictor else None
        return hashlib.sha256(f"{self.profile!r}{fitted!r}".encode()).hexdigest()[:12]

    @property
    def memory_limits(self) -> tuple[Limit, ...]:
        """What the memory of the device holds: a network beyond it cannot run there."""
        held = {"sram_bytes": self.profile.sram_limit_bytes, "flash_bytes": self.profile.flash_limit_bytes}
        return tuple(Limit(name, "<=", float(most), self.name, None, self) for name, most in held.items() if most)

    @property
    def is_at_hand(self) -> bool:
        """Whether it is this machine, which may be measured at any time; not what a file of measurements is of."""
        return self.profile.is_at_hand and not (self.predictor and "file" in self.predictor.provenance)

    @property
    def has_latency(self) -> bool:
        """Whether latencies can be predicted; a device that is measured needs a predictor, see `nas.profile`."""
        return self.predictor is not None or not self.profile.is_measured

    @property
    def has_latency_error(self) -> bool:
        """Whether the error of its latencies is known, or will be once the device is profiled."""
        model = self.profile.latency_model
        return self.predictor is not None or self.profile.is_measured or model.relative_error is not None

    @property
    def has_energy_error(self) -> bool:
        """Whether the error of its energies is known; it is that of the profile's own latencies."""
        model = self.profile.energy_model
        return self.predictor is None and model is not None and model.relative_error is not None

    def figure(self, network: Network, name: str) -> Figure:
        """`latency_ms`, `energy_uj`, `sram_bytes`, `flash_bytes` or `macs` of a network; infinite where it cannot run.

        A latency or energy is infinite too where no measurement covers a layer of the network; `refusal` says why.
        """
        if self.profile.illegal_layers(network):
            return Figure.exact(math.inf)
        if name == "sram_bytes":
            return Figure.exact(self.profile.sram_bytes(network))
        if name == "flash_bytes":
            return Figure.exact(self.profile.flash_bytes(network))
        if name == "macs":
            return Figure.exact(self.profile.macs(network))
        try:
            predicted = self.latency(network)
        except UnsupportedLayer:
            return Figure.exact(math.inf)
        if name == "energy_uj":
            energy = self.profile.energy(predicted.mean_ms)
            known = self.has_energy_error
            return Figure(
                energy.mean_uj, energy.low_uj if known else None, energy.high_uj if known else None, predicted.origin
            )
        return Figure(predicted.mean_ms, predicted.low_ms, predicted.high_ms, predicted.origin)

    def refusal(self, network: Network) -> str:
        """Why the network has an infinite figure on the device, in one line; empty where it has none."""
        illegal = self.profile.illegal_layers(network)
        if illegal:
            layer = network.by_name[illegal[0]]
            if layer.patches > 1 and not self.profile.patches:
                return f"{self.name} runs no layers patch by patch (layer {layer.name} in {layer.patches} a side)"
            kind = f"{layer.kind} {layer.activation}".strip()
            more = f", and {len(illegal) - 1} more" if len(illegal) > 1 else ""
            return f"{self.name} runs no {layer.precision.name} {kind} (layer {layer.name}{more})"
        try:
            self.latency(network)
        except UnsupportedLayer as error:
            return f"the latency model of {self.name}: {error}"
        return ""

    def latency(self, network: Network) -> Prediction:
        """The predicted latency; raises UnsupportedLayer, and UnavailableCost where the device must be measured."""
        return self.predictor.predict([network])[0] if self.predictor else self.profile.latency(network)


DeviceLike = ProfiledDevice | DeviceProfile | str | None


def _key(name: str, device: str | None) -> str:
    """How a figure is written wherever several devices are in play."""
    if name not in FIGURES:
        near = difflib.get_close_matches(name, FIGURES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FIGURES)}"
        raise UnknownFigure(f"unknown figure {name!r}; {hint}")
    if FIGURES[name][2] and device is None:
        raise UnknownFigure(f"{name} belongs to a device; write {name}@DEVICE")
    if not FIGURES[name][2] and device is not None and name not in ALSO_OF_DEVICES:
        raise UnknownFigure(f"{name} does not depend on a device; write it without @{device}")
    return f"{name}@{device}" if device else name


@dataclass(frozen=True, slots=True)
class Objective:
    """What to make as large or as small as possible; the direction travels with it, and the device if it was given.

    A `foreign` one is a column of a table or an objective of a study that is not ours: any name, no unit.
    """

    name: str
    direction: Literal["maximize", "minimize"]
    device: str | None = None
    profiled: ProfiledDevice | None = field(default=None, compare=False, repr=False)
    foreign: bool = False

    def __post_init__(self) -> None:
        _ = self.key

    @property
    def key(self) -> str:
        return self.name if self.foreign else _key(self.name, self.device)

    @property
    def unit(self) -> str:
        return "" if self.foreign else FIGURES[self.name][0]

    def cost(self, value: float) -> float:
        """The value turned so that less is better."""
        return -value if self.direction == "maximize" else value


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound that a chosen architecture must meet. With a confidence, the end of the interval must meet it.

    `foreign` as in `Objective`.
    """

    name: str
    operator: Literal["<=", ">="]
    value: float
    device: str | None = None
    confidence: float | None = None
    profiled: ProfiledDevice | None = field(default=None, compare=False, repr=False)
    foreign: bool = False

    def __post_init__(self) -> None:
        unit = FIGURES[self.name][0] if self.key and not self.foreign else ""
        if not math.isfinite(self.value):
            raise ValueError(f"limit {self.key}{self.operator}{self.value}: expected a finite number")
        if unit == "fraction" and not 0 <= self.value <= 1:
            raise ValueError(
                f"limit {self}: {self.name} is a fraction from 0 to 1; write {self.key}{self.operator}0.9 or 90%"
            )
        check_confidence(self.confidence)

    @property
    def key(self) -> str:
        return self.name if self.foreign else _key(self.name, self.device)

    def violation(self, figure: Figure) -> float:
        """How far the figure is beyond the limit, as a share of the limit; 0 or less when it is met.

        Raises UnknownFigure when a confidence is asked of a figure whose error is not known.
        """
        upper = self.operator == "<="
        reached = figure.value
        if self.confidence is not None:
            end = figure.high if upper else figure.low
            if end is None:
                raise UnknownFigure(f"limit {self}: the error of {self.key} is not known; leave the confidence out")
            reached = end
        scale = abs(self.value) or 1.0
        return (reached - self.value if upper else self.value - reached) / scale

    def __str__(self) -> str:
        at = f" at {self.confidence:.0%}" if self.confidence is not None else ""
        return f"{self.key}{self.operator}{self.value:.15g}{at}"


Item = Objective | Limit


def check_confidence(confidence: float | None) -> None:
    """Raise ValueError for a confidence that the stored intervals cannot answer."""
    if confidence is not None and confidence != UPPER_CONFIDENCE:
        raise ValueError(
            f"confidence {confidence:g}: the intervals kept are of 90 %, so only {UPPER_CONFIDENCE} can be asked for"
        )


def _profiled(device: DeviceLike) -> tuple[str | None, ProfiledDevice | None]:
    """(name, device) of what a caller named a device by."""
    if device is None or isinstance(device, str):
        return device, None
    profiled = ProfiledDevice(device) if isinstance(device, DeviceProfile) else device
    return profiled.name, profiled


def maximize(name: str, device: DeviceLike = None) -> Objective:
    return Objective(name, "maximize", *_profiled(device))


def minimize(name: str, device: DeviceLike = None) -> Objective:
    return Objective(name, "minimize", *_profiled(device))


def at_most(name: str, value: float, device: DeviceLike = None, *, confidence: float | None = None) -> Limit:
    device_name, profiled = _profiled(device)
    return Limit(name, "<=", float(value), device_name, confidence, profiled)


def at_least(name: str, value: float, device: DeviceLike = None, *, confidence: float | None = None) -> Limit:
    device_name, profiled = _profiled(device)
    return Limit(name, ">=", float(value), device_name, confidence, profiled)


def parse_objective(text: str) -> Objective:
    """`accuracy`, `latency_ms@host-cpu`: in the direction in which the figure is better."""
    name, _, device = text.strip().partition("@")
    _key(name, device or None)
    return Objective(name, "maximize" if FIGURES[name][1] else "minimize", device or None)


_LIMIT = re.compile(r"^\s*([A-Za-z_0-9]+)(?:@([^<>=\s]+))?\s*(<=|>=)\s*([-+0-9.eE]+)\s*([A-Za-z%]*)\s*$")


def parse_limit(text: str, confidence: float | None = None) -> Limit:
    """`NAME[@DEVICE] <= NUMBER[unit]`, the unit being that of the figure or a convertible one.

    A confidence only applies to figures that have an interval (latencies and energies). Raises UnknownFigure or
    ValueError with the right form.
    """
    found = _LIMIT.match(text)
    if not found:
        raise ValueError(
            f"cannot read the limit {text!r}; write NAME[@DEVICE]<=NUMBER[unit], such as 'latency_ms@host-cpu<=5'"
        )
    name, device, operator, number, unit = found.groups()
    _key(name, device)
    known = CONVERTIBLE[FIGURES[name][0]]
    if unit and unit not in known:
        raise ValueError(
            f"limit {text!r}: {name} is in {FIGURES[name][0]}, not {unit!r}; "
            f"write a plain number, or one of {', '.join(known)}"
        )
    try:
        value = float(number) * known.get(unit, 1.0)
    except ValueError:
        raise ValueError(f"limit {text!r}: {number!r} is not a number") from None
    return Limit(name, operator, value, device, confidence if name in WITH_INTERVAL else None)  # type: ignore[arg-type]


def cheap_figures(network: Network, keys: Iterable[str], devices: Mapping[str, ProfiledDevice]) -> dict[str, Figure]:
    """The figures among `keys` that need no data and no weights."""
    found: dict[str, Figure] = {}
    for key in keys:
        name, _, device = key.partition("@")
        if device:
            found[key] = devices[device].figure(network, name)
        elif name != "accuracy":
            found[key] = Figure.exact(getattr(network, name))
    return found


def check_objectives(objectives: Sequence[Objective]) -> None:
    """Raise ValueError unless there are one to four different objectives."""
    if not 1 <= len(objectives) <= MOST_OBJECTIVES:
        raise ValueError(f"{len(objectives)} objectives; expected one to four")
    keys = [objective.key for objective in objectives]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise ValueError(f"the objective {twice} is given twice; leave one out")


def check_devices(items: Iterable[Item], devices: Mapping[str, ProfiledDevice]) -> None:
    """Raise UnknownFigure for a figure that its device does not have, or a confidence that cannot be answered."""
    for item in items:
        if item.device is None:
            continue
        if item.device not in devices:
            near = difflib.get_close_matches(item.device, devices, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"profiled here: {', '.join(devices) or 'none'}"
            raise UnknownFigure(f"{item.key}: the device {item.device!r} is not profiled; {hint}")
        device = devices[item.device]
        if item.name == "sram_bytes" and device.profile.planner is None:
            able = [name for name, other in devices.items() if other.profile.planner]
            raise UnknownFigure(
                f"{item.key}: {item.device} has no memory planner, so its SRAM is not known; "
                f"name a microcontroller ({', '.join(able) or 'none is profiled here'})"
            )
        if item.name == "energy_uj" and device.profile.energy_model is None:
            able = [name for name, other in devices.items() if other.profile.energy_model]
            raise UnknownFigure(
                f"{item.key}: no energy of {item.device} was measured; "
                f"name a device with an energy model ({', '.join(able) or 'none is profiled here'})"
            )
        if isinstance(item, Limit) and item.confidence is not None:
            _check_error_is_known(item, device)


def _check_error_is_known(limit: Limit, device: ProfiledDevice) -> None:
    """Raise UnknownFigure when a confidence is asked of a latency or energy whose error nobody knows."""
    energy = limit.name == "energy_uj"
    if not (device.has_energy_error if energy else device.has_latency_error):
        raise UnknownFigure(
            f"limit {limit}: the error of the {'energies' if energy else 'latencies'} of {device.name} is not known "
            f"({device.profile.latency_model.origin}, not measured); leave the confidence out"
        )
