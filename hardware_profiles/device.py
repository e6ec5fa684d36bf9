"""Device profiles: what a network runs on, read from one YAML file a device.

A profile says which precisions are legal for which kinds of layer, the memory there is and how a runtime
uses it, and what latency to expect. A number stands in the file together with its source.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from hardware_profiles.command import CommandSettings, InvalidCommand
from hardware_profiles.cost_model import (
    FAMILIES,
    QUANTITIES,
    SHAPE_QUANTITIES,
    AdditiveModel,
    Prediction,
    predicted,
)
from hardware_profiles.memory import (
    EXPLICIT_PADDINGS,
    NEVER,
    PLANNERS,
    STORAGES,
    flash_bytes,
    peak_sram_bytes,
    persistent_sram_bytes,
)
from hardware_profiles.patches import executed_macs
from hardware_profiles.vela import ACCELERATORS, estimate
from search_spaces import KINDS, PRECISIONS, Layer, Network

SHIPPED = Path(__file__).parent / "devices"
SCHEMA = 1
DEVICE_KINDS = ("cpu", "mcu", "gpu", "npu")
ORIGINS = ("fitted", "derived", "measured", "simulated")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_THREADED = re.compile(r"(host-cpu)-([2-9]|[1-9][0-9]{1,2})-threads")
_REQUIRED = object()


class UnknownDevice(LookupError):
    """A name that is no shipped profile, or a file that is not there."""


class InvalidProfile(ValueError):
    """A profile file with a key or value that is missing, unknown or of the wrong type."""


class UnavailableCost(RuntimeError):
    """A cost that the profile has no model of."""


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Where the latencies of a device come from.

    origin: `fitted` to measurements of this device; `derived` from a model of another one, so that its
        error is not known; `measured`: there is no model, the device is at hand and is measured; `simulated`:
        a compiler's estimate for an accelerator, whose error is not known either.
    relative_error: half the 90 % interval over the prediction, from networks left out of the fit.
    held_out: those errors in full (shares of the latency), beside those of a model that knows MACs only.
    command: what measures the device, where it is measured and is not this machine.
    this_machine: whether it is measured here, through onnxruntime.
    accelerator: which of `vela.ACCELERATORS` is simulated.
    """

    origin: str
    source: str
    additive: AdditiveModel | None = None
    relative_error: float | None = None
    held_out: Mapping[str, float] = field(default_factory=dict)
    command: CommandSettings | None = None
    this_machine: bool = False
    accelerator: str | None = None


@dataclass(frozen=True, slots=True)
class Energy:
    """The energy of one forward pass of one sample, in microjoules, with its 90 % interval where that is known."""

    mean_uj: float
    low_uj: float | None
    high_uj: float | None


