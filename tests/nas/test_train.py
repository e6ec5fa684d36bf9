"""Training: that it learns, goes on exactly where it stopped, and stops where it must."""

from __future__ import annotations

import importlib
import json
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nas import checkpoints
from nas.cli import main
from nas.data import Data, Split, from_arrays, load_data
from nas.evaluate import accuracy, calibration_images, recalibrate
from nas.quantize import quantize
from nas.supernet import Supernet
from nas.train import ARITHMETICS, TrainingDiverged, TrainSettings, learning_rate_at, train
from search_spaces import Architecture, CompactTransformer, MobileNet

module = importlib.import_module("nas.train")  # the package has a function of that name

SPACE = MobileNet(
    resolutions=(8, 10), channels=1, classes=4, widths=(8,), width_multipliers=(0.5, 1), divisor=4, depths=(1, 2),
    kernels=(3, 5), expansions=(1, 2), stem_width=8, head_width=16, precisions=("fp32",),
)  # fmt: skip
QUICK = TrainSettings(epochs=3, batch_size=16, flip=True, crop_padding=1, arithmetic="fp32")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over threads may come in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Data:
    """Noise, with one corner brighter: which one is the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 4
    x = rng.integers(0, 120, (240, 8, 8), dtype=np.uint8)
    for image, label in zip(x, labels, strict=True):
        image[4 * (label // 2) :, :][:4, 4 * (label % 2) :][:, :4] += 100
    return from_arrays(x, labels, calibration=64)


class Killed(BaseException):
    """As sudden as a test can be: nothing in the trainer may catch it."""


def kill_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = module._Trainer._train_step

    def until(trainer: Any, batches: Any) -> float:
        if trainer.step == step:
            raise Killed
        return real(trainer, batches)

    monkeypatch.setattr(module._Trainer, "_train_step", until)


def run(data: Data, folder: Path | None, settings: TrainSettings = QUICK, seed: int = 0) -> Supernet:
    supernet = Supernet(SPACE, seed=5)
    train(supernet, data, seed=seed, folder=folder, settings=settings)
    return supernet


def assert_equal(a: Supernet, b: Supernet) -> None:
    other = b.state_dict()
    assert [name for name, tensor in a.state_dict().items() if not torch.equal(tensor, other[name])] == []


# learning ------------------------------------------------------------------------------------------------


def test_it_learns_the_corners(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(480) % 4
    x = rng.integers(0, 120, (480, 8, 8), dtype=np.uint8)
    for image, label in zip(x, labels, strict=True):
        image[4 * (label // 2) :, :][:4, 4 * (label % 2) :][:, :4] += 100
    data = from_arrays(x, labels)
    supernet = Supernet(SPACE)
    results = train(supernet, data, epochs=12, batch_size=32, learning_rate=0.2, folder=tmp_path, evaluate_every=5)
    assert results["largest"] > 0.9 and results["smallest"] > 0.6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [5, 10, 12]
    assert lines[-1] == {"step": lines[-1]["step"], "epoch": 12, **results}
    subnet = supernet.extract(SPACE.largest)
    assert accuracy(recalibrate(subnet, calibration_images(data, subnet)), data, "val_search") == results["largest"]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_every_arithmetic_trains(data: Data, arithmetic: str) -> None:
    settings = replace(QUICK, arithmetic=arithmetic, epochs=1)
    plain, other = run(data, None, replace(settings, arithmetic="fp32")), run(data, None, settings)
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in plain.parameters()))
    pairs = zip(plain.parameters(), other.parameters(), strict=True)
    apart = math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))
    assert apart / norm < (0.1 if arithmetic.startswith("bf16") else 1e-3)
    assert (apart > 0) == arithmetic.startswith("bf16") or arithmetic == "fp32_channels_last"
    assert all(p.dtype == torch.float32 for p in other.parameters())


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_images_arrive_in_the_format_of_the_arithmetic(arithmetic: str, rng: np.random.Generator) -> None:
    """Random crops are made of gathered pixels, whose memory is channels last whatever was asked for."""
    formats = set()

    class Spy(Supernet):
        def forward(self, x: torch.Tensor, architecture: Architecture) -> torch.Tensor:
            if self.training:
                formats.add((x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(x, architecture)

    x = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    settings = replace(QUICK, epochs=1, arithmetic=arithmetic)
    train(Spy(MobileNet(resolutions=(8,), classes=2)), from_arrays(x, np.arange(60) % 2), settings=settings)
    assert formats == {(True, False) if arithmetic == "fp32" else (False, True)}


def test_attention_trains_in_bf16() -> None:
    space = CompactTransformer(resolutions=(8,), classes=10, channels=1, embeddings=(16,), depths=(1,), head_size=8)
    results = train(
        Supernet(space), load_data("digits"), epochs=1, optimizer="adamw", learning_rate=3e-3,
        arithmetic="bf16_channels_last",
    )  # fmt: skip
    assert results["largest"] > 0.2


def test_auto_picks_one_arithmetic_and_keeps_it(data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = replace(QUICK, arithmetic="auto", epochs=1)
    with caplog.at_level(logging.INFO):
        run(data, tmp_path, settings)
        run(data, tmp_path, settings)
    assert caplog.text.count("training in ") == 1
    found = checkpoints.load_checkpoint(tmp_path / "supernet")
    assert found is not None and found[1]["arithmetic"] in ARITHMETICS


# what a step does ----------------------------------------------------------------------------------------


def test_learning_rate_rises_then_follows_a_cosine() -> None:
    settings = TrainSettings(learning_rate=0.8, warmup=0.2)
    rates = [learning_rate_at(step, 100, settings) for step in range(100)]
    np.testing.assert_allclose(rates[:20], 0.8 * np.arange(1, 21) / 20)
    np.testing.assert_allclose(rates[20:], 0.4 * (1 + np.cos(np.pi * np.arange(80) / 80)))
    assert max(rates) == 0.8 and 0 < rates[-1] < 1e-3
    assert learning_rate_at(0, 1, settings) == 0.8


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_against_a_plain_loop(data: Data, optimizer: str, micro_batches: int) -> None:
    """Two epochs without augmentation, written out: the batches, the gradients, the optimizer."""
    settings = TrainSettings(
        epochs=2, batch_size=24, micro_batches=micro_batches, optimizer=optimizer, learning_rate=0.01, warmup=0.3,
        arithmetic="fp32", weight_decay=0.1, architectures=2,
    )  # fmt: skip
    supernet, plain = Supernet(SPACE, seed=5), Supernet(SPACE, seed=5)
    train(supernet, data, seed=3, settings=settings)
    names = [n for n, _ in plain.named_parameters()]
    groups = [
        {"params": [p for n, p in plain.named_parameters() if n.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for n, p in plain.named_parameters() if not n.endswith("weight")], "weight_decay": 0.0},
    ]
    assert 0 < len(groups[0]["params"]) < len(names)
    made: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=1.0)
        if optimizer == "adamw"
        else torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    )
    all_pixels, all_labels = next(data["train"].batches(10**6))
    steps = len(all_labels) // (24 * micro_batches)
    strategy = module.STRATEGIES["sorted"](SPACE, 3, 2)
    plain.train()
    for step in range(2 * steps):
        order = np.random.default_rng([3, 3, step // steps]).permutation(len(all_labels))
        made.zero_grad()
        for part, architecture in enumerate(strategy.architectures(step, micro_batches)):
            first = 24 * (micro_batches * (step % steps) + part)
            chosen = torch.from_numpy(order[first : first + 24])
            x = data.prepare(all_pixels[chosen], plain.network(architecture).input_shape[1])
            logits = plain(x, architecture)
            if optimizer == "adamw":  # it blows up the rounding errors of gradients that should be zero
                loss = torch.nn.functional.cross_entropy(logits, all_labels[chosen], label_smoothing=0.1)
            else:
                hard = torch.nn.functional.one_hot(all_labels[chosen], 4)
                loss = -(torch.log_softmax(logits, dim=1) * (0.9 * hard + 0.1 / 4)).sum(1).mean()
            (loss / micro_batches).backward()
        for group in made.param_groups:
            group["lr"] = learning_rate_at(step, 2 * steps, settings)
        made.step()
    for (name, got), expected in zip(supernet.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_an_epoch_shows_every_image_once(data: Data) -> None:
    settings = replace(QUICK, batch_size=5, micro_batches=3, epochs=1)
    trainer = module._Trainer(Supernet(SPACE), data, settings, 0, None)
    seen = [pixels for group in trainer._epoch(0) for pixels, _ in group]
    groups = list(trainer._epoch(1))
    assert len(groups) == trainer.steps_an_epoch and all(len(group) == 3 for group in groups)
    images = [image.numpy().tobytes() for image in torch.cat(seen)]
    assert len(set(images)) == len(images) == len(data["train"]) // 15 * 15
    again = [image.numpy().tobytes() for group in groups for pixels, _ in group for image in pixels]
    assert images != again


def test_every_step_is_augmented_anew(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(pixels: torch.Tensor, **options: Any) -> torch.Tensor:
        assert (options["flip"], options["crop_padding"]) == (True, 1)
        seeds.append(options["generator"].initial_seed())
        return pixels

    monkeypatch.setattr(module, "augment", spy)
    run(data, None)
    assert len(set(seeds)) == 27
    run(data, None)
    assert seeds[27:] == seeds[:27]
    run(data, None, seed=1)
    assert not set(seeds[54:]) & set(seeds[:27])


# going on ------------------------------------------------------------------------------------------------

RESUMED = {
    "sgd": QUICK,
    "adamw": replace(QUICK, optimizer="adamw", learning_rate=0.003),
    "micro-batches": replace(QUICK, micro_batches=2),
    "channels last": replace(QUICK, arithmetic="fp32_channels_last"),
    "bf16": replace(QUICK, arithmetic="bf16_channels_last"),
}


@pytest.mark.parametrize("step", [1, 4, 9, 13])  # an epoch has 9 steps, or 4
@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED.keys())
def test_going_on_gives_the_same_weights_bit_for_bit(
    data: Data, tmp_path: Path, settings: TrainSettings, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(data, tmp_path / "whole", settings)
    with monkeypatch.context() as patched:
        patched.setattr(module, "CHECKPOINT_SECONDS", -1.0)
        kill_before(patched, step if settings.micro_batches == 1 else step // 2 + 1)
        with pytest.raises(Killed):
            run(data, tmp_path / "killed", settings)
    assert_equal(run(data, tmp_path / "killed", settings), whole)
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    digests = [checkpoints.load_checkpoint(tmp_path / kind / "supernet") for kind in ("whole", "killed")]
    assert digests[0] is not None and digests[1] is not None
    assert all(torch.equal(digests[0][0][name], tensor) for name, tensor in digests[1][0].items())
    assert digests[0][0].keys() == digests[1][0].keys() and digests[0][1] == digests[1][1]


def test_going_on_from_before_the_kill(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed steps after the last checkpoint, in the middle of a line of metrics, then again, and once while saving."""
    whole = run(data, tmp_path / "whole")
    folder = tmp_path / "killed"
    for step in (12, 14):
        with monkeypatch.context() as patched:
            kill_before(patched, step)
            with pytest.raises(Killed):
                run(data, folder)
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 10000, "epoch": 9, "loss": 1.0}\n{"step": 18, "lo')
    with monkeypatch.context() as patched, pytest.raises(Killed):

        def killed(*_: object) -> None:
            raise Killed

        patched.setattr(checkpoints, "write_json", killed)
        run(data, folder)
    assert_equal(run(data, folder), whole)
    assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_killed_before_the_first_checkpoint(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(data, tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):

        def killed(*_: object) -> None:
            raise Killed

        patched.setattr(module, "save_checkpoint", killed)
        run(data, tmp_path / "killed")
    assert (tmp_path / "killed" / "metrics.jsonl").exists()
    assert_equal(run(data, tmp_path / "killed"), whole)
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_a_corrupt_newest_checkpoint_costs_only_its_steps(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(data, tmp_path / "whole")
    folder = tmp_path / "killed"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(module, "CHECKPOINT_SECONDS", -1.0)
        kill_before(patched, 14)
        run(data, folder)
    newest = max((folder / "supernet").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level(logging.INFO):
        assert_equal(run(data, folder), whole)
    assert str(newest) in caplog.text and "going on from step 13 of" in caplog.text


def test_a_finished_training_is_not_repeated(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Supernet(SPACE, seed=5)
    results = train(whole, data, folder=tmp_path, settings=QUICK)
    kill_before(monkeypatch, 0)
    again = Supernet(SPACE, seed=9)
    assert train(again, data, folder=tmp_path, settings=QUICK) == results
    assert_equal(again, whole)


@pytest.mark.parametrize("changed", ["settings", "seed", "data", "space"])
def test_another_training_in_the_folder_is_refused(data: Data, tmp_path: Path, changed: str) -> None:
    settings = replace(QUICK, epochs=1)
    run(data, tmp_path, settings)
    space, seed = SPACE, 0
    if changed == "settings":
        settings = replace(settings, learning_rate=0.2)
    elif changed == "seed":
        seed = 1
    elif changed == "data":
        data = replace(data, key="another")
    else:
        space = MobileNet(resolutions=(8,), channels=1, classes=4)
    with pytest.raises(ValueError, match=f"was trained with another {changed}; use another run directory"):
        train(Supernet(space), data, seed=seed, folder=tmp_path, settings=settings)


# determinism ---------------------------------------------------------------------------------------------


def test_seeds_and_global_random_states(data: Data) -> None:
    settings = replace(QUICK, epochs=1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = run(data, None, settings)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    assert_equal(first, run(data, None, settings))
    torch.set_rng_state(before[0])
    assert run(data, None, settings, seed=1).digest() != first.digest()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() != before[1]  # noqa: NPY002 - ours, above
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    held = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    run(data, None, settings)
    assert held == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


class Forbidden(Split):
    def batches(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a split that training must not read")


def test_training_reads_neither_test_nor_val_front(data: Data) -> None:
    held = dict(data.splits)
    for split in ("test", "val_front"):
        held[split] = Forbidden(held[split].images, held[split].indices, held[split].labels)
    run(replace(data, splits=held), None, replace(QUICK, epochs=1))


# divergence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: float
) -> None:
    real = module._Trainer._loss

    def poisoned(trainer: Any, *arguments: Any) -> torch.Tensor:
        return real(trainer, *arguments) * (poison if trainer.step == 11 else 1.0)

    monkeypatch.setattr(module._Trainer, "_loss", poisoned)
    with pytest.raises(
        TrainingDiverged, match=r"loss became (nan|inf) at step 11 of 27; the last good .*learning_rate"
    ):
        run(data, tmp_path)
    found = checkpoints.load_checkpoint(tmp_path / "supernet")
    assert found is not None and found[1]["step"] == 9
    assert all(tensor.isfinite().all() for tensor in found[0].values())


def test_weights_that_are_not_finite_are_never_saved(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of an epoch spoils them: the loss before it was fine."""
    real = module._Trainer._train_step

    def spoil(trainer: Any, batches: Any) -> float:
        loss = real(trainer, batches)
        if trainer.step == 17:
            with torch.no_grad():
                next(trainer.supernet.parameters()).view(-1)[0] = math.nan
        return loss

    monkeypatch.setattr(module._Trainer, "_train_step", spoil)
    with pytest.raises(
        TrainingDiverged, match=r"weight is not finite at step 18 of 27; the last good checkpoint stays"
    ):
        run(data, tmp_path)
    found = checkpoints.load_checkpoint(tmp_path / "supernet")
    assert found is not None and found[1]["step"] == 9
    with pytest.raises(TrainingDiverged, match=r"not finite at step 18 of 27; lower train\.learning_rate"):
        run(data, None)


def test_divergence_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = {
        "name": "diverges",
        "data": {"path": "digits"},
        "space": {"family": "mobilenet", "resolutions": [8], "widths": [8], "depths": [1]},
        "train": {"epochs": 1, "learning_rate": 1e30, "warmup": 0.0, "arithmetic": "fp32"},
        "search": {"objectives": ["accuracy", "macs"]},
    }
    path = tmp_path / "diverges.yaml"
    path.write_text(yaml.safe_dump(experiment))
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the loss became" in last and "lower train.learning_rate (now 1e+30)" in last
    assert "last good checkpoint" not in last  # there is none yet


# bad settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0), ("batch_size", -1), ("micro_batches", 0), ("learning_rate", 0.0), ("learning_rate", math.nan),
        ("weight_decay", -0.1), ("crop_padding", -1), ("momentum", 1.0), ("label_smoothing", 1.0), ("warmup", 1.5),
        ("warmup", -0.1), ("evaluate_every", 0), ("architectures", 1), ("architectures", 161),
        ("strategy", "none"), ("optimizer", "lion"), ("arithmetic", "fp8"),
    ],
)  # fmt: skip
def test_bad_settings(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"train\.{option} = .*; expected"):
        TrainSettings(**{option: value})  # type: ignore[arg-type]


def test_a_space_that_does_not_fit_the_data(data: Data) -> None:
    with pytest.raises(ValueError, match=r"takes 3 channels, arrays has 1; set space\.channels"):
        train(Supernet(MobileNet(resolutions=(8,), classes=4)), data)
    with pytest.raises(ValueError, match=r"has 10 classes, arrays has 4; set space\.classes"):
        train(Supernet(MobileNet(resolutions=(8,), channels=1)), data)


def test_fewer_images_than_micro_batches(data: Data) -> None:
    with pytest.raises(ValueError, match="training images; expected one or more a micro-batch"):
        train(Supernet(SPACE), data, micro_batches=1000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_chain_on_a_gpu(data: Data, tmp_path: Path) -> None:
    supernet = Supernet(SPACE)
    train(supernet, data, folder=tmp_path, settings=replace(QUICK, epochs=1))
    subnet = supernet.extract(SPACE.largest)
    assert next(subnet.parameters()).is_cuda
    images = [x.cuda() for x in calibration_images(data, subnet)]
    quantized = quantize(recalibrate(subnet, images), images, 127)
    with torch.no_grad():
        torch.testing.assert_close(
            quantized.simulated(images[0]).cpu(), quantized.simulated.cpu()(images[0].cpu()), rtol=0.05, atol=0.05
        )
