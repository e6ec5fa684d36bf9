"""The figures of a million architectures at once: all that is cheap, from their codes.

What is a sum over slots (MACs, bytes, additive latencies) and what is the largest of slots (peaks of memory, for most
planners) is looked up. The rest has a lower bound from the same look-ups: what runs in patches costs at least what it
costs whole and needs no memory at all, the arena of TensorFlow Lite Micro is at least as large as what lives at one
time. Those architectures are lowered, one after the other, when their exact figures are asked for.

Notation: n architectures, d choices; codes are (n, d) integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hardware_profiles.cost_model import AdditiveModel, Conversion, UnsupportedLayer, block_features, conversions_of
from hardware_profiles.memory import (
    TFLM_GREEDY,
    part_flash_bytes,
    part_peak_bytes,
    part_persistent_sram_bytes,
    storage_of,
)
from nas.costs import Limit, ProfiledDevice, cheap_figures
from predictors import LatencyPredictor, NewDevicePredictor
from search_spaces import INPUT, CostTable, Layer, Precision, SearchSpace
from search_spaces.layers import PREV

ROWS_AT_ONCE = 1 << 15
WHOLE = ("macs", "int8_macs", "params", "model_bytes")  # the first columns, of every table
PATCHED = "patched"  # the last column, where a space has patches: whether the architecture runs in them


@dataclass(frozen=True)
class Estimates:
    """A figure of n architectures; infinite where a device cannot run one. The ends of the 90 % interval are None where
    the error is not known."""

    value: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None

    @classmethod
    def exact(cls, value: np.ndarray) -> Estimates:
        return cls(value, value, value)

    @classmethod
    def within(cls, value: np.ndarray, relative_error: float | None) -> Estimates:
        """As `hardware_profiles.cost_model.predicted`."""
        if relative_error is None:
            return cls(value, None, None)
        low = np.multiply(value, max(1 - relative_error, 0.0), where=np.isfinite(value), out=value.copy())
        return cls(value, low, value * (1 + relative_error))

    def judged_by(self, limit: Limit) -> np.ndarray:
        """What a limit is compared with: the value, or the end of the interval where the limit has a confidence."""
        end = self.high if limit.operator == "<=" else self.low
        return self.value if limit.confidence is None or end is None else end


@dataclass(frozen=True)
class Linear:
    """A figure as constant + columns of the table times weights."""

    weights: Mapping[int, float]
    constant: float = 0.0

    def times(self, factor: float) -> Linear:
        return Linear({column: factor * weight for column, weight in self.weights.items()}, factor * self.constant)


class FigureTable:
    """Figures of architectures given as codes, equal to those of their networks.

    Args:
        space: whose architectures.
        keys: of the figures; accuracy is left out.
        devices: those that the keys name.
    """

    def __init__(self, space: SearchSpace, keys: Iterable[str], devices: Mapping[str, ProfiledDevice]) -> None:
        self.space, self.devices = space, dict(devices)
        self.keys = tuple(key for key in keys if key != "accuracy")
        parts = {_part_of(key) for key in self.keys if "@" in key}
        sums = {part for part in parts if part[0] != "sram_bytes"}
        sums |= {("kept_bytes", name) for part, name in parts if part == "sram_bytes"}
        self.peaks = tuple(sorted(name for part, name in parts if part == "sram_bytes"))
        self.sums: tuple[tuple[str, str], ...] = (*((name, "") for name in WHOLE), *sorted(sums))
        self.has_patches = any(choice.role == "patches" and choice.options != (1,) for choice in space.choices)
        maxima = len(self.peaks) + self.has_patches
        self.table = CostTable(space, self._slot, len(self.sums) + maxima, maxima=maxima)
        self._prices: dict[Layer, list[float]] = {}
        self._errors = {name: self._relative_error(device) for name, device in self.devices.items()}
        self._transferred = {
            name: device.predictor.table(space)
            for name, device in self.devices.items()
            if isinstance(device.predictor, NewDevicePredictor)
        }

    # figures -------------------------------------------------------------------------------------------

    def figures(self, codes: np.ndarray, keys: Iterable[str] | None = None) -> dict[str, Estimates]:
        """The figures of n architectures by key, each of shape (n,); those of `keys`, or all.

        Raises ValueError for codes of another shape or out of range, UnavailableCost for a device whose simulator is
        not installed.
        """
        found, sure = self.bounds(codes, keys)
        self._lower(codes, found, sure, ~np.logical_and.reduce([*sure.values(), np.ones(len(codes), bool)]))
        return found

    def violation(self, codes: np.ndarray, limits: Iterable[Limit], *, most: float) -> np.ndarray:
        """How far n architectures are beyond limits (n,): the sum of the shares of each limit, 0 when all are met.

        Infinite where a figure of a device is. Where a lower bound is above `most` already, that is the answer. Limits
        on accuracy, and on latencies that only a simulator tells, are not judged.
        """
        limits = [limit for limit in limits if limit.key in self.keys and not self._is_simulated(limit.key)]
        asked = [key for key in self.keys if not self._is_simulated(key)]
        parts = [codes[start : start + ROWS_AT_ONCE] for start in range(0, len(codes), ROWS_AT_ONCE)]
        found = [self._violation(part, limits, asked, most) for part in parts]
        return np.concatenate(found) if found else np.zeros(0)

    def _violation(self, codes: np.ndarray, limits: Sequence[Limit], keys: Sequence[str], most: float) -> np.ndarray:
        found, sure = self.bounds(codes, keys)
        total = _beyond(found, limits, sure)
        judged = {limit.key: sure[limit.key] for limit in limits}
        unsure = ~np.logical_and.reduce([*judged.values(), np.ones(len(codes), bool)]) & (total <= most)
        if unsure.any():
            self._lower(codes, found, judged, unsure & np.isfinite(total))
            total = np.where(unsure, _beyond(found, limits, {}), total)
        return total

    def _lower(
        self, codes: np.ndarray, found: Mapping[str, Estimates], sure: Mapping[str, np.ndarray], rows: np.ndarray
    ) -> None:
        """Put exact figures in the place of bounds, in rows (n,) of `found`."""
        for row in np.flatnonzero(rows):
            network = self.space.lower(self.space.from_codes(codes[row]))
            unsure = [key for key, known in sure.items() if not known[row]]
            for key, figure in cheap_figures(network, unsure, self.devices).items():
                ends = (found[key].value, figure.value), (found[key].low, figure.low), (found[key].high, figure.high)
                for array, value in ends:
                    if array is not None and value is not None:
                        array[row] = value

    def bounds(
        self, codes: np.ndarray, keys: Iterable[str] | None = None
    ) -> tuple[dict[str, Estimates], dict[str, np.ndarray]]:
        """Figures by key, and which of them (n,) are exact; the others are lower bounds."""
        columns = self.table.costs(codes)
        patched = columns[:, -1] > 0 if self.has_patches else np.zeros(len(columns), bool)
        found: dict[str, Estimates] = {}
        sure: dict[str, np.ndarray] = {}
        for key in self.keys if keys is None else dict.fromkeys(keys):
            found[key] = self._estimates(key, columns, codes)
            lowered = np.ones(len(columns), bool) if self.is_lowered(key) else patched
            by_part = "@" in key and not key.startswith("flash_bytes")
            sure[key] = ~lowered | ~np.isfinite(found[key].value) if by_part else np.ones(len(columns), bool)
        return found, sure

    def _estimates(self, key: str, columns: np.ndarray, codes: np.ndarray) -> Estimates:
        name, device = _part_of(key)
        if key == "int8_macs_share":
            macs = columns[:, 0]
            return Estimates.exact(np.divide(columns[:, 1], macs, out=np.zeros(len(macs)), where=macs > 0))
        if name == "sram_bytes":
            kept = columns[:, self.sums.index(("kept_bytes", device))]
            return Estimates.exact(self.sram_bytes(device, columns[:, self._peak_column(device)]) + kept)
        if name == "latency_ms":
            return self._latency(key, columns, codes)
        line = self.linear(key)
        assert line is not None
        (column, weight), *_ = line.weights.items()
        return Estimates.exact(columns[:, column] * weight + line.constant)

    def _latency(self, key: str, columns: np.ndarray, codes: np.ndarray) -> Estimates:
        name, _, device = key.partition("@")
        column = columns[:, self.sums.index(("latency_ms", device))]
        profiled = self.devices[device]
        if device in self._transferred:
            found = self._transferred[device].predict(codes)
            unable = np.isinf(column)
            mean_ms, low_ms, high_ms = (
                None if each is None else np.where(unable, np.inf, each)
                for each in (found.mean_ms, found.low_ms, found.high_ms)
            )
            assert mean_ms is not None
            latency = Estimates(mean_ms, low_ms, high_ms)
        else:
            model = _additive(profiled)
            latency = Estimates.within(column + (model.constant_ms if model else 0.0), self._errors[device])
        if name == "latency_ms":
            return latency
        energy = profiled.profile.energy_model
        assert energy is not None
        error = energy.relative_error if profiled.has_energy_error else None
        return Estimates.within(energy.power_mw * latency.value, error)

    def _relative_error(self, device: ProfiledDevice) -> float | None:
        if isinstance(device.predictor, LatencyPredictor):
            return device.predictor.table(self.space).relative_error
        return device.profile.latency_model.relative_error

    # what limits are solved with -----------------------------------------------------------------------

    def is_lowered(self, key: str) -> bool:
        """Whether a figure is not looked up for any architecture: there is only a bound without lowering it."""
        name, device = _part_of(key)
        if name == "sram_bytes":
            return self.devices[device].profile.planner == TFLM_GREEDY
        return self._is_simulated(key)

    def is_simulated(self, device: str) -> bool:
        """Whether a compiler, which takes seconds, says what the device takes for one network."""
        profiled = self.devices[device]
        return profiled.predictor is None and profiled.profile.latency_model.accelerator is not None

    def _is_simulated(self, key: str) -> bool:
        name, device = _part_of(key)
        return name == "latency_ms" and self.is_simulated(device)

    def end(self, limit: Limit) -> float:
        """What a limit is compared with, over the value: 1, or where it has a confidence that of the interval's end."""
        if limit.confidence is None:
            return 1.0
        device = self.devices[str(limit.device)]
        energy = device.profile.energy_model
        error = energy.relative_error if limit.name == "energy_uj" and energy else self._errors[device.name]
        assert error is not None
        return 1 + error if limit.operator == "<=" else max(1 - error, 0.0)

    def linear(self, key: str) -> Linear | None:
        """How a figure is a sum over columns; None where it is not. Of what runs in patches it is a lower bound."""
        name, device = _part_of(key)
        is_transferred = name == "latency_ms" and device in self._transferred
        if (name, device) not in self.sums or is_transferred or self.is_lowered(key):
            return None
        column = self.sums.index((name, device))
        constant = 0.0
        if name == "flash_bytes":
            constant = float(self.devices[device].profile.flash_overhead_bytes)
        elif name == "latency_ms":
            model = _additive(self.devices[device])
            constant = model.constant_ms if model else 0.0
        line = Linear({column: 1.0}, constant)
        if key.startswith("energy_uj"):
            energy = self.devices[device].profile.energy_model
            assert energy is not None
            return line.times(energy.power_mw)
        return line

    def sram_bytes(self, device: str, peak_bytes: np.ndarray) -> np.ndarray:
        """SRAM for a peak of activations, without what is kept of each layer; it grows with the peak."""
        profile = self.devices[device].profile
        fixed = profile.sram_overhead_bytes + storage_of(profile.storage).sram_fixed_bytes
        return np.ceil(peak_bytes * (1 + profile.sram_overhead)) + fixed

    def _peak_column(self, device: str) -> int:
        return len(self.sums) + self.peaks.index(device)

    def peak_and_kept(self, key: str) -> tuple[int, int]:
        """Columns of the peak, and of what is kept of each layer, of `sram_bytes@DEVICE`."""
        _, device = _part_of(key)
        return self._peak_column(device), self.sums.index(("kept_bytes", device))

    # the table -----------------------------------------------------------------------------------------

    def _slot(self, layers: Sequence[Layer], fed_with: Precision) -> list[float]:
        """The columns of the layers of one slot; those of a patch stage as if it ran whole, and without its memory."""
        source = INPUT if any(INPUT in layer.inputs for layer in layers) else PREV
        totals = [0.0] * len(self.sums)
        for layer in layers:
            for column, price in enumerate(self._priced(layer)):
                totals[column] += price
        given = {source: fed_with.is_quantized}
        copies = list(conversions_of(layers, given))
        for column, (name, device) in enumerate(self.sums):
            model = _additive(self.devices[device]) if name == "latency_ms" else None
            if copies and model is not None and device not in self._transferred:
                totals[column] += sum(_conversion_ms(model, copy) for copy in copies)
                totals[column] += _unfused_ms(model, layers, given)
        patched = any(layer.patches > 1 for layer in layers)
        peaks = [self._peak(name, () if patched else layers, source, fed_with) for name in self.peaks]
        return [*totals, *peaks, *([float(patched)] if self.has_patches else [])]

    def _peak(self, device: str, layers: Sequence[Layer], source: str, fed_with: Precision) -> float:
        profile = self.devices[device].profile
        assert profile.planner is not None
        return part_peak_bytes(layers, source, fed_with, profile.planner, explicit_padding=profile.explicit_padding)

    def _priced(self, layer: Layer) -> list[float]:
        held = self._prices.get(layer)
        if held is None:
            held = self._prices[layer] = [self._price(layer, name, device) for name, device in self.sums]
        return held

    def _price(self, layer: Layer, name: str, device: str) -> float:
        if device and not self.devices[device].profile.is_legal(layer):
            return math.inf
        if name == "latency_ms":
            model = _additive(self.devices[device])
            return 0.0 if model is None or device in self._transferred else _layer_ms(model, layer)
        if name == "flash_bytes":
            return part_flash_bytes([layer], self.devices[device].profile.storage)
        if name == "kept_bytes":
            return part_persistent_sram_bytes([layer], self.devices[device].profile.storage)
        if name == "int8_macs":
            return layer.macs if layer.precision.is_quantized else 0
        return float({"macs": layer.macs, "params": layer.params, "model_bytes": layer.weight_bytes}[name])


