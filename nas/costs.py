"""Objectives, limits, and the figures an architecture has: what each is called, its unit and where it comes from."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from hardware_profiles import DeviceProfile
from predictors import LatencyPredictor
from search_spaces import Network

Origin = Literal["measured", "simulated", "predicted", "exact"]
UPPER_CONFIDENCE = 0.95  # a 90 % interval has 95 % of the values below its upper end

# name -> (unit, whether more is better, whether it belongs to a device)
FIGURES: Mapping[str, tuple[str, bool, bool]] = {
    "accuracy": ("fraction", True, False),
    "macs": ("macs", False, False),
    "params": ("params", False, False),
    "model_bytes": ("bytes", False, False),
    "int8_macs_share": ("fraction", True, False),
    "latency_ms": ("ms", False, True),
    "sram_bytes": ("bytes", False, True),
    "flash_bytes": ("bytes", False, True),
}

# unit of a figure -> what else it may be written in
CONVERTIBLE: Mapping[str, Mapping[str, float]] = {
    "ms": {"ms": 1.0, "us": 1e-3, "s": 1e3},
    "bytes": {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1024.0**2, "bytes": 1.0},
    "fraction": {"%": 0.01},
    "macs": {"k": 1e3, "M": 1e6, "G": 1e9, "MMACs": 1e6},
    "params": {"k": 1e3, "M": 1e6},
}


class UnknownFigure(ValueError):
    """An objective or limit on something that is not a figure, or of a device that is not profiled."""


class Infeasible(RuntimeError):
    """Limits that no architecture found can meet; says which binds and the nearest reachable point."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its 90 % interval and where it comes from."""

    value: float
    low: float
    high: float
    origin: Origin

    @classmethod
    def exact(cls, value: float) -> Figure:
        return cls(value, value, value, "exact")

    def to_dict(self) -> dict[str, float | str]:
        return {"value": self.value, "low": self.low, "high": self.high, "origin": self.origin}


Figures = Mapping[str, Figure]


@dataclass(frozen=True)
class ProfiledDevice:
    """A device, and the latency predictor fitted for it where its profile does not ship one."""

    profile: DeviceProfile
    predictor: LatencyPredictor | None = None

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def key(self) -> str:
        """Digest of what its figures depend on besides the network."""
        fitted = self.predictor.model if self.predictor else None
        return hashlib.sha256(f"{self.profile!r}{fitted!r}".encode()).hexdigest()[:12]

    def figure(self, network: Network, name: str) -> Figure:
        """`latency_ms`, `sram_bytes` or `flash_bytes` of a network on the device; infinite where it cannot run."""
        if self.profile.illegal_layers(network):
            return Figure.exact(math.inf)
        if name == "sram_bytes":
            return Figure.exact(self.profile.sram_bytes(network))
        if name == "flash_bytes":
            return Figure.exact(self.profile.flash_bytes(network))
        predicted = self.predictor.predict([network])[0] if self.predictor else self.profile.latency(network)
        return Figure(predicted.mean_ms, predicted.low_ms, predicted.high_ms, "predicted")


def _key(name: str, device: str | None) -> str:
    """How a figure is written wherever several devices are in play."""
    if name not in FIGURES:
        near = difflib.get_close_matches(name, FIGURES, n=1)
        raise UnknownFigure(f"unknown figure {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(FIGURES)}"))
    if FIGURES[name][2] and device is None:
        raise UnknownFigure(f"{name} belongs to a device; write {name}@DEVICE")
    if not FIGURES[name][2] and device is not None:
        raise UnknownFigure(f"{name} does not depend on a device; write it without @{device}")
    return f"{name}@{device}" if device else name


def _device_name(device: ProfiledDevice | DeviceProfile | str | None) -> str | None:
    return device if device is None or isinstance(device, str) else device.name