@dataclass(frozen=True, slots=True)
class EnergyModel:
    """Energy as a power times the latency: what a board draws while it computes hardly depends on the network.

    relative_error: half the 90 % interval over the prediction, that of the latency included.
    held_out: errors on networks left out of both fits, beside those of the measured latency and of the MACs only.
    """

    origin: str
    source: str
    power_mw: float
    relative_error: float | None = None
    held_out: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """A device with one runtime.

    precisions: kind of layer -> names of the precisions it may have; a kind that is absent cannot run.
    planner: which of `memory.PLANNERS` the runtime's memory is modelled by; None where SRAM is no concern.
    explicit_padding: which of `memory.EXPLICIT_PADDINGS`: where the runtime pads by operators of its own.
    sram_overhead, sram_overhead_bytes: what a runtime needs on top of the planned peak, as a share of it and as a
        number of bytes.
    storage: which of `memory.STORAGES`: what the runtime keeps of a network in flash and SRAM beside the parameters.
    patches: whether the runtime can run the first layers patch by patch; where not, a network that does is illegal.
    energy_model: None where no energy was measured.
    sources: dotted key of the file -> where its number comes from.
    """

    name: str
    title: str
    kind: str
    runtime: str
    threads: int
    precisions: Mapping[str, tuple[str, ...]]
    latency_model: LatencyModel
    sram_limit_bytes: int | None = None
    flash_limit_bytes: int | None = None
    planner: str | None = None
    sram_overhead: float = 0.0
    sram_overhead_bytes: int = 0
    flash_overhead_bytes: int = 0
    energy_model: EnergyModel | None = None
    explicit_padding: str = NEVER
    storage: str = "c_arrays"
    patches: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """Whether latencies are measured for each space, here, by a command or by other means, rather than shipped."""
        return self.latency_model.origin == "measured"

    @property
    def is_at_hand(self) -> bool:
        """Whether it is this machine, which may be measured at any time; a command is only run when asked for."""
        return self.latency_model.this_machine

    def illegal_layers(self, network: Network) -> tuple[str, ...]:
        """Names of the layers that the device cannot run as they are; nothing is converted silently."""
        return tuple(layer.name for layer in network.layers if not self.is_legal(layer))

    def is_legal(self, layer: Layer) -> bool:
        """Whether the device has the layer's precision for its kind, and runs patch by patch where the layer does."""
        return layer.precision.name in self.precisions.get(layer.kind, ()) and (layer.patches == 1 or self.patches)

    def macs(self, network: Network) -> int:
        """Multiply-accumulates that the device does in one forward pass: halos of patches that it computes again
        count each time."""
        return executed_macs(network)

    def sram_bytes(self, network: Network) -> int:
        """Peak SRAM of one forward pass, with what the runtime keeps; raises UnavailableCost without a planner."""
        if self.planner is None:
            raise UnavailableCost(f"{self.name} has no memory planner; only profiles with one give sram_bytes")
        peak = peak_sram_bytes(network, self.planner, explicit_padding=self.explicit_padding)
        planned = ceil(peak * (1 + self.sram_overhead))
        return planned + self.sram_overhead_bytes + persistent_sram_bytes(network, self.storage)

    def flash_bytes(self, network: Network) -> int:
        """The stored network and the runtime's code."""
        return flash_bytes(network, self.flash_overhead_bytes, self.storage)

    def latency(self, network: Network) -> Prediction:
        """The predicted latency of one forward pass of one sample.

        Raises UnavailableCost where the device is measured instead or its simulator is not installed, and
        UnsupportedLayer naming the layers that no measurement covers. Whether the layers are legal is
        `illegal_layers`' business.
        """
        if self.latency_model.accelerator is not None:
            try:
                return Prediction(estimate(network, self.latency_model.accelerator), None, None, "simulated")
            except ImportError as error:
                raise UnavailableCost(f"{self.name}: {error}") from None
        additive = self.latency_model.additive
        if additive is None:
            raise UnavailableCost(
                f"{self.name} has no latency model: it is measured where it is at hand; "
                "fit a predictors.LatencyPredictor on measurements of it"
            )
        return predicted(additive.latency_ms(network), self.latency_model.relative_error)

    def energy(self, latency_ms: float) -> Energy:
        """The predicted energy of a forward pass of that latency; raises UnavailableCost where none was measured."""
        model = self.energy_model
        if model is None:
            raise UnavailableCost(f"{self.name} has no energy model; no energy of it was measured")
        known = predicted(model.power_mw * latency_ms, model.relative_error)
        return Energy(known.mean_ms, known.low_ms, known.high_ms)


