"""Training in several processes: real ones, over gloo, against one process that sees whole batches.

This file is also what the processes run: `python test_distributed.py SCENARIO FOLDER`, under torchrun or with its
environment set by hand.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.cli import main as nas_command
from nas.distributed import WorkerLost, Workers, is_first_process, workers
from nas.evaluate import recalibrate
from nas.supernet import Supernet
from search_spaces import Architecture, CompactTransformer, MobileNet, SearchSpace
from tests.nas import tiny

ROOT = Path(__file__).parents[2]
BATCH = 65  # two processes take 33 and 32
HALVES = (np.arange(33), np.arange(33, 65))
CPU = torch.device("cpu")
HANG_S = 8.0  # instead of half an hour

SPACES: dict[str, SearchSpace] = {
    "with batch norms": MobileNet(
        resolutions=(8,), channels=1, classes=4, widths=(8, 8), width_multipliers=(0.5, 1), divisor=4, depths=(1, 2),
        kernels=(3, 5), expansions=(1, 2), stem_width=8, head_width=16, precisions=("fp32",),
    ),
    "without": CompactTransformer(
        resolutions=(8,), channels=1, classes=4, embeddings=(8, 16), depths=(1, 2), heads=(1, 2), head_size=4,
        mlp_ratios=(1, 2), tokenizer_pools=(True,), precisions=("fp32",),
    ),
}  # fmt: skip


def passes_of(space: SearchSpace) -> list[list[Architecture]]:
    """Four steps. The smallest comes last or alone, so that most parameters are unused when gradients are exchanged."""
    middle = space.sample(np.random.default_rng(1))
    every = [space.largest, middle, space.smallest]
    return [every, every[::-1], [space.smallest], every]


def batch(space: SearchSpace, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, *space.lower(space.largest).input_shape, dtype=torch.float64, generator=generator)
    return x, torch.randint(space.classes, (BATCH,), generator=generator)


def loss_of(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    """Labels for the first pass of a step, its logits for the others."""
    return F.cross_entropy(logits, labels if teacher is None else teacher.softmax(1))


def made(space: SearchSpace, seed: int = 0) -> tuple[Supernet, torch.optim.Optimizer]:
    supernet = Supernet(space, seed=seed).double()
    return supernet, torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def gradients(supernet: Supernet) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in supernet.named_parameters() if p.grad is not None}


def state(supernet: Supernet) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in supernet.state_dict().items()}


# what the processes run ----------------------------------------------------------------------------------


def train_steps(folder: Path) -> None:
    """Train both spaces as a trainer does; the first process evaluates in between."""
    with workers() as joined:
        found: dict[str, np.ndarray] = {}
        for name, space in SPACES.items():
            supernet, optimizer = made(space, seed=joined.rank)  # the first one's weights must win
            model = joined.wrap(supernet)
            for step, passes in enumerate(passes_of(space)):
                x, labels = batch(space, step)
                mine = torch.from_numpy(joined.share(np.arange(BATCH)))
                optimizer.zero_grad(set_to_none=True)
                teacher = None
                for index, architecture in enumerate(passes):
                    last = index == len(passes) - 1
                    segments = 2 if last and step == 3 else 1  # recomputes its activations in the backward pass
                    with joined.accumulating(model, last=last):
                        logits = model(x[mine], architecture, segments=segments)
                        (joined.factor(len(mine), BATCH) * loss_of(logits, labels[mine], teacher)).backward()
                    teacher = logits.detach() if teacher is None else teacher
                    if step == index == 0:
                        found |= {f"{name}/own/{key}": value for key, value in gradients(supernet).items()}
                found |= {f"{name}/gradient{step}/{key}": value for key, value in gradients(supernet).items()}
                optimizer.step()
                if joined.is_first:
                    with torch.no_grad():
                        supernet(x, space.largest)
                    recalibrate(supernet.extract(space.smallest), [x])
            found |= {f"{name}/state/{key}": value for key, value in state(supernet).items()}
        np.savez(folder / f"rank{joined.rank}.npz", **found)  # type: ignore[arg-type]
        told = joined.broadcast(({"x": torch.arange(3)}, {"none": None, "pi": 3.5}) if joined.is_first else None)
        assert isinstance(told, tuple)
        facts = {
            "first": joined.is_first,
            "first by environment": is_first_process(),
            "device": str(joined.device),
            "share": joined.share(np.arange(BATCH)).tolist(),
            "factor": joined.factor(len(joined.share(np.arange(BATCH))), BATCH),
            "mean": joined.mean(torch.tensor([joined.rank, 10.0 * joined.rank])).tolist(),
            "spoilt mean": str(float(joined.mean(torch.tensor(float("nan") if joined.rank else 1.0)))),
            "broadcast": [told[0]["x"].tolist(), told[1]],
            "alone": joined.alone().count,
        }
    facts["left"] = not torch.distributed.is_initialized()
    facts["again"] = []
    for _ in range(3):  # as often as one likes
        with workers() as again:
            facts["again"].append(float(again.mean(torch.tensor(float(again.rank)))))
    (folder / f"rank{joined.rank}.json").write_text(json.dumps(facts), encoding="utf-8")


def lose_each_other(folder: Path, *ports: str) -> None:
    """The second process hangs in the second step, then, connected again, ends there by an error of its own.

    Both write what they got, and how long after the step began.
    """
    module = importlib.import_module("nas.distributed")
    space = SPACES["without"]
    for how, port in zip(("meet", "hang", "end"), ports, strict=True):  # they start seconds apart: first they meet
        os.environ["MASTER_PORT"] = port
        module.TIMEOUT = timedelta(seconds=HANG_S if how == "hang" else 60)
        error = None
        try:
            with workers() as joined:
                model = joined.wrap(made(space)[0])
                for step in range(2):
                    started = time.monotonic()
                    if how != "meet" and step and not joined.is_first:
                        if how == "end":
                            sys.exit("what this process has to say")
                        time.sleep(HANG_S + 2)
                    x, labels = batch(space, step)
                    loss_of(model(x, space.largest), labels, None).backward()
        except WorkerLost as lost:
            error = str(lost)
        facts = {"error": error, "seconds": time.monotonic() - started}
        (folder / f"{how}{joined.rank}.json").write_text(json.dumps(facts), encoding="utf-8")


# starting them -------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += map(str, arguments)
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            stdout, stderr = started.communicate(timeout=120)
        finally:
            started.terminate()  # it ends what it started, which it could not if it were killed
    return subprocess.CompletedProcess(command, started.returncode, stdout, stderr)


def start_pair(*arguments: str | Path) -> list[subprocess.Popen[str]]:
    """Two processes without torchrun, which would end the one when the other fails."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            env=environment(RANK=rank, LOCAL_RANK=rank, **shared),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, np.ndarray]], list[dict[str, Any]], str]:
    """(arrays of each process, facts of each, what both printed) of one run under torchrun."""
    folder = tmp_path_factory.mktemp("distributed")
    done = torchrun(__file__, "steps", folder)
    assert done.returncode == 0, done.stderr
    arrays = [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(2)]
    facts = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return arrays, facts, done.stdout + done.stderr


# tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_steps_are_those_of_one_process_with_the_whole_batch(name: str, trained: Any) -> None:
    """Mean over the batch, as one process sees it; batch norms see the halves, as they do in each process."""
    space = SPACES[name]
    parts = HALVES if name == "with batch norms" else (np.arange(BATCH),)
    supernet, optimizer = made(space)
    for step, passes in enumerate(passes_of(space)):
        x, labels = batch(space, step)
        optimizer.zero_grad(set_to_none=True)
        teachers: dict[int, Tensor] = {}
        for architecture in passes:
            for index, part in enumerate(map(torch.from_numpy, parts)):
                logits = supernet(x[part], architecture)
                (loss_of(logits, labels[part], teachers.get(index)) * len(part) / BATCH).backward()
                teachers.setdefault(index, logits.detach())
        expected = gradients(supernet)
        prefix = f"{name}/gradient{step}/"
        got = {key.removeprefix(prefix): value for key, value in trained[0][0].items() if key.startswith(prefix)}
        assert got.keys() == expected.keys()  # no gradient at all where no pass used a parameter
        for key, value in expected.items():
            np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-12, err_msg=f"{key} in step {step}")
        optimizer.step()
    assert len(expected) > len(gradients_of_one_pass(space)) > 0  # or the test would show nothing
    for key, parameter in supernet.named_parameters():
        held = trained[0][0][f"{name}/state/{key}"]
        np.testing.assert_allclose(held, parameter.detach().numpy(), rtol=1e-9, atol=1e-12, err_msg=key)


def gradients_of_one_pass(space: SearchSpace) -> dict[str, np.ndarray]:
    supernet, _ = made(space)
    supernet(batch(space, 0)[0], space.smallest).sum().backward()
    return gradients(supernet)