def _part_of(key: str) -> tuple[str, str]:
    """(figure that it is computed from, device) of a key; an energy is computed from a latency."""
    name, _, device = key.partition("@")
    return ("latency_ms" if name == "energy_uj" else name), device


def _beyond(found: Mapping[str, Estimates], limits: Iterable[Limit], sure: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sum (n,) of the shares by which limits are exceeded; of a lower bound, that it is too low says nothing."""
    total = np.zeros(len(next(iter(found.values())).value))
    for key, estimates in found.items():
        if "@" in key:
            total[np.isinf(estimates.value)] = np.inf
    for limit in limits:
        reached = found[limit.key].judged_by(limit)
        beyond = reached - limit.value if limit.operator == "<=" else limit.value - reached
        share = np.maximum(beyond / (abs(limit.value) or 1.0), 0.0)
        if limit.operator == ">=" and limit.key in sure:
            share = np.where(sure[limit.key], share, 0.0)
        total += np.where(np.isinf(total), 0.0, share)
    return total


def _additive(device: ProfiledDevice) -> AdditiveModel | None:
    """The sum over layers that predicts the device's latencies; None where they are not one."""
    if isinstance(device.predictor, LatencyPredictor):
        return device.predictor.model
    return None if device.predictor else device.profile.latency_model.additive


def _layer_ms(model: AdditiveModel, layer: Layer) -> float:
    """Milliseconds of a layer whose inputs come as it needs them; infinite where no measurement covers it."""
    whole = replace(layer, patches=1)
    try:
        return model.layers_ms([whole], dict.fromkeys(layer.inputs, layer.precision.is_quantized))
    except UnsupportedLayer:
        return math.inf


def _conversion_ms(model: AdditiveModel, copy: Conversion) -> float:
    if f"{copy.family}.int8" not in model.supported:
        return math.inf
    amounts = {"count": 1.0, "bytes": copy.elements * 5.0}
    return sum(model.coefficients.get(f"{copy.family}.int8.{name}", 0.0) * each for name, each in amounts.items())


def _unfused_ms(model: AdditiveModel, layers: Sequence[Layer], given: Mapping[str, bool]) -> float:
    """What adds of tensors that are converted first cost more, which no layer tells by itself."""
    made = {**given, **{layer.name: layer.precision.is_quantized for layer in layers}}
    adds = [replace(layer, patches=1) for layer in layers if layer.kind == "add"]
    amounts = block_features(adds, made, {}, model.channel_block) if model.channel_block else {}
    return sum(model.coefficients.get(name, 0.0) * amount for name, amount in amounts.items())
