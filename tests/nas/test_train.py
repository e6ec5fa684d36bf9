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
from nas.data import Data, Split, load_data
from nas.distributed import Workers
from nas.evaluate import accuracy, calibration_images, recalibrate
from nas.quantize import quantize
from nas.strategies import STRATEGIES, Pass, Step, Uniform
from nas.supernet import Supernet
from nas.train import load_weights, train
from nas.train_settings import ARITHMETICS, TrainSettings
from search_spaces import CompactTransformer, MobileNet
from tests.nas.training import MOBILENET, Killed, assert_equal, assert_same_runs, corners, kill_at, metrics, timeless

module = importlib.import_module("nas.train")  # the package has a function of that name
step_module = importlib.import_module("nas.train_step")

SPACE = MobileNet(
    resolutions=(8, 10), channels=1, classes=4, widths=(8,), width_multipliers=(0.5, 1), divisor=4, depths=(1, 2),
    kernels=(3, 5), expansions=(1, 2), stem_width=8, head_width=16, precisions=("fp32",),
)  # fmt: skip
QUICK = TrainSettings(epochs=3, batch_size=16, flip=True, crop_padding=1, arithmetic="fp32", strategy="sorted")
EPOCH = len(corners()["train"]) // 16  # steps of it
STEPS = 3 * EPOCH
ALONE = Workers(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over threads may come in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Data:
    return corners()


def run(data: Data, folder: Path | None, settings: TrainSettings = QUICK, seed: int = 0) -> Supernet:
    supernet = Supernet(SPACE, seed=5)
    train(supernet, data, seed=seed, folder=folder, settings=settings)
    return supernet


# learning ------------------------------------------------------------------------------------------------


def test_it_learns_the_corners(tmp_path: Path) -> None:
    data = corners(480, seed=1)
    supernet = Supernet(SPACE)
    results = train(
        supernet, data, epochs=12, batch_size=32, learning_rate=0.2, folder=tmp_path, evaluate_every=5,
        strategy="sorted",
    )  # fmt: skip
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


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_against_a_plain_loop(data: Data, optimizer: str, micro_batches: int) -> None:
    """Two epochs without augmentation, written out: the batches, the gradients, the optimizer."""
    settings = TrainSettings(
        epochs=2, batch_size=24, micro_batches=micro_batches, optimizer=optimizer, learning_rate=0.01, warmup=0.3,
        arithmetic="fp32", weight_decay=0.1, architectures=2, strategy="sorted",
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
    strategy = STRATEGIES["sorted"](SPACE, 3, 2 * steps, settings)
    plain.train()
    for step in range(2 * steps):
        order = np.random.default_rng([3, 3, step // steps]).permutation(len(all_labels))
        made.zero_grad()
        plan = strategy.step(step)
        for part, one in enumerate(plan.passes):
            (architecture,) = one.candidates
            first = 24 * (micro_batches * (step % steps) + part)
            chosen = torch.from_numpy(order[first : first + 24])
            x = data.prepare(all_pixels[chosen], plain.network(architecture).input_shape[1])
            logits = plain(x, architecture)
            if optimizer == "adamw":  # it blows up the rounding errors of gradients that should be zero
                loss = torch.nn.functional.cross_entropy(
                    logits, all_labels[chosen], label_smoothing=0.1, reduction="none"
                ).mean()
            else:
                hard = torch.nn.functional.one_hot(all_labels[chosen], 4)
                loss = -(torch.log_softmax(logits, dim=1) * (0.9 * hard + 0.1 / 4)).sum(1).mean()
            (loss / micro_batches).backward()
        for group in made.param_groups:
            group["lr"] = 0.01 * plan.learning_rate
        made.step()
    for (name, got), expected in zip(supernet.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_an_epoch_shows_every_image_once(data: Data) -> None:
    settings = replace(QUICK, batch_size=5, micro_batches=3, epochs=1)
    trainer = module._Trainer(Supernet(SPACE), data, settings, 0, None, ALONE)
    seen = [pixels for group in trainer._epoch(0) for pixels, *_ in group]
    groups = list(trainer._epoch(1))
    assert len(groups) == trainer.steps_an_epoch and all(len(group) == 3 for group in groups)
    images = [image.numpy().tobytes() for image in torch.cat(seen)]
    assert len(set(images)) == len(images) == len(data["train"]) // 15 * 15
    again = [image.numpy().tobytes() for group in groups for pixels, *_ in group for image in pixels]
    assert images != again


def test_every_step_is_augmented_anew(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(pixels: Any, labels: Any, settings: Any, classes: int, generator: torch.Generator) -> Any:
        assert (settings.flip, settings.crop_padding, classes) == (True, 1, 4)
        seeds.append(generator.initial_seed())
        return pixels, labels

    monkeypatch.setattr(step_module, "augment", spy)
    run(data, None)
    assert len(set(seeds)) == STEPS
    run(data, None)
    assert seeds[STEPS:] == seeds[:STEPS]
    run(data, None, seed=1)
    assert not set(seeds[2 * STEPS :]) & set(seeds[:STEPS])


# strategies, steps and averages --------------------------------------------------------------------------


class Smallest:
    """A strategy of one's own."""

    def step(self, number: int) -> Step:
        return Step((Pass((SPACE.smallest,)),), 1.0 if number < 4 else 0.0)


def test_a_strategy_by_name_or_as_an_object(data: Data) -> None:
    options: dict[str, Any] = {"steps": 5, "batch_size": 16, "arithmetic": "fp32"}
    named, set_ = Supernet(SPACE, seed=5), Supernet(SPACE, seed=5)
    train(named, data, strategy="uniform", **options)
    train(set_, data, settings=TrainSettings(strategy="uniform", **options))
    assert_equal(named, set_)
    own = Supernet(SPACE, seed=5)
    train(own, data, strategy=Smallest(), **options)
    before = Supernet(SPACE, seed=5)
    used = dict(own.named_parameters())
    untouched = {name for name, tensor in before.named_parameters() if torch.equal(used[name], tensor)}
    layers = {layer.name for layer in SPACE.lower(SPACE.smallest).layers}
    assert untouched == {name for name in used if name.split(".")[1].replace("/", ".") not in layers} != set()


@pytest.mark.parametrize("steps", [1, EPOCH - 1, EPOCH, 2 * EPOCH + 1])
def test_a_number_of_steps_instead_of_epochs(data: Data, tmp_path: Path, steps: int) -> None:
    numbers = []

    class Counting(Smallest):
        def step(self, number: int) -> Step:
            numbers.append(number)
            return super().step(number)

    supernet = Supernet(SPACE)
    settings = replace(QUICK, steps=steps, epochs=77)
    results = train(supernet, data, folder=tmp_path, settings=settings, strategy=Counting())
    assert set(numbers) == set(range(steps))
    assert [line["step"] for line in metrics(tmp_path)] == [*range(EPOCH, steps, EPOCH), steps]
    assert [line["epoch"] for line in metrics(tmp_path)] == list(range(1, -(-steps // EPOCH) + 1))
    assert results["macs"] > 0


@pytest.mark.parametrize("decay", [0.5, 0.15])
def test_the_average_against_numpy(data: Data, tmp_path: Path, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first weights as they are, then kept by (1 + n) / (10 + n) of n before, up to the decay."""
    history = []
    real = module._Trainer._train_step

    def remember(trainer: Any, batches: Any) -> float:
        loss: float = real(trainer, batches)
        history.append({name: p.detach().numpy().astype(np.float64) for name, p in trainer.supernet.named_parameters()})
        return loss

    monkeypatch.setattr(module._Trainer, "_train_step", remember)
    supernet = Supernet(SPACE, seed=5)
    train(supernet, data, folder=tmp_path, settings=replace(QUICK, steps=8, average=decay))
    average = history[0]
    for n, weights in enumerate(history[1:], start=1):
        kept = min(decay, (1 + n) / (10 + n))
        average = {name: kept * average[name] + (1 - kept) * weights[name] for name in average}
    for name, parameter in supernet.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), average[name], rtol=1e-5, atol=1e-7, err_msg=name)
    found = checkpoints.load_checkpoint(tmp_path / "supernet")
    assert found is not None
    name = "shared.classifier.weight"
    np.testing.assert_allclose(found[0][f"weights/{name}"].numpy(), history[-1][name], rtol=1e-6)
    loaded = Supernet(SPACE, seed=9)
    load_weights(loaded, found[0])
    assert_equal(loaded, supernet)
    plain = {key: tensor for key, tensor in found[0].items() if not key.startswith("average/")}
    load_weights(loaded, plain)
    np.testing.assert_allclose(loaded.state_dict()[name].numpy(), history[-1][name], rtol=1e-6)


def test_the_average_is_what_is_evaluated(data: Data) -> None:
    supernet = Supernet(SPACE, seed=5)
    results = train(supernet, data, settings=replace(QUICK, average=0.9))
    subnet = supernet.extract(SPACE.largest)
    assert accuracy(recalibrate(subnet, calibration_images(data, subnet)), data, "val_search") == results["largest"]


def test_sorting_channels_sorts_all_that_belongs_to_them(data: Data) -> None:
    """The trained function and where training goes from there stay: sorted at once, or afterwards."""
    settings = replace(QUICK, optimizer="adamw", learning_rate=0.01, average=0.9, steps=6)
    wide = MobileNet(**MOBILENET | {"depths": (2,)})

    class Sorting:
        def __init__(self, at: int) -> None:
            self.at = at

        def step(self, number: int) -> Step:
            return Step((Pass((wide.largest,)),), 1.0, events=("sort_channels",) if number == self.at else ())

    nets = [Supernet(wide, seed=5) for _ in range(2)]
    results = [train(net, data, settings=settings, strategy=Sorting(at)) for net, at in zip(nets, (3, -1), strict=True)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-3)
    x = data.prepare(next(data["val_search"].batches(16))[0], 8)
    assert nets[0].digest() != nets[1].digest()
    with torch.no_grad():
        torch.testing.assert_close(
            nets[0].train()(x, wide.largest), nets[1].train()(x, wide.largest), rtol=1e-2, atol=1e-2
        )


# going on ------------------------------------------------------------------------------------------------

RESUMED = {
    "sgd": QUICK,
    "micro-batches": replace(QUICK, micro_batches=2, batch_size=8),
    "channels last": replace(QUICK, arithmetic="fp32_channels_last"),
    "bf16": replace(QUICK, arithmetic="bf16_channels_last"),
}


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), EPOCH, EPOCH + 2])
@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED.keys())
def test_going_on_gives_the_same_weights_bit_for_bit(
    data: Data, tmp_path: Path, settings: TrainSettings, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all strategies and options see the conformance tests."""
    whole = run(data, tmp_path / "whole", settings)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, step)
        run(data, tmp_path / "killed", settings)
    assert_equal(run(data, tmp_path / "killed", settings), whole)
    assert_same_runs([tmp_path / "whole", tmp_path / "killed"])


def test_going_on_from_before_the_kill(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed steps after the last checkpoint, in the middle of a line of metrics, then again, and once while saving."""
    whole = run(data, tmp_path / "whole")
    folder = tmp_path / "killed"
    for step in (EPOCH + 2, EPOCH + 4):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            kill_at(patched, step)
            patched.setattr(module, "CHECKPOINT_SECONDS", 60.0)
            run(data, folder)
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 10000, "epoch": 9, "loss": 1.0}\n{"step": 18, "lo')
    with monkeypatch.context() as patched, pytest.raises(Killed):

        def killed(*_: object) -> None:
            raise Killed

        patched.setattr(checkpoints, "write_json", killed)
        run(data, folder)
    assert_equal(run(data, folder), whole)
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_killed_before_the_first_checkpoint(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(data, tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):

        def killed(*_: object) -> None:
            raise Killed

        patched.setattr(module, "save_checkpoint", killed)
        run(data, tmp_path / "killed")
    assert (tmp_path / "killed" / "metrics.jsonl").exists()
    assert_equal(run(data, tmp_path / "killed"), whole)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_corrupt_newest_checkpoint_costs_only_its_steps(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(data, tmp_path / "whole")
    folder = tmp_path / "killed"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, EPOCH + 4)
        run(data, folder)
    newest = max((folder / "supernet").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level(logging.INFO):
        assert_equal(run(data, folder), whole)
    assert str(newest) in caplog.text and f"going on from step {EPOCH + 3} of {STEPS}" in caplog.text


def test_a_finished_training_is_not_repeated(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Supernet(SPACE, seed=5)
    results = train(whole, data, folder=tmp_path, settings=QUICK)
    kill_at(monkeypatch, 0)
    again = Supernet(SPACE, seed=9)
    assert timeless(train(again, data, folder=tmp_path, settings=QUICK)) == timeless(results)
    assert_equal(again, whole)


@pytest.mark.parametrize("changed", ["learning_rate", "seed", "data", "space", "strategy"])
def test_another_training_in_the_folder_is_refused(data: Data, tmp_path: Path, changed: str) -> None:
    settings = replace(QUICK, epochs=1)
    run(data, tmp_path, settings)
    space, seed = SPACE, 0
    strategy = None
    if changed == "learning_rate":
        settings = replace(settings, learning_rate=0.2)
    elif changed == "strategy":
        strategy = Uniform(SPACE, seed, 9, settings)
    elif changed == "seed":
        seed = 1
    elif changed == "data":
        data = replace(data, key="another")
    else:
        space = MobileNet(resolutions=(8,), channels=1, classes=4)
    with pytest.raises(ValueError, match=rf"trained with another {changed} \(.* then, .* now\); use another run"):
        train(Supernet(space), data, seed=seed, folder=tmp_path, settings=settings, strategy=strategy)


def test_what_would_fail_later_is_refused_at_once(data: Data) -> None:
    with pytest.raises(ValueError, match=r"train\.class_weights names 'cat'; the classes are 0, 1, 2, 3"):
        train(Supernet(SPACE), data, class_weights={"0": 2.0, "cat": 1.0})


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
    assert "the loss became" in last and "after 3 attempts with lower learning rates" in last
    assert "lower train.learning_rate (now 1e+30)" in last
    assert "last good checkpoint" not in last  # there is none yet


# what is refused --------------------------------------------------------------------------------------------


def test_a_space_that_does_not_fit_the_data(data: Data) -> None:
    with pytest.raises(ValueError, match=r"takes 3 channels, arrays has 1; set space\.channels"):
        train(Supernet(MobileNet(resolutions=(8,), classes=4)), data)
    with pytest.raises(ValueError, match=r"has 10 classes, arrays has 4; set space\.classes"):
        train(Supernet(MobileNet(resolutions=(8,), channels=1)), data)


def test_fewer_images_than_micro_batches(data: Data) -> None:
    with pytest.raises(ValueError, match="training images; expected one or more a micro-batch"):
        train(Supernet(SPACE), data, micro_batches=1000)


def test_settings_and_options_together(data: Data) -> None:
    with pytest.raises(ValueError, match="train got settings and epochs, flip; expected one or the other"):
        train(Supernet(SPACE), data, settings=QUICK, epochs=2, flip=True)
    with pytest.raises(ValueError, match="train got settings and strategy; expected one or the other"):
        train(Supernet(SPACE), data, settings=QUICK, strategy="uniform")
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        train(Supernet(SPACE), data, epoch=2)
    with pytest.raises(ValueError, match=r"train\.strategy = 'best'; expected one of sorted, sandwich"):
        train(Supernet(SPACE), data, strategy="best")


@pytest.mark.parametrize("has", [True, False])
def test_kernel_transforms_that_do_not_fit(data: Data, has: bool) -> None:
    with pytest.raises(ValueError, match=f"train.kernel_transforms is {not has}, .*kernel_transforms={has}; expected"):
        train(Supernet(SPACE, kernel_transforms=has), data, kernel_transforms=not has)


def test_class_weights_of_a_class_that_there_is_not(data: Data) -> None:
    with pytest.raises(ValueError, match=r"train\.class_weights names 'cat'; the classes are 0, 1, 2, 3"):
        train(Supernet(SPACE), data, class_weights={"cat": 2.0})


def test_an_event_that_there_is_not(data: Data) -> None:
    class Odd:
        def step(self, number: int) -> Step:
            return Step((Pass((SPACE.largest,)),), 1.0, events=("dance",))

    with pytest.raises(ValueError, match="planned the event 'dance'; expected freeze_teacher or sort_channels"):
        train(Supernet(SPACE), data, strategy=Odd(), arithmetic="fp32")


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