def test_all_processes_hold_the_same_weights_and_gradients_to_the_bit(trained: Any) -> None:
    first, second = trained[0]
    assert first.keys() == second.keys()
    statistics = {key for key in first if key.endswith(("norm_mean", "norm_variance"))}
    own = {key for key in first if "/own/" in key}
    for key in first.keys() - statistics - own:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)
    assert any((first[key] != second[key]).any() for key in statistics)  # each saw other images
    assert any((first[key] != second[key]).any() for key in own)  # passes before the last exchange nothing


def test_a_batch_is_shared_out(trained: Any) -> None:
    facts = trained[1]
    assert facts[0]["share"] + facts[1]["share"] == list(range(65))
    assert [len(each["share"]) for each in facts] == [33, 32]
    assert [each["factor"] for each in facts] == [33 / 32.5, 32 / 32.5]


def test_processes_agree(trained: Any) -> None:
    for rank, facts in enumerate(trained[1]):
        assert facts["first"] == facts["first by environment"] == (rank == 0)
        assert facts["device"] == "cpu"
        assert facts["mean"] == [0.5, 5.0]
        assert facts["spoilt mean"] == "nan"
        assert facts["broadcast"] == [[0, 1, 2], {"none": None, "pi": 3.5}]
        assert facts["alone"] == 1
        assert facts["left"] and facts["again"] == [0.5, 0.5, 0.5]


def test_torch_has_nothing_to_complain_about(trained: Any) -> None:
    assert "arning" not in trained[2]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [5, 6, 64])
def test_shares_are_the_batch_and_nearly_equal(size: int, count: int) -> None:
    positions = np.random.default_rng(0).permutation(size)
    shares = [Workers(rank, count, CPU).share(positions) for rank in range(count)]
    np.testing.assert_array_equal(np.concatenate(shares), positions)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_too_small_to_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 images for 3 processes.*train.batch_size"):
        Workers(0, 3, CPU).share(np.arange(2))


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with workers() as joined:
        assert not torch.distributed.is_initialized()
        assert joined == Workers(0, 1, CPU) and joined.is_first and is_first_process()
        supernet = Supernet(SPACES["without"])
        assert joined.wrap(supernet) is supernet
        with joined.accumulating(supernet, last=False):
            pass
        assert joined.factor(7, 7) == 1.0
        assert joined.mean(torch.tensor(3.0)) == 3.0
        assert joined.broadcast({"a": 1}) == {"a": 1}


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"process 2 .*there are 1.*--nproc-per-node"), workers():
        pass


@pytest.mark.slow
def test_a_process_that_hangs_or_ends_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    first, second = start_pair("lose", tmp_path, *free_ports(3))
    try:
        _, told = first.communicate(timeout=100)
        _, said = second.communicate(timeout=10)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 0, told
    assert second.returncode == 1 and "what this process has to say" in said
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")}
    assert {name for name, facts in found.items() if facts["error"] is None} == {"meet0", "meet1"}
    lost = {name: facts for name, facts in found.items() if facts["error"] is not None}
    assert lost.keys() == {"hang0", "hang1", "end0"}
    assert all("start the same command again" in facts["error"] for facts in lost.values())
    assert HANG_S - 0.5 < lost["hang0"]["seconds"] < HANG_S + 10
    assert lost["end0"]["seconds"] < 10  # the connections of a process that ends are closed


def test_the_command_trains_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """Only the first process prints and writes, and the loss is that of one process within what batch norms change."""
    experiment = tiny.write_experiment(tmp_path)
    assert nas_command(["train", str(experiment), "--out", str(tmp_path / "one")]) == 0
    two = torchrun("-m", "nas", "train", experiment, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    printed = [json.loads(line) for line in two.stdout.splitlines()]
    assert [each["run"] for each in printed] == [str(tmp_path / "two")]
    bars = [line for line in two.stderr.splitlines() if line.startswith("train:")]
    assert sum(" 0/" in line for line in bars) == 1, two.stderr
    files = [{str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*")} for name in ("one", "two")]
    assert files[0] == files[1]
    curves = [losses(tmp_path / name) for name in ("one", "two")]
    assert len(curves[0]) == len(curves[1]) > 0
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.2)


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main(scenario: str, folder: str, *ports: str) -> None:
    torch.set_num_threads(1)
    if scenario == "steps":
        train_steps(Path(folder))
    else:
        lose_each_other(Path(folder), *ports)


if __name__ == "__main__":
    main(*sys.argv[1:])