def device_names() -> tuple[str, ...]:
    """The shipped profiles, sorted."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def is_shipped(name: str) -> bool:
    """Whether a name is that of a shipped profile, or of this machine with a number of threads."""
    threaded = _THREADED.fullmatch(name)
    return (threaded[1] if threaded else name) in device_names()


def is_device_file(text: str) -> bool:
    """Whether a device is given by its file rather than by its name."""
    return text.endswith((".yaml", ".yml")) or "/" in text or os.sep in text


def load_device(name_or_path: str | Path) -> DeviceProfile:
    """A shipped profile by name, or a file: anything with a path separator or a .yaml suffix.

    `host-cpu-4-threads`, or with another number, is this machine with so many threads: a device of its own, whose
    measurements are not those of one thread.

    Raises UnknownDevice with the nearest name, and InvalidProfile in one line for a file that is not right.
    """
    text = str(name_or_path)
    threaded = _THREADED.fullmatch(text)
    if threaded and threaded[1] in device_names():
        count = int(threaded[2])
        return replace(
            load_device(threaded[1]), name=text, title=f"The CPU of this machine, {count} threads", threads=count
        )
    is_file = isinstance(name_or_path, Path) or is_device_file(text)
    if not is_file and text not in device_names():
        raise UnknownDevice(f"unknown device {text!r}{_nearest(text, device_names())}; or give the path of a YAML file")
    path = Path(name_or_path) if is_file else SHIPPED / f"{text}.yaml"
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnknownDevice(f"cannot read the device file {path}: {error}") from None
    try:
        data = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise InvalidProfile(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return _profile(_Section(str(path), "", data))


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


class _Section:
    """A mapping of the file; every key is taken once, and what is left at the end is unknown."""

    def __init__(self, file: str, key: str, data: object) -> None:
        self.file, self.key = file, key
        if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
            raise self.wrong("", "a mapping with names as keys", data)
        self.left: dict[str, Any] = dict(data)
        self.taken: list[str] = []

    def path(self, name: str) -> str:
        return ".".join(filter(None, (self.key, name)))

    def wrong(self, name: str, expected: str, got: object) -> InvalidProfile:
        where = self.path(name)
        got_text = "nothing" if got is None else repr(got) if len(repr(got)) < 60 else f"a {type(got).__name__}"
        return InvalidProfile(f"{self.file}: {where + ': ' if where else ''}expected {expected}, got {got_text}")

    def take(self, name: str, default: object = _REQUIRED) -> Any:
        self.taken.append(name)
        value = self.left.pop(name, default)
        if value is _REQUIRED:
            # a misspelt key is better reported as itself than as the absence of the right one
            close = [other for other in self.left if difflib.get_close_matches(other, [name], n=1)]
            hint = f"; did you mean it by {close[0]!r}?" if close else ""
            raise InvalidProfile(f"{self.file}: missing key {self.path(name)!r}{hint}")
        return value

    def text(self, name: str, *, choices: Iterable[str] = (), default: object = _REQUIRED) -> str:
        value = self.take(name, default)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(name, "a text", value)
        if choices and value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}", value)
        return value

    def number(self, name: str, *, lowest: float = 0.0, default: object = _REQUIRED) -> float:
        value = self.take(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < lowest:
            raise self.wrong(name, f"a number of {lowest:g} or more", value)
        return float(value)

    def integer(self, name: str, *, lowest: int = 0) -> int:
        value = self.take(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise self.wrong(name, f"an integer of {lowest} or more", value)
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def section(self, name: str, *, optional: bool = False) -> _Section | None:
        value = self.take(name, None if optional else _REQUIRED)
        return None if value is None and optional else _Section(self.file, self.path(name), value)

    def done(self) -> None:
        for name in self.left:
            raise InvalidProfile(f"{self.file}: unknown key {self.path(name)!r}{_nearest(name, self.taken)}")


def _profile(top: _Section) -> DeviceProfile:
    if top.integer("schema") != SCHEMA:
        raise InvalidProfile(f"{top.file}: schema: expected {SCHEMA}; this file is of another version of the project")
    name = top.text("name")
    if not _NAME.fullmatch(name):
        raise top.wrong("name", "lower-case letters, digits, - and _", name)
    title, kind = top.text("title"), top.text("kind", choices=DEVICE_KINDS)
    runtime, threads = top.text("runtime"), top.integer("threads", lowest=1)
    sources: dict[str, str] = {}
    limits = _limits(top.section("limits", optional=True), sources)
    precisions = _precisions(top, sources)
    memory = _memory(top.section("memory", optional=True), sources)
    patches = _patches(top, sources)
    latency_section = top.section("latency")
    assert latency_section is not None
    latency = _latency(latency_section)
    energy = _energy(top.section("energy", optional=True))
    top.done()
    return DeviceProfile(
        name,
        title,
        kind,
        runtime,
        threads,
        precisions,
        latency,
        **limits,
        **memory,
        energy_model=energy,
        patches=patches,
        sources=sources,
    )


def _sourced(section: _Section, name: str, sources: dict[str, str]) -> _Section:
    """A number with its source: a mapping of `value` and `source`; the value is still to be taken."""
    inner = section.section(name)
    assert inner is not None
    sources[inner.key] = inner.text("source")
    return inner


def _limits(section: _Section | None, sources: dict[str, str]) -> dict[str, Any]:
    if section is None:
        return {}
    found: dict[str, Any] = {}
    for name in ("sram_bytes", "flash_bytes"):
        inner = _sourced(section, name, sources)
        found[name.replace("_", "_limit_")] = inner.integer("value", lowest=1)
        inner.done()
    section.done()
    return found


def _precisions(top: _Section, sources: dict[str, str]) -> dict[str, tuple[str, ...]]:
    section = _sourced(top, "precisions", sources)
    layers = section.section("value")
    assert layers is not None
    found: dict[str, tuple[str, ...]] = {}
    for kind in list(layers.left):
        names = layers.take(kind)
        if kind not in KINDS:
            raise InvalidProfile(f"{layers.file}: unknown kind of layer {layers.path(kind)!r}{_nearest(kind, KINDS)}")
        if not isinstance(names, list) or not names or not all(name in PRECISIONS for name in names):
            raise layers.wrong(kind, f"a list of {', '.join(PRECISIONS)}", names)
        found[kind] = tuple(names)
    section.done()
    return found


def _patches(top: _Section, sources: dict[str, str]) -> bool:
    if "patches" not in top.left:
        return False
    section = _sourced(top, "patches", sources)
    patches = section.flag("value")
    section.done()
    return patches


def _memory(section: _Section | None, sources: dict[str, str]) -> dict[str, Any]:
    if section is None:
        return {}
    found: dict[str, Any] = {
        "planner": section.text("planner", choices=PLANNERS),
        "explicit_padding": section.text("explicit_padding", choices=EXPLICIT_PADDINGS, default=NEVER),
        "storage": section.text("storage", choices=STORAGES, default="c_arrays"),
    }
    overheads = [name for name in ("sram_overhead", "sram_overhead_bytes") if name in section.left]
    for name in (*(overheads or ["sram_overhead"]), "flash_overhead_bytes"):
        inner = _sourced(section, name, sources)
        found[name] = inner.number("value") if name == "sram_overhead" else inner.integer("value")
        inner.done()
    section.done()
    return found


def _latency(section: _Section) -> LatencyModel:
    origin, source = section.text("origin", choices=ORIGINS), section.text("source")
    if origin == "measured":
        command, here = _command(section), section.take("this_machine", False)
        if not isinstance(here, bool) or (here and command is not None):
            expected = "true or false" if not isinstance(here, bool) else "a command or this_machine, not both"
            raise InvalidProfile(f"{section.file}: {section.path('this_machine')}: expected {expected}, got {here!r}")
        section.done()
        return LatencyModel(origin, source, command=command, this_machine=here)
    if origin == "simulated":
        accelerator = section.text("accelerator", choices=ACCELERATORS)
        section.done()
        return LatencyModel(origin, source, accelerator=accelerator)
    constant_ms = section.number("constant_ms")
    coefficients = section.section("coefficients_ms")
    assert coefficients is not None
    values = {name: coefficients.number(name) for name in list(coefficients.left)}
    for name in values:
        family, _, rest = name.partition(".")
        precision, _, quantity = rest.partition(".")
        if family not in FAMILIES or precision not in PRECISIONS or quantity not in QUANTITIES + SHAPE_QUANTITIES:
            raise InvalidProfile(
                f"{section.file}: {coefficients.path(name)}: expected FAMILY.PRECISION.QUANTITY"
                f"{_nearest(family, FAMILIES)}"
            )
    relative_error, held_out = _errors(section) if origin == "fitted" else (None, {})
    section.done()
    return LatencyModel(origin, source, AdditiveModel(values, constant_ms), relative_error, held_out)


def _command(section: _Section) -> CommandSettings | None:
    command = section.take("command", None)
    if command is None:
        return None
    others = {each.name: section.take(each.name, each.default) for each in fields(CommandSettings)[1:]}
    try:
        return CommandSettings(command, **others)
    except InvalidCommand as error:
        raise InvalidProfile(f"{section.file}: {section.path(str(error))}") from None


def _energy(section: _Section | None) -> EnergyModel | None:
    if section is None:
        return None
    origin, source = section.text("origin", choices=("fitted", "derived")), section.text("source")
    power_mw = section.number("power_mw")
    relative_error, held_out = _errors(section) if origin == "fitted" else (None, {})
    section.done()
    return EnergyModel(origin, source, power_mw, relative_error, held_out)


def _errors(section: _Section) -> tuple[float, dict[str, float]]:
    """Half the 90 % interval, and the errors on networks left out."""
    relative_error = section.number("relative_error")
    errors = section.section("held_out")
    assert errors is not None
    return relative_error, {name: errors.number(name, lowest=-1.0) for name in list(errors.left)}
