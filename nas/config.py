"""Experiments: a YAML file, checked key by key, as values."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from hardware_profiles.device import is_device_file
from nas import coreset as coresets
from nas.costs import Limit, Objective, check_confidence, check_objectives, parse_limit, parse_objective
from nas.data import DIGITS
from nas.profile import FEWEST_SAMPLES, FEWEST_WITH_HELP
from nas.search import SearchSettings
from nas.train_settings import TrainSettings
from search_spaces import FAMILIES

RECIPES = Path(__file__).parent.parent / "experiments"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

LISTS = {"devices": "[{name: host-cpu, samples: 96}, {name: stm32f746}]", "search.limits": "[macs<=5M]"}


class BadExperiment(ValueError):
    """A key or value of an experiment that is missing, unknown or of the wrong type; says which and what to do."""


@dataclass(frozen=True)
class DataSettings:
    """Where the data is and how it is split; see `nas.load_data`.

    A relative `path` of a YAML file is taken from the folder of that file, one of `--set` or of a shipped recipe from
    the current folder; `digits` is no path.
    """

    path: str
    val_search: float = 0.1
    val_front: float = 0.1
    calibration: int = 512
    test: float = 0.2
    train_share: float = 1.0
    coreset: str = "random"
    side: int | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        coresets.check(self.train_share, self.coreset)


@dataclass(frozen=True)
class DeviceSettings:
    """A device to profile: a shipped name or a YAML file.

    Where it is measured: how many subnets at most, and the held-out error (half the 90 % interval, as a share) at
    which fewer are enough.
    """

    name: str
    samples: int = 120
    error: float = 0.05

    def __post_init__(self) -> None:
        if self.samples < FEWEST_WITH_HELP:
            raise BadExperiment(
                f"{self.name}: samples = {self.samples}; expected {FEWEST_WITH_HELP} or more "
                f"(about ten, with the help of known devices; {FEWEST_SAMPLES} for a fit of its own)"
            )
        if not 0 <= self.error < 1:
            raise BadExperiment(f"{self.name}: error = {self.error}; expected a share such as 0.05, or 0 to spend all")


@dataclass(frozen=True)
class SearchPlan(SearchSettings):
    """Objectives and limits, as text, and how to search."""

    objectives: tuple[str, ...] = ("accuracy", "macs")
    limits: tuple[str, ...] = ()
    confidence: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_confidence(self.confidence)
        check_objectives(self.parsed_objectives)
        _ = self.parsed_limits

    @property
    def parsed_objectives(self) -> list[Objective]:
        return [parse_objective(text) for text in self.objectives]

    @property
    def parsed_limits(self) -> list[Limit]:
        return [parse_limit(text, self.confidence) for text in self.limits]

    @property
    def settings(self) -> SearchSettings:
        return SearchSettings(self.trials, self.sampler, self.population, self.workers, self.asynchronous)


@dataclass(frozen=True)
class ExportPlan:
    """Which point of the front is exported: the best in one figure among those that meet the limits."""

    best: str = "accuracy"
    limits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_objective(self.best)
        _ = self.parsed_limits

    @property
    def parsed_limits(self) -> list[Limit]:
        return [parse_limit(text) for text in self.limits]


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run. `space` is a family and its settings."""

    name: str
    data: DataSettings
    space: Mapping[str, Any]
    seed: int = 0
    patience_s: float = 180.0  # how long to wait for a slow phase of a measured machine to pass
    train: TrainSettings = field(default_factory=TrainSettings)
    devices: tuple[DeviceSettings, ...] = ()
    search: SearchPlan = field(default_factory=SearchPlan)
    export: ExportPlan = field(default_factory=ExportPlan)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):  # it names the run directory
            raise BadExperiment(f"name: expected letters, digits, '.', '_' and '-', got {self.name!r}")
        if self.seed < 0:
            raise BadExperiment(f"seed: expected 0 or more, got {self.seed}")
        if not isinstance(self.space.get("family"), str):
            raise BadExperiment(f"space.family is missing; expected one of {', '.join(FAMILIES)}")
        strange = [key for key in self.space if not isinstance(key, str)]
        if strange:
            raise BadExperiment(f"space: expected names as keys, got {strange[0]!r}")
        names = [device.name for device in self.devices]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise BadExperiment(f"devices: {twice} is listed twice; leave one out")

    def to_dict(self) -> dict[str, Any]:
        return typing.cast(dict[str, Any], _plain(asdict(self)))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_experiment(name_or_path: str, overrides: Iterable[str] = ()) -> Experiment:
    """A shipped recipe by name, or a YAML file, with `key=value` overrides such as `data.path=images/`.

    Raises BadExperiment in one line that names the key, what was got and what was expected.
    """
    if name_or_path in recipe_names():
        return _read(RECIPES / f"{name_or_path}.yaml", overrides, Path.cwd())
    path = Path(name_or_path)
    if not path.is_file():
        hint = nearest(name_or_path, recipe_names())
        raise BadExperiment(f"no experiment {name_or_path!r}{hint}; or give the path of a YAML file")
    return read_experiment(path, overrides)


