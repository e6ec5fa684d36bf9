"""The command `nas`. Progress goes to stderr, results to stdout.

Exit codes: 0 done, 1 failed, 2 bad usage or bad input, 3 limits cannot be met.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hardware_profiles import DeviceProfile, LatencyModel
    from hardware_profiles.device import EnergyModel
    from nas.comparison import Comparison
    from nas.costs import Objective
    from nas.front import ParetoFront
    from nas.pipeline import Run

DONE, FAILED, BAD_INPUT, INFEASIBLE = 0, 1, 2, 3
FIT_ONLY = ("resolutions", "widths", "samples", "seed", "plot")  # options of 'nas spaces --fit' alone
MOST_SPACES = 20  # rows of its table


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call one function, print."""
    parsed = _parser().parse_args(arguments)
    helping = os.environ.get("RANK", "0") != "0"  # started by torchrun beside the process that reports
    level = logging.WARNING if helping else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("matplotlib", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if parsed.verb not in (_run, _train) and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("torchrun starts several processes, which only train together; expected nas train or run")
        parsed.verb(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains on leaving
    except Exception as error:
        code = _exit_code(error)
        if code is None or parsed.debug:
            raise
        print(f"nas: {_told(error)}", file=sys.stderr)
        return code
    return DONE


def _told(error: Exception) -> str:
    """In one line, but for what cannot be met, which tells the nearest point in lines of its own."""
    from nas.costs import Infeasible

    text = str(error.args[0] if isinstance(error, LookupError) and error.args else error)
    lines = text.splitlines() if isinstance(error, Infeasible) else [text]
    return "\n".join(" ".join(line.split()) for line in lines)


def _exit_code(error: Exception) -> int | None:
    """Errors that say what to do get a line; anything else is a bug and keeps its traceback."""
    from hardware_profiles import InvalidProfile, UnavailableCost, UnknownDevice, UnsupportedLayer
    from hardware_profiles.command_backend import MeasurementFailed
    from hardware_profiles.host_cpu import NoisyMachine, UnmeasurableModel
    from hardware_profiles.vela import VelaFailed
    from nas.augmentation import MissingKornia
    from nas.checkpoints import CorruptCheckpoint
    from nas.config import BadExperiment
    from nas.costs import Infeasible, UnknownFigure
    from nas.data import BadData
    from nas.distributed import WorkerLost
    from nas.export import ExportFailed
    from nas.train import TrainingDiverged
    from search_spaces import InvalidArchitecture, InvalidNetwork, UnknownSpace

    if isinstance(error, Infeasible):
        return INFEASIBLE
    bad = (BadExperiment, BadData, UnknownFigure, UnknownDevice, InvalidProfile, UnknownSpace, InvalidArchitecture)
    if isinstance(error, (*bad, InvalidNetwork, UnavailableCost, UnsupportedLayer, ValueError)):
        return BAD_INPUT
    failed = (TrainingDiverged, NoisyMachine, UnmeasurableModel, MeasurementFailed, VelaFailed, CorruptCheckpoint)
    return FAILED if isinstance(error, (*failed, ExportFailed, MissingKornia, WorkerLost, OSError)) else None


# verbs ---------------------------------------------------------------------------------------------------


def _run(parsed: argparse.Namespace) -> None:
    from hardware_profiles.host_cpu import NoisyMachine
    from nas.config import load_experiment
    from nas.distributed import is_first_process
    from nas.pipeline import Run

    _quiet_optuna()
    experiment = load_experiment(parsed.experiment, parsed.set)
    run = Run.create(parsed.out or Path("runs") / experiment.name, experiment)
    run.train()
    if not is_first_process():
        return  # it came to help with the training
    print("\n".join(_summary_of_device(device) for device in run.devices.values()))
    front = run.search()
    picture = run.folder / "front.png"
    front.plot(picture)
    exported, manifest = run.export(run.chosen(front))
    checks: dict[str, Any] = {}
    try:
        checks = run.check_predictors()
    except NoisyMachine as error:  # all else is done; the same command tries again
        logging.getLogger(__name__).warning("the predictors were not checked: %s", error)
    print(table(front))
    for name, check in checks.items():
        print(_summary_of_check(name, check))
    print(_summary_of_export(manifest))
    print(f"picture: {picture}\nmodel:   {exported / 'model.onnx'}\ncard:    {exported / 'card.md'}")


def _quiet_optuna() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _train(parsed: argparse.Namespace) -> None:
    from nas.config import load_experiment
    from nas.distributed import is_first_process
    from nas.pipeline import Run

    if (Path(parsed.run) / "experiment.yaml").is_file():
        given = "--set" if parsed.set else "--out" if parsed.out else ""
        if given:
            raise ValueError(
                f"{parsed.run} is a run, which keeps its experiment and its place: {given} cannot change them; "
                f"for a new run, name the experiment: nas train EXPERIMENT {given} ..."
            )
        run = Run.open(Path(parsed.run))
    else:
        experiment = load_experiment(parsed.run, parsed.set)
        run = Run.create(parsed.out or Path("runs") / experiment.name, experiment)
    results = run.train()
    if is_first_process():
        print(json.dumps({"run": str(run.folder), **results}))


def _profile(parsed: argparse.Namespace) -> None:
    from nas.pipeline import Run

    run = Run.open(parsed.run)
    settings = run.settings_of(parsed.device)
    given = {"samples": parsed.samples, "error": parsed.error}
    given = {name: value for name, value in given.items() if value is not None}
    if parsed.measurements and given:
        raise ValueError(f"--{next(iter(given))} says what to measure; --measurements takes what the file holds")
    if parsed.plan:
        _plan(run, parsed)
        return
    if parsed.measurements:
        _, device = run.profile_measured(settings, parsed.measurements)
    else:
        _, device = run.profile(replace(settings, **given))
    print(_summary_of_device(device))


def _plan(run: Run, parsed: argparse.Namespace) -> None:
    """Write what to measure, for who measures it."""
    from nas.offline import write_plan

    samples = parsed.samples or 10
    device = run.described(parsed.device)
    models = write_plan(run.space, device, parsed.plan, samples=samples, seed=run.experiment.seed)
    print(
        f"{samples} subnets to measure on {device.name}, float input 'input', batch 1:\n"
        f"models:  {models}/ID.onnx\n"
        f"fill in: {parsed.plan}, column latency_ms\n"
        f"then:    nas profile {parsed.run} --device {parsed.device} --measurements {parsed.plan}"
    )


def _search(parsed: argparse.Namespace) -> None:
    from nas.pipeline import Run, with_search

    _quiet_optuna()
    run = with_search(
        Run.open(parsed.run),
        parsed.limit,
        confidence=parsed.confidence,
        trials=parsed.trials,
        sampler=parsed.sampler,
        workers=parsed.workers,
    )
    run.check()
    print(table(run.search(parsed.storage, nested=parsed.nested)))
    if not parsed.nested:
        print(f"\nThe nested family alone, without a search, by val_search and predictions:\n{_nested(run)}")


def _nested(run: Run) -> str:
    from nas.costs import Infeasible

    try:
        return table(run.nested())
    except Infeasible as error:
        return str(error)


def _pareto(parsed: argparse.Namespace) -> None:
    from nas.costs import Infeasible
    from nas.front import nearest_message
    from nas.plot import check_picture

    if parsed.plot:
        check_picture(parsed.plot)
    if parsed.against:
        _compare(parsed)
        return
    if parsed.reference:
        raise ValueError("--reference belongs to --against B")
    front = _front_of(parsed.run, parsed)
    if parsed.device:
        front = front.of_device(parsed.device)
    limits = [front.limit(text) for text in parsed.limit]
    kept = front.filter(limits)
    if not kept.points:
        raise Infeasible(nearest_message(front.points or front.others, limits))
    shown = kept
    if parsed.best or parsed.knee:
        shown = replace(kept, points=(kept.best(parsed.best) if parsed.best else kept.knee(),), left=())
    if parsed.plot:
        kept.plot(parsed.plot, parsed.kind)
        print(f"picture: {parsed.plot}", file=sys.stderr)
    print(FORMATS[parsed.format](shown))


def _front_of(path: Path, parsed: argparse.Namespace, like: ParetoFront | None = None) -> ParetoFront:
    """The front of a run directory, of a front.json, or of a CSV file with the objectives given or those of another."""
    from nas.front import ParetoFront
    from nas.pipeline import Run

    if not path.is_file():
        if path.suffix in (".csv", ".gz", ".json"):
            raise ValueError(f"{path}: there is no such file")
        return Run.open(path).front
    if path.suffix == ".json":
        return ParetoFront.load(path)
    objectives = parsed.objective or (like.objectives if like else ())
    if not objectives:
        raise ValueError(f"{path} is a table: say what is searched for, such as --objective acc:max --objective ms:min")
    return ParetoFront.from_csv(
        path,
        objectives,
        id_column=parsed.id_column,
        architecture_columns=parsed.architecture_columns or (),
        limits=parsed.limit,
    )


def _compare(parsed: argparse.Namespace) -> None:
    from nas.costs import Infeasible
    from nas.front import nearest_message
    from nas.front_pictures import plot_against

    given = {"--best": parsed.best, "--knee": parsed.knee, "--kind": parsed.kind != "front"}
    wrong = next((name for name, value in given.items() if value), None)
    if wrong or parsed.format == "csv":
        raise ValueError(f"{wrong or '--format csv'} is about one front; leave it or --against out")
    reference: dict[str, float] = {}
    for text in parsed.reference:
        key, _, number = text.rpartition("=")
        try:
            reference[key.strip()] = float(number)
        except ValueError:
            raise ValueError(f"--reference {text!r}: expected FIGURE=NUMBER, such as latency_ms@host-cpu=5") from None
    first = _front_of(parsed.run, parsed)
    kept = []
    for front in (first, _front_of(parsed.against, parsed, first)):
        limits = [front.limit(text) for text in parsed.limit]
        kept.append(front.filter(limits))
        if not kept[-1].points:
            raise Infeasible(nearest_message(front.points or front.others, limits))
    comparison = kept[0].against(kept[1], reference)
    if parsed.plot:
        plot_against(comparison, parsed.plot, _names(parsed.run, parsed.against))
        print(f"picture: {parsed.plot}", file=sys.stderr)
    print(json.dumps(comparison.to_dict(), indent=1) if parsed.format == "json" else comparison_text(comparison))


def _export(parsed: argparse.Namespace) -> None:
    from nas.costs import parse_limit
    from nas.front import Evaluation
    from nas.pipeline import Run

    run = Run.open(parsed.run)
    if parsed.architecture is not None:
        architecture = run.space.parse(parsed.architecture)
        precisions = run.space.lower(architecture).precisions
        point = Evaluation(architecture.id, str(architecture), {}, precisions)
    elif parsed.id:
        point = run.find(parsed.id)
    else:
        point = run.front.best(parsed.best, [parse_limit(text) for text in parsed.limit])
    folder, manifest = run.export(point, parsed.out)
    print(_summary_of_export(manifest))
    print(f"model:   {folder / 'model.onnx'}\ncard:    {folder / 'card.md'}")


def _trust(parsed: argparse.Namespace) -> None:
    from nas.pipeline import Run
    from nas.plot import check_picture

    if parsed.plot:
        check_picture(parsed.plot)
    run = Run.open(parsed.run)
    report = run.trust(parsed.networks)
    print(json.dumps(report.to_dict(), indent=1) if parsed.format == "json" else report)
    picture = parsed.plot or run.folder / "trust.png"
    report.plot(picture)
    print(f"picture: {picture}", file=sys.stderr)


def _spaces(parsed: argparse.Namespace) -> None:
    settings = _space_settings(parsed)
    given = [name for name in FIT_ONLY if getattr(parsed, name) is not None]
    if given and not parsed.fit:
        raise ValueError(f"--{given[0]} belongs to --fit DEVICE")
    if parsed.fit:
        _fit_spaces(parsed, settings)
    elif parsed.macs:
        _scale_space(parsed, settings)
    elif parsed.format == "json":
        raise ValueError("--format json belongs to --fit and --macs")
    else:
        _list_spaces(parsed, settings)


def _list_spaces(parsed: argparse.Namespace, settings: Mapping[str, object]) -> None:
    from search_spaces import FAMILIES, build_space
    from search_spaces.space import size_text

    by_default = "" if settings else " by default"
    for name in [parsed.name] if parsed.name else FAMILIES:
        space = build_space(name, settings)
        small, large = (space.lower(a) for a in (space.smallest, space.largest))
        print(
            f"{name}: {len(space.choices)} choices, {size_text(space.size)} architectures, "
            f"{small.macs / 1e6:.3g} to {large.macs / 1e6:.3g} MMACs{by_default}"
        )
        if parsed.name:
            print(f"\n{(type(space).__doc__ or '').strip()}\n\nchoices{by_default}:")
            for choice in space.choices:
                print(f"  {choice.name}: {', '.join(map(str, choice.options))}")


def _space_settings(parsed: argparse.Namespace) -> dict[str, object]:
    """What --set, --classes and --channels say of the space."""
    import yaml

    from search_spaces import FAMILIES

    settings: dict[str, object] = {}
    for text in parsed.set:
        key, separator, raw = text.partition("=")
        try:
            settings[key.strip()] = yaml.safe_load(raw)
        except yaml.YAMLError:
            separator = ""
        if not separator:
            raise ValueError(f"--set {text!r}: expected KEY=VALUE, such as 'depths=[1, 2]'")
    settings |= {key: getattr(parsed, key) for key in ("classes", "channels") if getattr(parsed, key)}
    if not parsed.name and (settings or parsed.fit or parsed.macs):
        raise ValueError(f"name a family, such as 'nas spaces {next(iter(FAMILIES))} --fit DEVICE'")
    return settings


def _fit_spaces(parsed: argparse.Namespace, settings: Mapping[str, object]) -> None:
    from hardware_profiles import load_device
    from nas.costs import ProfiledDevice
    from nas.plot import check_picture, plot_candidates
    from nas.scaling import fit_device

    if parsed.plot:
        check_picture(parsed.plot)
    chosen = {name: getattr(parsed, name) for name in FIT_ONLY if getattr(parsed, name) and name != "plot"}
    candidates = fit_device(parsed.name, settings, ProfiledDevice(load_device(parsed.fit)), **chosen)
    if parsed.plot:
        plot_candidates(candidates, parsed.plot)
        print(f"picture: {parsed.plot}", file=sys.stderr)
    if parsed.format == "json":
        print(json.dumps([candidate.to_dict() for candidate in candidates], indent=1))
        return
    print(f"{'resolution':>10}  {'width':>5}  {'fit':>6}  {'mean MMACs':>10}  {'p10':>6}  {'p50':>6}  {'p90':>6}")
    for candidate in candidates[:MOST_SPACES]:
        macs = [candidate.mean_macs, *(candidate.percentile(percent) for percent in (10, 50, 90))]
        mean, *percentiles = (f"{value / 1e6:.4g}" for value in macs)
        print(
            f"{candidate.resolution:>10}  {candidate.width:>5g}  {candidate.share:>6.1%}  {mean:>10}  "
            + "  ".join(f"{text:>6}" for text in percentiles)
        )
    if len(candidates) > MOST_SPACES:
        print(f"and {len(candidates) - MOST_SPACES} more spaces, which --format json lists")
    print(f"\n{_space_as_yaml(candidates[0].to_dict()['space'], settings)}")


def _scale_space(parsed: argparse.Namespace, settings: Mapping[str, object]) -> None:
    from nas.scaling import scale
    from search_spaces import build_space

    scaled = scale(build_space(parsed.name, settings), parsed.macs)
    if parsed.format == "json":
        print(json.dumps(scaled.to_dict(), indent=1))
        return
    beyond = "; outside the ratios of the TinyNets, whose nearest it follows" if scaled.extrapolated else ""
    print(
        f"largest network: {scaled.macs / 1e6:.4g} MMACs for {scaled.target_macs / 1e6:.4g} asked, "
        f"{scaled.ratio:.3g} of the base's {scaled.base_macs / 1e6:.4g}{beyond}\n"
        f"resolution x {scaled.resolution:.3g}, depth x {scaled.depth:.3g}, width x {scaled.width:.3g}\n\n"
        f"{_space_as_yaml(scaled.to_dict()['space'], settings)}"
    )


def _space_as_yaml(space: Any, given: Mapping[str, object]) -> str:
    """For an experiment, which takes channels and classes from its data unless they were asked for here."""
    import yaml

    told = {key: value for key, value in space.items() if key not in ("channels", "classes") or key in given}
    return yaml.safe_dump({"space": told}, sort_keys=False, default_flow_style=None, width=110).rstrip("\n")


def _devices(parsed: argparse.Namespace) -> None:
    from hardware_profiles import device_names, load_device
    from nas.costs import ProfiledDevice

    devices = [load_device(name) for name in ([parsed.name] if parsed.name else device_names())]
    if parsed.format == "json":
        print(json.dumps([_facts_of_device(device) for device in devices], indent=1))
        return
    if not parsed.name:
        print("\n".join(_aligned(_columns_of_devices(devices), str.ljust)))
    for device in devices if parsed.name else ():
        print(_summary_of_device(ProfiledDevice(device)))
        for key, source in _sources(device).items():
            print(f"{key}: {source}")


def _columns_of_devices(profiles: Sequence[DeviceProfile]) -> dict[str, list[str]]:
    """One row a device; errors are means on networks left out, with the half of the 90 % interval."""

    def error(model: LatencyModel | EnergyModel | None) -> str:
        if model is None or model.relative_error is None:
            return "" if model is None else "not known"
        mean = f"{model.held_out['mape']:.1%}, " if "mape" in model.held_out else ""
        return f"{mean}+-{model.relative_error:.0%}"

    def kib(limit: int | None) -> str:
        return f"{limit / 1024:.0f} KiB" if limit else ""

    baselines = [profile.latency_model.held_out.get("macs_only_mape") for profile in profiles]
    live = [profile.is_measured for profile in profiles]
    return {
        "name": [profile.name for profile in profiles],
        "kind": [profile.kind for profile in profiles],
        "runtime": [profile.runtime for profile in profiles],
        "SRAM": [kib(profile.sram_limit_bytes) for profile in profiles],
        "flash": [kib(profile.flash_limit_bytes) for profile in profiles],
        "precisions": [_weight_precisions(profile) for profile in profiles],
        "latency": [profile.latency_model.origin for profile in profiles],
        "error": [
            "by 'nas profile'" if here else error(profile.latency_model)
            for profile, here in zip(profiles, live, strict=True)
        ],
        "MACs only": ["" if baseline is None else f"{baseline:.1%}" for baseline in baselines],
        "error of energy": [error(profile.energy_model) for profile in profiles],
    }


def _weight_precisions(profile: DeviceProfile) -> str:
    """What its convolutions and linear layers may be."""
    return "/".join(dict.fromkeys(p for kind in ("conv2d", "linear") for p in profile.precisions.get(kind, ())))


def _sources(profile: DeviceProfile) -> dict[str, str]:
    """Key of the profile -> where its numbers come from."""
    energy = {"energy": profile.energy_model.source} if profile.energy_model else {}
    return {"latency": profile.latency_model.source, **energy, **profile.sources}


def _facts_of_device(profile: DeviceProfile) -> dict[str, Any]:
    """What is known of a profile, for programs; an error that nobody knows is null."""
    latency, energy = profile.latency_model, profile.energy_model
    return {
        "name": profile.name,
        "title": profile.title,
        "kind": profile.kind,
        "runtime": profile.runtime,
        "threads": profile.threads,
        "sram_limit_bytes": profile.sram_limit_bytes,
        "flash_limit_bytes": profile.flash_limit_bytes,
        "planner": profile.planner,
        "precisions": {kind: list(names) for kind, names in profile.precisions.items()},
        "latency": {
            "origin": latency.origin,
            "relative_error_90": latency.relative_error,
            "held_out": dict(latency.held_out) or None,
        },
        "energy": energy
        and {
            "origin": energy.origin,
            "power_mw": energy.power_mw,
            "relative_error_90": energy.relative_error,
            "held_out": dict(energy.held_out) or None,
        },
        "sources": _sources(profile),
    }


def _doctor(parsed: argparse.Namespace) -> None:
    from nas.doctor import doctor

    found = doctor()
    width = max(map(len, found.facts))
    for name, value in found.facts.items():
        print(f"{name:{width}}  {value}")
    for problem in found.optional:
        print(f"missing, optional: {problem}")
    for problem in found.required:
        print(f"missing, required: {problem}")
    if found.required:
        raise SystemExit(FAILED)
    print("nothing required is missing")


def _names(first: Path, second: Path) -> tuple[str, str]:
    """What two fronts are called in a picture: A and B, as in the table, and the least of their paths that differs."""
    for count in range(1, 1 + max(len(first.parts), len(second.parts))):
        short = ["/".join(path.parts[-count:]) for path in (first, second)]
        if short[0] != short[1]:
            break
    return f"A ({short[0]})", f"B ({short[1]})"


# printing ------------------------------------------------------------------------------------------------


LEFT = "*"  # before what left the front once it was measured
BELIEVED = {
    "accuracy": "in the search",
    "latency_ms": "predicted",
}  # what stands beside a figure that was measured anew


def table(front: ParetoFront) -> str:
    """The front as text, objectives first, in units a person reads; what left it once measured comes below, marked."""
    from nas.plot import title_of

    rows = [*front.points, *front.departed]
    ours = {o.key for o in front.objectives if not o.foreign}
    foreign_table = len(ours) < len(front.objectives)
    keys = [o.key for o in front.objectives]
    keys += [k for k in (front.points[0].figures if front.points else ()) if k not in keys]
    columns = {"id": [point.id for point in front.points] + [f"{LEFT} {one.id}" for one in front.departed]}
    for key in keys:
        name, _, device = key.partition("@")
        title, scale = title_of(key, foreign_table and key not in ours)
        title = title.replace(f" on {device}", f" {device}")
        columns[title] = [_number(row[key] * scale) for row in rows]
        if name in BELIEVED and any(key in row.predicted for row in rows):
            columns[f"{BELIEVED[name]} {device}".rstrip()] = [
                _number(row.predicted[key].value * scale) if key in row.predicted else "" for row in rows
            ]
    return "\n".join([*_aligned(columns, str.rjust), _footer(front)])


def comparison_text(comparison: Comparison) -> str:
    """Two fronts compared, in words; A is the first."""
    from nas.plot import label, shown

    objectives, both = comparison.objectives, (comparison.first, comparison.second)
    pairs = list(zip(("B", "A"), comparison.beaten, both, strict=True))
    columns = {
        "": ["points", "hypervolume", "hypervolume that the other lacks", "points that the other beats", "epsilon"],
        **{
            name: [
                str(len(both[i])),
                f"{comparison.hypervolume[i]:.1%}",
                f"{comparison.adds[i]:.1%}",
                f"{pairs[i][1]} of {len(both[i])}",
                f"{comparison.epsilon[i]:.1%}",
            ]
            for i, name in enumerate("AB")
        },
    }
    corner = ", ".join(f"{label(o, set())} {_number(shown(o, comparison.reference[o.key]))}" for o in objectives)
    noise = "; ".join(f"{key} {value:.1%}" for key, value in comparison.noise.items())
    lines = [
        *_aligned(columns, str.rjust),
        f"Hypervolumes are shares of the box from the best of both to {corner}.",
        "Epsilon is what a front must gain in every objective, in spans of both, to match the other everywhere.",
        f"Leads within the noise count for nothing: {noise}." if noise else "No noise is known, so any lead counts.",
    ]
    if comparison.stretches:
        lines += ["", *_budget_lines(comparison)]
    return "\n".join(lines)


def _budget_lines(comparison: Comparison) -> list[str]:
    """Who is ahead in the first objective, within which budgets of the second."""
    from nas.plot import label, shown

    aim, budget = comparison.objectives[:2]
    names = {"first": "A", "second": "B", "neither": "neither"}

    def value(number: float | None, objective: Objective) -> str:
        return "" if number is None else _number(shown(objective, number))

    columns = {
        f"{label(budget, set())} from": [value(s.start, budget) for s in comparison.stretches],
        "to": [value(s.end, budget) or "any" for s in comparison.stretches],
        "ahead": [
            names[s.leader] + (" (the other has none)" if s.mean_lead is None else "") for s in comparison.stretches
        ],
        f"{label(aim, set())}, mean lead": [value(s.mean_lead, aim) for s in comparison.stretches],
        "largest": [value(s.largest_lead, aim) for s in comparison.stretches],
    }
    more = len(comparison.objectives) - 2
    about = f" ({more} more not looked at)" if more else ""
    return [
        f"Best {label(aim, set())} within a budget of {label(budget, set())}{about}:",
        *_aligned(columns, str.rjust),
    ]


def _aligned(columns: Mapping[str, Sequence[str]], justify: Callable[[str, int], str]) -> list[str]:
    """The lines of a table: the titles, then a line for each row."""
    widths = [max(map(len, (title, *cells))) for title, cells in columns.items()]
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    return ["  ".join(map(justify, row, widths)).rstrip() for row in rows]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _footer(front: ParetoFront) -> str:
    origins: dict[str, set[str]] = {}
    for point in front.points:
        for key, figure in point.figures.items():
            origins.setdefault(key, set()).add(figure.origin)
    said = [f"{key} {'/'.join(sorted(found))}" for key, found in origins.items() if found != {"exact"}]
    noise = [f"noise of {key} {value:.1%}" for key, value in (front.noise or {}).items()]
    lines = [f"{len(front.points)} non-dominated subnets; {'; '.join([*said, *noise])}"]
    if count := len(front.departed):
        lines.append(f"{LEFT} {count} that the search had on its front and that left it once measured anew")
    return "\n".join(lines)


def _json(front: ParetoFront) -> str:
    from nas.front import to_dict

    return json.dumps(to_dict(front), indent=1)


def _csv(front: ParetoFront) -> str:
    return str(front.to_frame().to_csv(index=False)).rstrip("\n")


FORMATS: Mapping[str, Callable[[Any], str]] = {"table": table, "json": _json, "csv": _csv}


def _summary_of_device(device: Any) -> str:
    profile = device.profile
    limits = [
        f"{name} {bytes_ / 1024:.0f} KiB"
        for name, bytes_ in (("SRAM", profile.sram_limit_bytes), ("flash", profile.flash_limit_bytes))
        if bytes_
    ]
    held_out = device.predictor.report() if device.predictor else profile.latency_model.held_out
    origin = f"latency {profile.latency_model.origin}"
    if device.predictor:
        origin = f"predictor fitted on {held_out['networks']} measured subnets"
    if device.predictor:
        median, of_macs = held_out["median_error"], held_out["macs_only"]["median_error"]
        error = f"held-out median error {median:.1%} (MACs only: {of_macs:.1%})"
        if held_out["spearman"] is None:
            error += f", {_rank_correlation(None)}"
    elif profile.is_measured:
        error = "fitted by 'nas profile'"
    else:
        error = _held_out_error(profile.latency_model)
    about = [f"{profile.name}: {profile.title}", profile.kind, profile.runtime, *limits, _weight_precisions(profile)]
    energy = [f"energy {_held_out_error(profile.energy_model)}"] if profile.energy_model else []
    return "; ".join([*about, origin, error, *energy])


def _held_out_error(model: LatencyModel | EnergyModel) -> str:
    """The mean error on networks left out, beside that of the MACs, and the 90 % interval."""
    if model.relative_error is None:
        return "error not known"
    told = [f"90 % interval +-{model.relative_error:.0%}"]
    if "mape" in model.held_out:
        of_macs = model.held_out.get("macs_only_mape")
        baseline = f" (MACs only: {of_macs:.1%})" if of_macs is not None else ""
        told.insert(0, f"held-out error {model.held_out['mape']:.1%} on average{baseline}")
    return ", ".join(told)


def _summary_of_check(name: str, check: Mapping[str, Any]) -> str:
    return (
        f"{name}: {check['networks']} fresh subnets measured later: median error {check['median_error']:.1%}, "
        f"{check['within_10_percent']:.0%} within 10 %, {_rank_correlation(check['spearman'])}; "
        f"MACs only {check['macs_only_median_error']:.1%}; repeat-measurement noise {check['repeat_noise']:.1%}"
    )


def _rank_correlation(rho: float | None) -> str:
    if rho is None:
        return "rank correlation not defined (all latencies or all predictions are equal)"
    return f"Spearman {rho:.3f}"


def _summary_of_export(manifest: Mapping[str, Any]) -> str:
    accuracy, parity = manifest["accuracy"], manifest["parity"]
    return (
        f"exported {manifest['id']}: test accuracy {accuracy['test']:.2%}, {manifest['int8_macs_share']:.0%} of the "
        f"MACs in int8, agrees with torch on {parity['top1_agreement']:.2%} of {parity['images']} test images"
    )


# arguments -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nas", description="Hardware-aware neural architecture search.")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Callable[[argparse.Namespace], None], help_: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=help_, description=help_)
        made.set_defaults(verb=function)
        return made

    run = verb("run", _run, "Do every stage of an experiment; started again, it goes on where it was stopped.")
    run.add_argument("experiment", help="a YAML file, or the name of a shipped recipe such as quickstart")
    train = verb("train", _train, "Train the supernet of a run or experiment; it goes on from the last checkpoint.")
    train.add_argument("run", metavar="RUN|EXPERIMENT")
    for made in (run, train):
        made.add_argument("--out", type=Path, help="run directory; runs/NAME by default")
        made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.epochs=10")

    profile = verb("profile", _profile, "Profile a device for a run.")
    profile.add_argument("--device", required=True, metavar="NAME|FILE")
    profile.add_argument("--samples", type=_positive, help="subnets to measure at most")
    profile.add_argument(
        "--error", type=float, metavar="SHARE", help="stop at this held-out error (half the 90 %% interval; 0.05)"
    )
    measured = profile.add_mutually_exclusive_group()
    measured.add_argument("--plan", type=Path, metavar="FILE.csv", help="write what to measure, and measure nothing")
    measured.add_argument("--measurements", type=Path, metavar="FILE.csv", help="fit on what was measured elsewhere")
    search = verb("search", _search, "Search the trained supernet of a run and measure the front.")
    search.add_argument("--confidence", type=float, help="0.95: latency limits hold for the upper end of the interval")
    search.add_argument("--trials", type=_positive, help="distinct architectures to evaluate")
    search.add_argument("--nested", action="store_true", help="no search: the front of the nested family, at once")
    search.add_argument("--sampler", metavar="NAME", help="guided by default; or nsga2, nsga3, tpe, gp, random")
    search.add_argument("--workers", type=_positive, metavar="N", help="processes of this machine that share it")
    search.add_argument(
        "--storage",
        metavar="URL",
        help="SQLite in the run directory by default; postgresql://..., grpc://HOST:PORT and others, which several "
        "machines may share",
    )
    pareto = verb("pareto", _pareto, "Query the front of a run, a front.json or a table, or compare two.")
    pareto.add_argument(
        "--against", type=Path, metavar="B", help="compare with the front of another run, file or table"
    )
    pareto.add_argument(
        "--reference", action="append", default=[], metavar="FIGURE=NUMBER", help="worst corner of the hypervolumes"
    )
    pareto.add_argument("--objective", action="append", metavar="COLUMN:max|min", help="of a CSV file, one or more")
    pareto.add_argument("--id-column", metavar="COLUMN", help="of a CSV file: what a row is called")
    pareto.add_argument("--architecture-columns", nargs="+", metavar="COLUMN", help="of a CSV file, such as 'op_*'")
    chosen = pareto.add_mutually_exclusive_group()
    chosen.add_argument("--best", metavar="FIGURE", help="only the best point in a figure, such as accuracy")
    chosen.add_argument("--knee", action="store_true", help="only the point where trading stops paying")
    pareto.add_argument("--device", metavar="NAME", help="only the front of one of the devices of the objectives")
    pareto.add_argument("--format", choices=list(FORMATS), default="table")
    pareto.add_argument("--plot", type=Path, metavar="FILE.png")
    pareto.add_argument(
        "--kind", choices=("front", "parallel", "choices", "3d"), default="front", help="of the picture"
    )
    export = verb("export", _export, "Export a subnet of a run as a verified ONNX model.")
    which = export.add_mutually_exclusive_group(required=True)
    which.add_argument("--architecture", metavar="TEXT")
    which.add_argument("--id")
    which.add_argument("--best", metavar="FIGURE")
    export.add_argument("--out", type=Path, help="RUN/exports by default")
    trust = verb("trust", _trust, "Train some subnets alone: what the accuracies that a search picks by are worth.")
    trust.add_argument("--networks", type=_positive, default=8, help="how many, spread over MACs; 8 by default")
    trust.add_argument("--format", choices=("table", "json"), default="table")
    trust.add_argument("--plot", type=Path, metavar="FILE.png", help="RUN/trust.png by default")
    for made in (profile, search, pareto, export, trust):
        made.add_argument("run", type=Path, metavar="RUN")
    for made in (search, pareto, export):
        made.add_argument("--limit", action="append", default=[], metavar="'FIGURE[@DEVICE]<=NUMBER[unit]'")

    spaces = verb("spaces", _spaces, "List the families of search spaces, describe one, or choose a space of one.")
    spaces.add_argument("name", nargs="?", metavar="FAMILY")
    how = spaces.add_mutually_exclusive_group()
    how.add_argument("--fit", metavar="DEVICE|FILE", help="rank spaces by the MACs of the networks that fit its memory")
    how.add_argument("--macs", type=_macs, help="scale the space to a largest network of so many MACs, such as 5M")
    spaces.add_argument("--resolutions", type=_positive, nargs="+", metavar="PIXELS", help="48 to 224 by default")
    spaces.add_argument("--widths", type=_above_zero, nargs="+", metavar="MULTIPLIER", help="0.2 to 1 by default")
    spaces.add_argument("--samples", type=_positive, help="networks drawn of each space; 1000 by default")
    spaces.add_argument("--seed", type=int, help="of the draws; 0 by default")
    spaces.add_argument("--plot", type=Path, metavar="FILE.png", help="distributions of the MACs of what fits")
    spaces.add_argument("--classes", type=_positive)
    spaces.add_argument("--channels", type=_positive)
    spaces.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as 'depths=[1, 2]'")
    spaces.add_argument("--format", choices=("table", "json"), default="table")
    devices = verb("devices", _devices, "List the devices, or describe one with the source of each number.")
    devices.add_argument("name", nargs="?", metavar="NAME|FILE")
    devices.add_argument("--format", choices=("table", "json"), default="table")
    verb("doctor", _doctor, "Show versions, processor and GPU, and what is missing: exit code 1 where it is required.")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")


def _macs(text: str) -> float:
    from nas.costs import parse_limit

    try:
        macs = parse_limit(f"macs<={text}").value
    except ValueError:
        macs = 0.0
    if macs <= 0:
        raise argparse.ArgumentTypeError(f"expected a number of MACs such as 5M or 300k, got {text!r}")
    return macs


if __name__ == "__main__":
    sys.exit(main())
