"""A front one can trust: its candidates evaluated on held-out images and measured, twice, on the device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hardware_profiles.onnx_writer import write_onnx
from nas.costs import Figure, Infeasible, Item, ProfiledDevice
from nas.evaluator import Evaluator
from nas.front import Evaluation, ParetoFront, costs_of, dominated, nearest_message
from nas.profile import measure
from nas.progress import progress_bar

log = logging.getLogger(__name__)

CANDIDATES = 40


def remeasure(
    front: ParetoFront,
    evaluator: Evaluator,
    devices: Mapping[str, ProfiledDevice],
    *,
    candidates: int = CANDIDATES,
    patience_s: float = 180.0,
) -> ParetoFront:
    """The front again, by accuracy on val_front and by latency measured where the device is at hand.

    The candidates are the first non-dominated layers of everything the search evaluated, since those just
    behind the front may turn out to be on it. They are exported as they would be deployed and measured in two
    later processes; what two measurements of one model differ by (90 % quantile) is the noise, and a lead
    within it counts for nothing. Those that leave the front by this are its `departed`.

    Raises Infeasible when no candidate meets the limits once it was measured, and
    hardware_profiles.host_cpu.NoisyMachine when the machine stays slow.
    """
    chosen = _layers([*front.points, *front.others], front, candidates)
    items: list[Item] = [*front.objectives, *front.limits]
    asked = {item.key for item in items}
    live = [d for d in devices.values() if d.is_at_hand and f"latency_ms@{d.name}" in asked]
    figures: dict[str, dict[str, Figure]] = {e.id: dict(e.figures) for e in chosen}
    models: dict[str, bytes] = {}
    for evaluation in progress_bar(chosen, desc="front", unit="arch"):
        architecture = evaluator.supernet.space.parse(evaluation.architecture)
        if "accuracy" in evaluation.figures:
            share = evaluator.accuracy(architecture, "val_front")
            figures[evaluation.id]["accuracy"] = Figure.share(share, len(evaluator.data["val_front"]))
        if live:
            deployed = evaluator.deploy(architecture)
            model = write_onnx(
                deployed.folded.network,
                deployed.folded.weights(),
                deployed.ranges,
                weight_limit=evaluator.weight_limit,
            )
            models[evaluation.id] = bytes(model.SerializeToString())
    noise: dict[str, float] = {}
    for device in live:
        key = f"latency_ms@{device.name}"
        latencies, noise[key] = _measure_twice(models, device, patience_s)
        for id_, latency_ms in latencies.items():
            slack = latency_ms * noise[key]
            figures[id_][key] = Figure(latency_ms, latency_ms - slack, latency_ms + slack, "measured")
        percent = 100 * noise[key]
        log.info("two measurements of one model on %s differ by up to %.1f %% (90 %% of them)", device.name, percent)
    again = [replace(e, figures=figures[e.id], predicted=_changed(e, figures[e.id])) for e in chosen]
    fresh = ParetoFront.of(
        again,
        front.objectives,
        limits=front.limits,
        noise=noise,
        space=front.space,
        supernet_sha256=front.supernet_sha256,
    )
    if not fresh.points:
        raise Infeasible(f"once measured, {nearest_message(again, front.limits)}")
    seen = {e.id for e in again}
    rest = (e for e in (*front.points, *front.others) if e.id not in seen)
    kept = {e.id for e in fresh.points}
    left = dict.fromkeys([*front.left, *(e.id for e in front.points if e.id in seen)])
    return replace(fresh, others=(*fresh.others, *rest), left=tuple(id_ for id_ in left if id_ not in kept))


def _layers(evaluations: Sequence[Evaluation], front: ParetoFront, count: int) -> list[Evaluation]:
    """Whole non-dominated layers, best first, until `count` is reached; the last one thinned evenly."""
    left = list(evaluations)
    chosen: list[Evaluation] = []
    while left and len(chosen) < count:
        beaten = dominated(costs_of(left, front.objectives))
        layer = [e for e, lost in zip(left, beaten, strict=True) if not lost]
        layer.sort(key=lambda e: tuple(objective.cost(e[objective.key]) for objective in front.objectives))
        room = count - len(chosen)
        if len(layer) > room:
            layer = [layer[int(i)] for i in np.unique(np.linspace(0, len(layer) - 1, room).round())]
        chosen += layer
        left = [e for e, lost in zip(left, beaten, strict=True) if lost]
    return chosen


def _measure_twice(
    models: Mapping[str, bytes], device: ProfiledDevice, patience_s: float
) -> tuple[dict[str, float], float]:
    first, second = (measure(models, device.profile, patience_s=patience_s) for _ in range(2))
    pairs = {name: (first[name].latency_ms, second[name].latency_ms) for name in models}
    differences = [abs(a - b) / ((a + b) / 2) for a, b in pairs.values()]
    return {name: (a + b) / 2 for name, (a, b) in pairs.items()}, float(np.quantile(differences, 0.9))


def _changed(evaluation: Evaluation, figures: Mapping[str, Figure]) -> dict[str, Figure]:
    """What the search believed where the front was measured anew."""
    return {key: old for key, old in evaluation.figures.items() if figures[key] != old}