def read_experiment(path: Path, overrides: Iterable[str] = ()) -> Experiment:
    """An experiment from a YAML file; the data that it names is looked for beside it."""
    return _read(path, overrides, path.parent)


def _read(path: Path, overrides: Iterable[str], folder: Path) -> Experiment:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadExperiment(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise BadExperiment(f"{path}: expected keys such as name, data and space; got {type(content).__name__}")
    content.pop("versions", None)  # of the run that wrote it
    _make_absolute(content, folder)
    for override in overrides:
        _override(content, override)
    _make_absolute(content, Path.cwd())
    return typing.cast(Experiment, _build(Experiment, content, ""))


def _make_absolute(content: Mapping[str, Any], folder: Path) -> None:
    """Take relative paths of data and devices from a folder, so that the experiment means the same in any other."""
    data = content.get("data")
    if isinstance(data, dict) and isinstance(data.get("path"), str) and data["path"] != DIGITS:
        data["path"] = str((folder / data["path"]).resolve())
    devices = content.get("devices")
    for device in devices if isinstance(devices, list) else ():
        if isinstance(device, dict) and isinstance(device.get("name"), str) and is_device_file(device["name"]):
            device["name"] = str((folder / device["name"]).resolve())


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key.strip():
        raise BadExperiment(f"--set {override!r}: expected KEY=VALUE, such as train.epochs=10")
    *parents, last = key.strip().split(".")
    listed, bracket, _ = key.strip().partition("[")
    if bracket:
        raise BadExperiment(f"--set {override!r}: {_whole_list(listed)}")
    inner = content
    for depth, parent in enumerate(parents, 1):
        if inner.get(parent) is None:
            inner[parent] = {}
        inner = inner[parent]
        if isinstance(inner, list):
            raise BadExperiment(f"--set {override!r}: {_whole_list('.'.join(parents[:depth]))}")
        if not isinstance(inner, dict):
            raise BadExperiment(f"--set {override!r}: {parent!r} holds a value, not keys")
    try:
        inner[last] = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise BadExperiment(f"--set {override!r}: {' '.join(str(error).split())}") from None


def _whole_list(key: str) -> str:
    example = LISTS.get(key, "[FIRST, SECOND]")
    return f'{key} is a list, which is only given as a whole, in quotes for the shell: --set "{key}={example}"'


def _build(cls: type, content: object, where: str) -> object:
    """A dataclass from plain values, each checked against the type of its field."""
    if not isinstance(content, dict):
        raise BadExperiment(f"{where or 'experiment'}: expected keys, got {content!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in content:
        if key not in known:
            raise BadExperiment(f"unknown key {prefix + str(key)!r}{nearest(str(key), known)}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in content:
            key = prefix + name
            raise BadExperiment(f"missing key {key!r}; set it in the YAML file or with --set {key}=...")
    values = {key: _convert(hints[key], value, prefix + key) for key, value in content.items()}
    try:
        return cls(**values)
    except BadExperiment:
        raise
    except ValueError as error:
        raise BadExperiment(str(error) if not where else f"{where}: {error}") from None


def _convert(hint: Any, value: object, where: str) -> object:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value if value is not None else {}, where)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise BadExperiment(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None:  # a mapping, checked by whom it is for
        if not isinstance(value, dict):
            raise BadExperiment(f"{where}: expected keys, got {value!r}")
        return value
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            if math.isfinite(float(value)):
                return float(value)
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    raise BadExperiment(f"{where}: expected {hint.__name__}, got {value!r}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