@dataclass(frozen=True, slots=True)
class Objective:
    """What to make as large or as small as possible; the direction travels with it."""

    name: str
    direction: Literal["maximize", "minimize"]
    device: str | None = None

    @property
    def key(self) -> str:
        return _key(self.name, self.device)

    @property
    def unit(self) -> str:
        return FIGURES[self.name][0]

    def cost(self, value: float) -> float:
        """The value turned so that less is better."""
        return -value if self.direction == "maximize" else value


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound that a chosen architecture must meet. With a confidence, the end of the interval must meet it."""

    name: str
    operator: Literal["<=", ">="]
    value: float
    device: str | None = None
    confidence: float | None = None

    @property
    def key(self) -> str:
        return _key(self.name, self.device)

    def violation(self, figure: Figure) -> float:
        """How far the figure is beyond the limit, as a share of the limit; 0 or less when it is met."""
        scale = abs(self.value) or 1.0
        if self.operator == "<=":
            return ((figure.high if self.confidence else figure.value) - self.value) / scale
        return (self.value - (figure.low if self.confidence else figure.value)) / scale

    def __str__(self) -> str:
        at = f" at {self.confidence:.0%}" if self.confidence else ""
        return f"{self.key}{self.operator}{self.value:g}{at}"


def maximize(name: str, device: ProfiledDevice | DeviceProfile | str | None = None) -> Objective:
    return _checked(Objective(name, "maximize", _device_name(device)))


def minimize(name: str, device: ProfiledDevice | DeviceProfile | str | None = None) -> Objective:
    return _checked(Objective(name, "minimize", _device_name(device)))


def at_most(
    name: str,
    value: float,
    device: ProfiledDevice | DeviceProfile | str | None = None,
    *,
    confidence: float | None = None,
) -> Limit:
    return _checked_limit(Limit(name, "<=", float(value), _device_name(device), confidence))


def at_least(
    name: str,
    value: float,
    device: ProfiledDevice | DeviceProfile | str | None = None,
    *,
    confidence: float | None = None,
) -> Limit:
    return _checked_limit(Limit(name, ">=", float(value), _device_name(device), confidence))


def _checked(objective: Objective) -> Objective:
    _ = objective.key
    return objective


def _checked_limit(limit: Limit) -> Limit:
    _ = limit.key
    if limit.confidence is not None and limit.confidence != UPPER_CONFIDENCE:
        raise ValueError(f"confidence {limit.confidence:g}: intervals are 90 %, so only {UPPER_CONFIDENCE} can be asked for")
    return limit


def parse_objective(text: str) -> Objective:
    """`accuracy`, `latency_ms@host-cpu`: in the direction in which the figure is better."""
    name, _, device = text.strip().partition("@")
    _key(name, device or None)
    return Objective(name, "maximize" if FIGURES[name][1] else "minimize", device or None)


_LIMIT = re.compile(r"^\s*([A-Za-z_0-9]+)(?:@([^<>=\s]+))?\s*(<=|>=)\s*([-+0-9.eE]+)\s*([A-Za-z%]*)\s*$")


def parse_limit(text: str, confidence: float | None = None) -> Limit:
    """`NAME[@DEVICE] <= NUMBER[unit]`, the unit being that of the figure or a convertible one.

    A confidence only applies to figures that have an interval (latencies). Raises UnknownFigure or ValueError
    with the right form.
    """
    found = _LIMIT.match(text)
    if not found:
        raise ValueError(f"cannot read the limit {text!r}; write NAME[@DEVICE]<=NUMBER[unit], such as 'latency_ms@host-cpu<=5'")
    name, device, operator, number, unit = found.groups()
    _key(name, device)
    known = CONVERTIBLE[FIGURES[name][0]]
    if unit and unit not in known:
        raise ValueError(f"limit {text!r}: {name} is in {FIGURES[name][0]}, not {unit!r}; write a plain number, or one of {', '.join(known)}")
    try:
        value = float(number) * known.get(unit, 1.0)
    except ValueError:
        raise ValueError(f"limit {text!r}: {number!r} is not a number") from None
    asked = confidence if name == "latency_ms" else None
    return _checked_limit(Limit(name, operator, value, device, asked))  # type: ignore[arg-type]


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


def check_devices(keys: Iterable[str], devices: Mapping[str, ProfiledDevice]) -> None:
    """Raise UnknownFigure for a figure of a device that is not profiled."""
    for key in keys:
        device = key.partition("@")[2]
        if device and device not in devices:
            near = difflib.get_close_matches(device, devices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; profiled here: {', '.join(devices) or 'none'}"
            raise UnknownFigure(f"{key}: the device {device!r} is not profiled{hint}")
