"""Latencies of ONNX models on this processor, through onnxruntime.

A processor that others share is slow at times: for milliseconds and for minutes, by 20 to 60 %. So networks are
measured in rounds, each visited for a few milliseconds, and a fixed anchor network is timed right before and right
after each visit. A visit counts only if both anchors came within 10 % of the best anchor time ever seen on this
machine, which is kept in a file; else we wait, and after some patience refuse.

The work is done by a fresh process (`python -m hardware_profiles.host_cpu PLAN.json`), since thread pools of the
caller disturb it. The process times onnxruntime's call with bound inputs and outputs; that call alone takes about
6 microseconds, which a latency includes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from hardware_profiles.files import write_json
from hardware_profiles.machine import this_machine
from hardware_profiles.measurement import Measurement, Provenance
from hardware_profiles.onnx_writer import OUTPUT, random_weights, write_onnx
from search_spaces.layers import INPUT, Layer, Network, Port, conv2d, global_average_pool, linear, port, reshape

DEVICE = "host-cpu"
TOLERANCE = 1.1  # an anchor slower than this times the best one ever seen spoils a round
QUANTILE = 20  # per cent, over the round medians

VISIT_MS = 3.0  # time spent on one network in one round: short beside most slow spells
FEWEST_RUNS, MOST_RUNS = 10, 100  # runs of one network in one round
ANCHOR_RUNS = 8
CHUNK = 128  # networks in memory at once

# A processor that slept is slow at first: look for a quiet moment without a rest, then rest longer each time.
WATCH_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, PAUSE_GROWTH = 0.5, 0.25, 15.0, 1.6
RECORD_SCHEMA = 1


class NoisyMachine(RuntimeError):
    """The processor stayed slower than its best, so that nothing could be measured."""


class UnmeasurableModel(RuntimeError):
    """A model that onnxruntime does not load, or that killed the process that ran it."""


def measure_models(
    models: Mapping[str, bytes],
    *,
    device: str = DEVICE,
    threads: int = 1,
    rounds: int = 10,
    patience_s: float = 180.0,
    anchor_record: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measurement]:
    """Measure serialized ONNX models with input `input` and output `logits`, batch 1, together.

    Args:
        models: name -> model; the names come back as keys and are used for nothing else.
        threads: threads of one operator.
        rounds: accepted rounds of each model.
        patience_s: how long to wait for a slow phase to pass, in all.
        anchor_record: JSON file with the best anchor times ever seen; made where it does not exist.
        progress: called with (model rounds accepted, model rounds wanted).

    Raises NoisyMachine when patience runs out, and UnmeasurableModel naming a model that fails. Slow phases
    that began before the first measurement on a machine cannot be told from its normal speed.
    """
    if threads < 1 or rounds < 1:
        raise ValueError(f"expected at least one thread and one round, got {threads} and {rounds}")
    if not models:
        return {}
    anchor = anchor_model()
    machine = this_machine()
    key = f"{machine.cpu}, onnxruntime {machine.onnxruntime}, {threads} threads, anchor {_digest(anchor)}"
    best_ms = _read_record(anchor_record).get(key)
    with tempfile.TemporaryDirectory(prefix="fitnest-") as name:
        folder = Path(name)
        files = {f"{i:05d}.onnx": model for i, model in enumerate(models.values())}
        for file, model in {**files, "anchor.onnx": anchor}.items():
            (folder / file).write_bytes(model)
        plan = {
            "threads": threads,
            "rounds": rounds,
            "patience_s": patience_s,
            "best_ms": best_ms,
            "models": list(zip(models, files, strict=True)),
        }
        (folder / "plan.json").write_text(json.dumps(plan))
        result = _run_child(folder, progress)
    if "failed" in result:
        raise UnmeasurableModel(f"model {result['failed']!r}: {result['why']}")
    if result["best_ms"] is not None:
        _update_record(anchor_record, key, result["best_ms"])
    if "refused" in result:
        raise NoisyMachine(_refusal(result["refused"], result["best_ms"], anchor_record))
    runtime, date = f"onnxruntime {machine.onnxruntime}", datetime.now(UTC).isoformat(timespec="seconds")
    return {
        model: Measurement(
            **numbers["figures"],
            provenance=Provenance(
                device=device,
                runtime=runtime,
                threads=threads,
                batch=1,
                precision=precision_label(models[model]),
                cpu=machine.cpu,
                date=date,
                anchor_ms=numbers["anchor_ms"],
            ),
        )
        for model, numbers in result["models"].items()
    }


def _refusal(state: Mapping[str, Any], best_ms: float, anchor_record: Path) -> str:
    return (
        f"this machine is too slow just now to be measured: its anchor network takes {state['anchor_ms']:.4f} ms, "
        f"the best ever was {best_ms:.4f} ms and at most {TOLERANCE} times that is accepted; "
        f"{state['accepted']} of {state['wanted']} model rounds were accepted in {state['waited_s']:.0f} s of waiting. "
        f"Stop other work on it and try again; if it has truly become slower, delete {anchor_record}"
    )


def precision_label(model: bytes) -> str:
    """fp32, int8 or mixed: how many of a model's convolutions and matrix products have integer weights."""
    graph = onnx.load_from_string(model).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    quantized = [node.input[1] in dequantized for node in graph.node if node.op_type in ("Conv", "Gemm")]
    if not any(quantized):
        return "fp32"
    return "int8" if all(quantized) else "mixed"


