"""A run: the stages of an experiment in one directory, each of which goes on where it was stopped."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hardware_profiles import DeviceProfile, is_device_file, is_shipped, load_device
from hardware_profiles.files import is_unfinished, read_json, sha256_of, write_bytes, write_json, write_text
from nas.candidates import Costs, devices_of
from nas.checkpoints import load_checkpoint
from nas.config import BadExperiment, DeviceSettings, Experiment, read_experiment
from nas.costs import Item, ProfiledDevice, UnknownFigure, parse_objective
from nas.data import Data, load_data
from nas.distributed import is_first_process
from nas.evaluator import Evaluator
from nas.export import export, export_key
from nas.front import Evaluation, ParetoFront
from nas.limits import Reachable, reachable
from nas.offline import profile_measured
from nas.profile import check_predictor, profile
from nas.remeasure import remeasure
from nas.search import nested_front, search, study_name
from nas.stages import stage
from nas.study import storage_url
from nas.supernet import Supernet
from nas.train import check_training, load_weights, train
from nas.trust import TrustReport, trust
from nas.versions import versions
from predictors import load_predictor
from search_spaces import SearchSpace, build_space

log = logging.getLogger(__name__)

EARLIER_FRONTS = "fronts"  # folder of those that another search replaced, by number
FIXED = ("name", "seed", "data", "space", "train")  # what a run directory is made of; the rest may change


@dataclass(frozen=True)
class Run:
    """A run directory and its experiment. Data, space and supernet are made when first asked for.

    The directory keeps copies of the device files that the experiment was given, and its experiment.yaml names those.
    """

    folder: Path
    experiment: Experiment

    @classmethod
    def create(cls, folder: Path, experiment: Experiment) -> Run:
        """Start or continue a run; raises BadExperiment when the directory belongs to another experiment.

        Everything the experiment names is checked before anything is written; see `check`.
        """
        run = cls(folder, experiment)
        reached = run.check()
        if not is_first_process():  # of several that train together, which the first one writes for
            return run
        path = folder / "experiment.yaml"
        if path.exists():
            held, wanted = read_experiment(path).to_dict(), experiment.to_dict()
            changed = [key for key in FIXED if held[key] != wanted[key]]
            if "data" in changed and run._data_key() == run.data.key:  # the same, by another path
                changed.remove("data")
            if changed:
                raise BadExperiment(
                    f"{folder} holds another experiment: {', '.join(changed)} differ; "
                    "use another --out, or delete the directory"
                )
        elif folder.exists() and not all(is_unfinished(file, path) for file in folder.iterdir()):
            raise BadExperiment(f"{folder} is not empty and holds no experiment.yaml; use another --out")
        run._write()
        write_json(run._data_file, {"key": run.data.key})
        for each in reached.ranges if reached else ():
            log.info("%s", each)
        return run

    def _write(self) -> None:
        devices = self.experiment.devices
        files = {_device_name(one): Path(one.name).read_bytes() for one in devices if is_device_file(one.name)}
        named = tuple(replace(one, name=_device_name(one)) for one in devices)
        content = replace(self.experiment, devices=named).to_dict() | {"versions": versions()}
        write_text(self.folder / "experiment.yaml", yaml.safe_dump(content, sort_keys=False))
        for name, file in files.items():  # after the experiment, without which the directory is no run
            write_bytes(self._kept_file(name), file)

    @property
    def _data_file(self) -> Path:
        return self.folder / "data.json"

    def _data_key(self) -> str | None:
        """Digest of the data that the run was last started with; None where it did not get so far."""
        return str(read_json(self._data_file).get("key")) if self._data_file.exists() else None

    def _kept_file(self, device: str) -> Path:
        return self.folder / "devices" / f"{device}.yaml"

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run that exists; raises BadExperiment where there is none."""
        folder = Path(folder)
        path = folder / "experiment.yaml"
        if not path.is_file():
            raise BadExperiment(f"{folder} is no run directory: it has no experiment.yaml; make one with 'nas run'")
        return cls(folder, read_experiment(path))

    def check(self) -> Reachable | None:
        """Load what the experiment names (data, space, devices, figures), so that a mistake shows before any work.

        Returns what its limits leave, None without limits or where a device must be measured first.

        Raises ValueError or LookupError for what is wrong, and Infeasible for limits that can be judged without
        training or measuring and that no architecture found meets.
        """
        plan, export_plan = self.experiment.search, self.experiment.export
        objectives, limits = plan.parsed_objectives, plan.parsed_limits
        profiled = [ProfiledDevice(self.described(device.name)) for device in self.experiment.devices]
        devices = devices_of([*objectives, *limits], profiled)
        check_training(self.experiment.train, self.space, self.data)
        costs = Costs(self.space, objectives, limits, devices)
        asked: list[Item] = [parse_objective(export_plan.best), *export_plan.parsed_limits]
        unknown = next((item.key for item in asked if item.key not in costs.keys), None)
        if unknown:
            raise UnknownFigure(f"export: the front will have no {unknown}; it has {', '.join(costs.keys)}")
        if costs.limits and all(device.has_latency for device in devices.values()):
            return reachable(costs, self.experiment.seed)
        return None

    @cached_property
    def space(self) -> SearchSpace:
        """The space; input channels and classes are the data's where the experiment does not say."""
        settings: dict[str, Any] = dict(self.experiment.space)
        family = settings.pop("family")
        settings = {"channels": self.data.channels, "classes": len(self.data.classes), **settings}
        return build_space(family, settings)

    @cached_property
    def data(self) -> Data:
        options = asdict(self.experiment.data)
        if options["side"] is None:
            options["side"] = self._largest_resolution()
        return load_data(options.pop("path"), seed=self.experiment.seed, **options)

    def _largest_resolution(self) -> int | None:
        """The side to read the images of a folder at; settings that make no sense are left for the space to refuse."""
        given = self.experiment.space.get("resolutions")
        sides = [side for side in given if isinstance(side, int)] if isinstance(given, list) else []
        return max(sides, default=None)

    @cached_property
    def supernet(self) -> Supernet:
        """The trained supernet of the run; raises BadExperiment when it is not trained yet."""
        supernet = self._untrained()
        found = load_checkpoint(self.folder / "supernet")
        if found is None or found[1]["step"] != found[1]["steps"]:
            raise BadExperiment(f"{self.folder} has no trained supernet yet; run 'nas train {self.folder}'")
        load_weights(supernet, found[0])
        return supernet.eval()

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.supernet, self.data, results=self.folder / "accuracies.jsonl")

    # stages --------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        settings, seed = self.experiment.train, self.experiment.seed
        with stage(self.folder, "train") if is_first_process() else nullcontext():
            return train(self._untrained(), self.data, seed=seed, folder=self.folder, settings=settings)

    def _untrained(self) -> Supernet:
        """The supernet as training starts with it."""
        transforms = self.experiment.train.kernel_transforms
        return Supernet(self.space, seed=self.experiment.seed, kernel_transforms=transforms)

    def described(self, device: str) -> DeviceProfile:
        """A device by name, the run's own ones first, or by its file.

        Raises BadExperiment for a file that takes the name of a shipped device, UnknownDevice and InvalidProfile.
        """
        file = Path(device) if is_device_file(device) else self._kept_file(device)
        if not is_device_file(device) and not file.is_file():
            return load_device(device)
        described = load_device(file)
        taken = next(filter(is_shipped, (described.name, device)), None)
        if taken:
            raise BadExperiment(f"{file}: the name {taken!r} is that of a shipped device; give yours another name")
        return described

    def settings_of(self, device: str) -> DeviceSettings:
        """How a device, given by name or by its file, is profiled: as the experiment says, else as by default."""
        name = self.described(device).name
        listed = (one for one in self.experiment.devices if _device_name(one) == name)
        return replace(next(listed, DeviceSettings(name)), name=device)

    def profile(self, settings: DeviceSettings) -> tuple[Run, ProfiledDevice]:
        """Profile a device; returns the run with the device in its experiment, and the device.

        The only place where the command of a device file is run.
        """
        device = self.device(settings, asked_for=True)
        return self._with_device(settings, device), device

    def profile_measured(self, settings: DeviceSettings, file: Path) -> tuple[Run, ProfiledDevice]:
        """The same from a CSV file of measurements; see `nas.offline.profile_measured`."""
        device = profile_measured(self.space, self.described(settings.name), file, seed=self.experiment.seed)
        assert device.predictor is not None
        told = device.predictor.provenance
        self._keep(device, {"space": self.space.name, "measurements": {key: told[key] for key in ("file", "sha256")}})
        return self._with_device(settings, device), device

    def _with_device(self, settings: DeviceSettings, device: ProfiledDevice) -> Run:
        if settings in self.experiment.devices and not is_device_file(settings.name):
            return self
        others = [held for held in self.experiment.devices if _device_name(held) != device.name]
        Run(self.folder, replace(self.experiment, devices=(*others, settings)))._write()
        return Run.open(self.folder)

    def _keep(self, device: ProfiledDevice, made_from: Mapping[str, Any]) -> None:
        """Write the predictor of a device, and what it was made from."""
        path, about = self._predictor_paths(device.name)
        assert device.predictor is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        device.predictor.save(path)
        write_json(about, {**made_from, "sha256": sha256_of(path)})

    def device(self, settings: DeviceSettings, *, asked_for: bool = False) -> ProfiledDevice:
        """A device, profiled now unless the run has its predictor for this space.

        A predictor that was made from a file of measurements serves whatever the settings say of samples and error.

        Raises BadExperiment where `asked_for`, by `nas profile`, is needed to run a command, and where it would put
        measurements of this machine in the place of those of a file.
        """
        described = self.described(settings.name)
        if not described.is_measured:
            return ProfiledDevice(described)
        path, about = self._predictor_paths(described.name)
        plan = {"samples": settings.samples, "error": settings.error, "seed": self.experiment.seed}
        wanted = {"space": self.space.name, "device": _measured_by(described), **plan}
        held: dict[str, Any] = read_json(about) if path.exists() and about.exists() else {}
        digest = held.pop("sha256", None)
        if digest is None or digest != sha256_of(path):
            held = {}
        from_file = held if "measurements" in held and held["space"] == self.space.name else {}
        if held == wanted or (from_file and not asked_for):
            return ProfiledDevice(described, load_predictor(path))
        command = described.latency_model.command
        if from_file and command is None:
            raise BadExperiment(
                f"{described.name} was profiled on the measurements in {from_file['measurements']['file']}; "
                f"give --measurements again, or delete {path} to measure this machine"
            )
        if command is not None and not asked_for:
            raise BadExperiment(
                f"{described.name} is measured by a command, which only 'nas profile' runs: "
                f"read it ({command.command}), then run 'nas profile {self.folder} --device {settings.name}'"
            )
        log.info("profiling %s: measuring at most %d subnets, the extremes aside", described.name, settings.samples)
        if command is not None:
            log.info("each by the command: %s", command.command)
        with stage(self.folder, "profile"):
            profiled = profile(
                self.space,
                described,
                samples=settings.samples,
                error=settings.error,
                seed=self.experiment.seed,
                patience_s=self.experiment.patience_s,
                record=path.with_name(f"{described.name}.measured.json"),
            )
        self._keep(profiled, wanted)
        return profiled

    def _predictor_paths(self, name: str) -> tuple[Path, Path]:
        folder = self.folder / "devices"
        return folder / f"{name}.json", folder / f"{name}.for.json"

    @cached_property
    def devices(self) -> dict[str, ProfiledDevice]:
        profiled = [self.device(settings) for settings in self.experiment.devices]
        return {device.name: device for device in profiled}

    def search(self, storage: str | None = None, *, nested: bool = False) -> ParetoFront:
        """Search, then re-measure the front; both kept in front.json, which is reused while nothing changed.

        The front of an earlier search is kept in `fronts/`, where `find` still knows its points. With `nested` the
        nested family takes the place of a search.
        """
        plan = self.experiment.search
        objectives, limits = plan.parsed_objectives, plan.parsed_limits
        key = study_name(self.evaluator, objectives, limits, self.devices, plan.settings, self.experiment.seed)
        key += "-nested" if nested else f"-{plan.trials}"
        path, about = self.folder / "front.json", self.folder / "front.for.json"
        if path.exists() and about.exists() and read_json(about) == {"search": key, "sha256": sha256_of(path)}:
            return ParetoFront.load(path)
        with stage(self.folder, "search"):
            found = self.nested() if nested else self._searched(storage)
        with stage(self.folder, "measure"):
            front = remeasure(found, self.evaluator, self.devices, patience_s=self.experiment.patience_s)
        self._keep_earlier(path)
        front.save(path)
        write_json(about, {"search": key, "sha256": sha256_of(path)})
        return front

    def _keep_earlier(self, path: Path) -> None:
        """Put a copy of the front that is about to be replaced beside those before it."""
        if path.exists():
            kept = self.folder / EARLIER_FRONTS / f"{len(self._earlier_fronts()) + 1}.json"
            write_text(kept, path.read_text(encoding="utf-8"))
            log.info("the front before this one is kept: nas pareto %s", kept)

    def _earlier_fronts(self) -> list[Path]:
        """Those that were replaced, the newest first."""
        return sorted((self.folder / EARLIER_FRONTS).glob("*.json"), key=lambda path: int(path.stem), reverse=True)

    def find(self, id_: str) -> Evaluation:
        """What a search of the run evaluated under this id, or the start of one: on its front, beside it or earlier.

        Raises UnknownFigure where nothing is called so, or several architectures are.
        """
        earlier = self._earlier_fronts()
        for path in (None, *earlier):
            front = self.front if path is None else ParetoFront.load(path)
            found = [each for each in (*front.points, *front.others) if each.id.startswith(id_)]
            if found and path is not None:
                log.info("%s is of an earlier front, %s", id_, path)
            if found:
                return ParetoFront(front.objectives, tuple(found)).find(id_)
        more = f", nor any of the {len(earlier)} before it" if earlier else ""
        raise UnknownFigure(
            f"no search of {self.folder} evaluated anything called {id_!r}: its front has no such id{more}; "
            f"'nas pareto {self.folder}' lists them, and --architecture takes any text of an architecture"
        )

    def nested(self) -> ParetoFront:
        """The front of the nested family, by val_search and predictions; after a search nothing is evaluated for it."""
        plan = self.experiment.search
        return nested_front(
            self.supernet,
            self.data,
            plan.parsed_objectives,
            plan.parsed_limits,
            devices=self.devices,
            seed=self.experiment.seed,
            evaluator=self.evaluator,
        )

    def _searched(self, storage: str | None) -> ParetoFront:
        plan = self.experiment.search
        return search(
            self.supernet,
            self.data,
            plan.parsed_objectives,
            plan.parsed_limits,
            devices=self.devices,
            seed=self.experiment.seed,
            storage=storage or storage_url(self.folder),
            settings=plan.settings,
            evaluator=self.evaluator,
        )

    def check_predictors(self) -> dict[str, Any]:
        """Held-out checks of the predictors of measured devices, kept beside them."""
        found = {}
        for name, device in self.devices.items():
            if device.predictor is None or not device.is_at_hand:
                continue
            path = self.folder / "devices" / f"{name}.check.json"
            if not path.exists() or read_json(path).get("predictor") != device.key:
                with stage(self.folder, "check"):
                    checked = check_predictor(
                        self.space, device, seed=self.experiment.seed + 1, patience_s=self.experiment.patience_s
                    )
                write_json(path, {"predictor": device.key, "check": asdict(checked)})
            found[name] = read_json(path)["check"]
        return found

    @property
    def front(self) -> ParetoFront:
        """The front of the run; raises BadExperiment where nothing was searched yet."""
        path = self.folder / "front.json"
        if not path.exists():
            raise BadExperiment(f"{self.folder} has no front yet; run 'nas search {self.folder}'")
        return ParetoFront.load(path)

    def chosen(self, front: ParetoFront) -> Evaluation:
        """The point that the experiment exports."""
        plan = self.experiment.export
        return front.best(plan.best, plan.parsed_limits)

    def export(self, point: Evaluation, folder: Path | None = None) -> tuple[Path, dict[str, Any]]:
        """(folder, manifest) of an exported point; an export of the same weights, data and devices is kept."""
        evaluator = self.evaluator  # which a run without a supernet refuses, before a stage begins
        target = folder or self.folder / "exports"
        manifest = target / point.id / "manifest.json"
        if manifest.exists():
            held = read_json(manifest)
            architecture = self.space.parse(point.architecture)
            if held.get("key") == export_key(evaluator, architecture, self.devices.values()):
                return manifest.parent, held
        with stage(self.folder, "export"):
            made = export(
                self.supernet,
                point,
                self.data,
                target,
                devices=self.devices,
                evaluator=evaluator,
                patience_s=self.experiment.patience_s,
            )
        return target / point.id, made

    def trust(self, networks: int = 8) -> TrustReport:
        """Train some subnets alone, in trust/, and compare with what they inherit; the report is kept in trust.json."""
        supernet = self.supernet  # which a run without one refuses, before a stage begins
        found = load_checkpoint(self.folder / "supernet")
        assert found is not None
        settings = replace(self.experiment.train, arithmetic=str(found[1]["arithmetic"]))  # where it says auto
        with stage(self.folder, "trust"):
            report = trust(
                supernet,
                self.data,
                folder=self.folder / "trust",
                settings=settings,
                seed=self.experiment.seed,
                networks=networks,
            )
        report.save(self.folder / "trust.json")
        return report


def with_search(run: Run, limits: Sequence[str], **given: Any) -> Run:
    """The run with another search: limits and other fields of its plan replaced where they are not None."""
    plan = run.experiment.search
    fields = {name: value for name, value in given.items() if value is not None}
    changed = replace(plan, limits=tuple(limits) or plan.limits, **fields)
    return Run(run.folder, replace(run.experiment, search=changed))


def _device_name(settings: DeviceSettings) -> str:
    return load_device(settings.name).name if is_device_file(settings.name) else settings.name


def _measured_by(device: DeviceProfile) -> dict[str, object]:
    """What latencies of a device depend on, besides the networks: a predictor of anything else is stale."""
    command = device.latency_model.command
    return {
        "runtime": device.runtime,
        "threads": device.threads,
        "title": device.title,
        "command": None if command is None else asdict(command),
    }