def anchor_model() -> bytes:
    """A small convolutional network with fixed weights, about 100 microseconds on a server core of 2021."""
    made: list[Layer] = [conv2d("stem", Port(INPUT, (3, 32, 32)), 16, kernel=3, stride=2, activation="relu")]
    for i, (width, stride) in enumerate(((16, 1), (24, 2), (24, 1), (40, 2), (40, 1))):
        source = port(made[-1])
        hidden = 4 * source.shape[0]
        made.append(conv2d(f"expand{i}", source, hidden, activation="relu"))
        made.append(
            conv2d(f"depthwise{i}", port(made[-1]), hidden, kernel=3, stride=stride, groups=hidden, activation="relu")
        )
        made.append(conv2d(f"project{i}", port(made[-1]), width))
    made.append(global_average_pool("pool", port(made[-1])))
    made.append(reshape("flatten", port(made[-1]), (made[-1].out_shape[0],)))
    made.append(linear("classifier", port(made[-1]), 10))
    network = Network((3, 32, 32), tuple(made), "anchor")
    return write_onnx(network, random_weights(network, np.random.default_rng(0))).SerializeToString()


# the record of best anchor times ---------------------------------------------------------------------------


def _digest(model: bytes) -> str:
    return hashlib.sha256(model).hexdigest()[:8]


def _read_record(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        if record["schema"] != RECORD_SCHEMA:
            raise ValueError(f"schema {record['schema']}, expected {RECORD_SCHEMA}")
        return {str(key): float(best_ms) for key, best_ms in record["best_ms"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of anchor times ({error}); delete it") from None


def _update_record(path: Path, key: str, best_ms: float) -> None:
    record = _read_record(path)  # again: another process may have written meanwhile
    record[key] = min(best_ms, record.get(key, best_ms))
    write_json(path, {"schema": RECORD_SCHEMA, "best_ms": dict(sorted(record.items()))})


# the child, seen from its parent ---------------------------------------------------------------------------


def _run_child(folder: Path, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    """Run the plan in `folder` and return its result; raises UnmeasurableModel if the process dies."""
    source = str(Path(__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    at_work = "none yet"
    command = [sys.executable, "-m", "hardware_profiles.host_cpu", str(folder / "plan.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with (
        (folder / "errors.txt").open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                event = json.loads(line)
                at_work = event.get("model", at_work)
                if progress and "done" in event:
                    progress(event["done"], event["total"])
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        lines = (folder / "errors.txt").read_text(errors="replace").strip().splitlines()
        end = f"was killed by signal {-child.returncode}" if child.returncode < 0 else "failed"
        why = f": {lines[-1]}" if lines else ""
        raise UnmeasurableModel(f"the measuring process {end} while working on model {at_work!r}{why}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


# the child ---------------------------------------------------------------------------------------------------


@dataclass
class _Timed:
    """A loaded model with bound tensors, ready to be timed."""

    session: onnxruntime.InferenceSession
    binding: onnxruntime.IOBinding
    runs: int = FEWEST_RUNS

    def time_ms(self, runs: int) -> np.ndarray:
        """Times of `runs` runs, after a few that bring the model back into the caches; shape (runs,)."""
        run, binding, clock = self.session.run_with_iobinding, self.binding, time.perf_counter_ns
        for _ in range(max(2, runs // 10)):
            run(binding)
        stamps = np.empty((runs, 2), np.int64)
        for i in range(runs):
            start = clock()
            run(binding)
            stamps[i] = start, clock()
        return (stamps[:, 1] - stamps[:, 0]) / 1e6


@dataclass
class _Subject:
    """A network to be measured, and its visits: the slower of the two anchors beside each, and the times."""

    name: str
    timed: _Timed
    visits: list[tuple[float, np.ndarray]] = field(default_factory=list)

    def accepted(self, limit_ms: float) -> list[tuple[float, np.ndarray]]:
        return [visit for visit in self.visits if visit[0] <= limit_ms]


class _Refused(RuntimeError):
    def __init__(self, anchor_ms: float) -> None:
        super().__init__(f"anchor at {anchor_ms} ms")
        self.anchor_ms = anchor_ms


@dataclass
class _Anchor:
    """The anchor network, its best time and the time lost to slow phases."""

    timed: _Timed
    best_ms: float
    patience_s: float
    lost_s: float = 0.0

    @property
    def limit_ms(self) -> float:
        return TOLERANCE * self.best_ms

    def read_ms(self) -> float:
        now_ms = float(np.median(self.timed.time_ms(ANCHOR_RUNS)))
        self.best_ms = min(self.best_ms, now_ms)
        return now_ms

    def lose(self, seconds: float, now_ms: float) -> None:
        self.lost_s += seconds
        if self.lost_s > self.patience_s:
            raise _Refused(now_ms)

    def wait_ms(self, now_ms: float) -> float:
        """An acceptable anchor time: `now_ms`, or one found by watching, between pauses; raises _Refused."""
        pause_s = FIRST_PAUSE_S
        while now_ms > self.limit_ms:
            started = time.perf_counter()
            while now_ms > self.limit_ms and time.perf_counter() - started < WATCH_S:
                now_ms = self.read_ms()
            self.lose(time.perf_counter() - started, now_ms)
            if now_ms > self.limit_ms:
                self.lose(pause_s, now_ms)
                time.sleep(pause_s)
                pause_s = min(pause_s * PAUSE_GROWTH, LONGEST_PAUSE_S)
        return now_ms


def _load(path: Path, threads: int, rng: np.random.Generator) -> _Timed:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if threads > 1:  # else the threads of one model spin while the next is timed
        options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    shape = [1, *session.get_inputs()[0].shape[1:]]
    values = rng.standard_normal(shape).astype(np.float32)
    binding.bind_ortvalue_input(INPUT, onnxruntime.OrtValue.ortvalue_from_numpy(values))
    outputs = np.zeros([1, *session.get_outputs()[0].shape[1:]], np.float32)
    binding.bind_ortvalue_output(OUTPUT, onnxruntime.OrtValue.ortvalue_from_numpy(outputs))
    timed = _Timed(session, binding)
    typical_ms = float(np.median(timed.time_ms(5)))
    timed.runs = int(np.clip(VISIT_MS / typical_ms, FEWEST_RUNS, MOST_RUNS))
    return timed


def _say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def _visit(subject: _Subject, anchor: _Anchor, before_ms: float) -> float:
    """One round of one network; returns the anchor after it."""
    _say(model=subject.name)
    started = time.perf_counter()
    times = subject.timed.time_ms(subject.timed.runs)
    after_ms = anchor.read_ms()
    subject.visits.append((max(before_ms, after_ms), times))
    if after_ms > anchor.limit_ms:
        anchor.lose(time.perf_counter() - started, after_ms)
    return after_ms


def _measure_chunk(subjects: Sequence[_Subject], anchor: _Anchor, rounds: int, report: Callable[[], None]) -> None:
    """Visit the networks in turn until each has `rounds` accepted visits; raises _Refused when patience runs out."""
    now_ms = anchor.read_ms()
    while lacking := [subject for subject in subjects if len(subject.accepted(anchor.limit_ms)) < rounds]:
        for subject in lacking:
            now_ms = _visit(subject, anchor, anchor.wait_ms(now_ms))
        report()


def _figures(visits: Sequence[tuple[float, np.ndarray]]) -> dict[str, Any]:
    runs = np.array([times for _, times in visits])  # (rounds, runs)
    medians = np.median(runs, axis=1)
    middle = float(np.median(medians))
    return {
        "figures": {
            "latency_ms": float(np.percentile(medians, QUANTILE)),
            "p50_ms": float(np.percentile(runs, 50)),
            "p95_ms": float(np.percentile(runs, 95)),
            "spread": 1.4826 * float(np.median(np.abs(medians - middle))) / middle,
            "rounds": runs.shape[0],
            "runs_per_round": runs.shape[1],
        },
        "anchor_ms": float(np.percentile([anchor_ms for anchor_ms, _ in visits], QUANTILE)),
    }


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _measure(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the plan asks for: figures, or why not."""
    rng, rounds, total = np.random.default_rng(0), plan["rounds"], plan["rounds"] * len(plan["models"])
    known_ms = np.inf if plan["best_ms"] is None else plan["best_ms"]
    anchor = _Anchor(_load(folder / "anchor.onnx", plan["threads"], rng), known_ms, plan["patience_s"])
    figures: dict[str, Any] = {}

    def accepted(subjects: Iterable[_Subject]) -> int:
        now = sum(min(len(subject.accepted(anchor.limit_ms)), rounds) for subject in subjects)
        return now + rounds * len(figures)

    for chunk in _chunks(plan["models"], CHUNK):
        subjects: list[_Subject] = []
        for name, file in chunk:
            _say(model=name)
            try:
                subjects.append(_Subject(name, _load(folder / file, plan["threads"], rng)))
            except Exception as error:  # onnxruntime has a class of its own for each status, without a common base
                return {"failed": name, "why": " ".join(str(error).split()), "best_ms": None}

        def report(subjects: Sequence[_Subject] = subjects) -> None:
            _say(done=accepted(subjects), total=total)

        try:
            _measure_chunk(subjects, anchor, rounds, report)
        except _Refused as error:
            state = {"accepted": accepted(subjects), "wanted": total, "waited_s": anchor.lost_s}
            return {"refused": {"anchor_ms": error.anchor_ms, **state}, "best_ms": anchor.best_ms}
        for subject in subjects:
            figures[subject.name] = _figures(subject.accepted(anchor.limit_ms))
    return {"models": figures, "best_ms": anchor.best_ms}


def main(arguments: Sequence[str]) -> int:
    """Carry out the plan at the path given, and write `result.json` beside it."""
    path = Path(arguments[0])
    gc.disable()  # a collection in the middle of a run would be timed
    result = _measure(path.parent, json.loads(path.read_text()))
    (path.parent / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
