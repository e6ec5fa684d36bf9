"""Gradients of a planned step against loops that are written out, and what a step counts and shares."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.data import Data
from nas.distributed import Workers
from nas.regularize import FeatureTap
from nas.strategies import Pass, Step
from nas.supernet import Supernet
from nas.train_settings import TrainSettings
from nas.train_step import Batch, StepRunner, fastest_arithmetic
from search_spaces import Architecture
from tests.nas.training import SPACES, corners

module = importlib.import_module("nas.train_step")

ALONE = Workers(0, 1, torch.device("cpu"))
SPACE = SPACES["elastic"]
DATA = corners()
LARGE, SMALL = SPACE.largest, SPACE.smallest
OTHERS = [
    SPACE.build(dict(architecture.values) | {"stage1.depth": depth})
    for architecture, depth in (
        (SPACE.undeployed(SPACE.sample(np.random.default_rng(1))), 1),
        (SPACE.undeployed(SPACE.sample(np.random.default_rng(2))), 2),
        (SPACE.undeployed(SPACE.sample(np.random.default_rng(3))), 2),
    )
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomized(seed: int = 0) -> Supernet:
    """Weights and norms as in the middle of a training."""
    supernet = Supernet(SPACE, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in supernet.parameters():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return supernet


def runner(supernet: Supernet | None = None, data: Data = DATA, seed: int = 0, **options: Any) -> StepRunner:
    settings = TrainSettings(arithmetic="fp32", **options)
    return StepRunner(randomized() if supernet is None else supernet, data, settings, seed, ALONE)


def batches(*sizes: int) -> list[Batch]:
    pixels, labels = next(DATA["train"].batches(10**6))
    starts = np.cumsum([0, *sizes])
    return [Batch(pixels[a:b], labels[a:b], int(b - a)) for a, b in itertools.pairwise(starts)]


def gradients_of(module_: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module_.named_parameters()}


def assert_gradients(found: Supernet, expected: Supernet) -> None:
    other = gradients_of(expected)
    for name, gradient in gradients_of(found).items():
        wanted = other[name]
        assert (gradient is None) == (wanted is None), name
        if gradient is not None and wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


class Plain:
    """The same supernet, and losses written out; `prepare` of the data does scaling and resizing."""

    def __init__(self) -> None:
        self.supernet = randomized().train()

    def logits(self, architecture: Architecture, batch: Batch) -> Tensor:
        x = DATA.prepare(batch.pixels, int(architecture["resolution"]))
        logits: Tensor = self.supernet(x, architecture)
        return logits

    @staticmethod
    def labels(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
        """Losses of the images."""
        target = F.one_hot(batch.labels, 4) * (1 - smoothing) + smoothing / 4
        return -(target * torch.log_softmax(logits, 1)).sum(1)

    @staticmethod
    def soft(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        p = torch.softmax(teacher.detach() / temperature, 1)
        return -(temperature**2) * (p * torch.log_softmax(logits / temperature, 1)).sum(1).mean()


def test_a_sandwich_of_two_micro_batches() -> None:
    held = runner(label_smoothing=0.2, temperature=2.0, micro_batches=2)
    parts = batches(20, 13)
    passes = tuple(
        one
        for part in (0, 1)
        for one in (
            Pass((LARGE,), part, 0.5),
            Pass((SMALL,), part, 0.5, "largest", labels=0.0),
            Pass((OTHERS[part],), part, 0.125, "largest", labels=0.0),
            Pass((OTHERS[2],), part, 0.5, "largest", labels=0.25),
        )
    )
    loss = held.gradients(Step(passes, 1.0), 3, 10, 0, parts)

    plain, total = Plain(), 0.0
    for part, batch in enumerate(parts):
        teacher = plain.logits(LARGE, batch)
        losses = [0.5 * plain.labels(teacher, batch, 0.2).mean()]
        losses.append(0.5 * plain.soft(plain.logits(SMALL, batch), teacher, 2.0))
        losses.append(0.125 * plain.soft(plain.logits(OTHERS[part], batch), teacher, 2.0))
        both = plain.logits(OTHERS[2], batch)
        losses.append(0.5 * (plain.soft(both, teacher, 2.0) + 0.25 * plain.labels(both, batch, 0.2).mean()))
        for one in losses:
            one.backward()
            total += float(one.detach())
    assert_gradients(held.supernet, plain.supernet)
    assert loss == pytest.approx(total, rel=1e-5)
    for a, b in zip(held.supernet.buffers(), plain.supernet.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the running statistics, too


def test_a_pass_reaches_no_parameter_that_it_does_not_use() -> None:
    held = runner()
    held.gradients(Step((Pass((SMALL,)),), 1.0), 0, 10, 0, batches(16))
    gradients = gradients_of(held.supernet)
    missing = {name for name, gradient in gradients.items() if gradient is None}
    assert missing and all("block1" in name for name in missing)  # one block deep


def test_gradients_add_up_to_those_that_are_there() -> None:
    held, batch = runner(), batches(16)
    held.gradients(Step((Pass((LARGE,)),), 1.0), 0, 10, 0, batch)
    once = gradients_of(held.supernet)
    held.gradients(Step((Pass((LARGE,), weight=2.0),), 1.0), 0, 10, 0, batch)
    for name, gradient in gradients_of(held.supernet).items():
        before = once[name]
        assert gradient is not None and before is not None
        torch.testing.assert_close(gradient, 3 * before, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("highest", [False, True])
def test_of_several_candidates_the_one_with_the_lowest_or_highest_loss(highest: bool) -> None:
    held, (batch,) = runner(), batches(24)
    candidates = (*OTHERS, SMALL)
    passes = (Pass((LARGE,)), Pass(candidates, 0, 1.0, "largest", labels=0.0, highest=highest))
    held.gradients(Step(passes, 1.0), 0, 10, 0, [batch])
    plain = Plain()
    teacher = plain.logits(LARGE, batch)
    plain.labels(teacher, batch, 0.1).mean().backward()
    losses = {a: plain.soft(plain.logits(a, batch), teacher) for a in candidates}
    assert len({round(loss.item(), 4) for loss in losses.values()}) == 4
    chosen = (max if highest else min)(candidates, key=lambda a: losses[a].item())
    losses[chosen].backward()
    assert_gradients(held.supernet, plain.supernet)
    forward = sum(SPACE.lower(a).macs for a in candidates)
    assert held.macs == 24 * (3 * SPACE.lower(LARGE).macs + forward + 3 * SPACE.lower(chosen).macs)


def test_class_weights() -> None:
    held, (batch,) = runner(class_weights={"1": 5.0, "3": 0.5}, label_smoothing=0.0), batches(21)
    loss = held.gradients(Step((Pass((LARGE,)),), 1.0), 0, 10, 0, [batch])
    plain = Plain()
    weights = torch.tensor([1.0, 5.0, 1.0, 0.5])[batch.labels]
    expected = (plain.labels(plain.logits(LARGE, batch), batch, 0.0) * weights).sum() / weights.sum()
    expected.backward()
    assert_gradients(held.supernet, plain.supernet)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_frozen_teacher() -> None:
    held, (batch,) = runner(), batches(18)
    plain = Plain()
    with torch.no_grad():
        teacher = plain.logits(LARGE, batch)
    held.freeze_teacher()
    with torch.no_grad():
        for supernet in (held.supernet, plain.supernet):
            for tensor in supernet.parameters():
                tensor.mul_(1.5)  # what it learns later is not its teacher's
    passes = (Pass((SMALL,), teacher="frozen"), Pass((LARGE,), teacher="frozen", weight=0.5))
    held.gradients(Step(passes, 1.0), 0, 10, 0, [batch])
    for architecture, weight in ((SMALL, 1.0), (LARGE, 0.5)):
        logits = plain.logits(architecture, batch)
        (weight * (plain.soft(logits, teacher) + plain.labels(logits, batch, 0.1).mean())).backward()
    assert_gradients(held.supernet, plain.supernet)
    macs = {a: SPACE.lower(a).macs for a in (SMALL, LARGE)}
    assert held.macs == 18 * (3 * macs[SMALL] + 3 * macs[LARGE] + macs[LARGE])  # the teacher sees the images once
    assert held.teacher is not None and held.teacher.training
    assert all(p.grad is None for p in held.teacher.parameters())


def test_the_largest_as_a_student_does_not_replace_its_teacher() -> None:
    """With drop path the two differ, and the students after it are taught by the first."""
    held, (batch,) = runner(drop_path=0.9), batches(16)
    taught = []
    real = held._distil

    def spy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        taught.append((student.detach().clone(), teacher.detach().clone()))
        return real(student, teacher, temperature)

    held._distil = spy
    others = [Pass((a,), teacher="largest", labels=0.0, regularized=False) for a in (LARGE, SMALL)]
    held.gradients(Step((Pass((LARGE,)), *others), 1.0), 9, 10, 0, [batch])
    (large, first), (_, second) = taught
    assert torch.equal(first, second) and not torch.allclose(large, first)


def test_macs_of_micro_batches() -> None:
    held = runner()
    held.gradients(Step((Pass((LARGE,), 0), Pass((SMALL,), 1), Pass((SMALL,), 0)), 1.0), 0, 10, 0, batches(10, 7))
    large, small = SPACE.lower(LARGE).macs, SPACE.lower(SMALL).macs
    assert held.macs == 3 * (10 * large + 7 * small + 10 * small)
    held.gradients(Step((Pass((SMALL,)),), 1.0), 1, 10, 0, batches(5))
    assert held.macs == 3 * (10 * large + 17 * small) + 15 * small


# what the passes of a micro-batch share ------------------------------------------------------------------


class Spy(Supernet):
    seen: list[tuple[Architecture, Tensor]]

    def forward(self, x: Tensor, architecture: Architecture, **options: Any) -> Tensor:
        self.seen.append((architecture, x.clone()))
        return super().forward(x, architecture, **options)


def spied(seed: int, number: int, attempt: int, parts: list[Batch], passes: tuple[Pass, ...]) -> list[Tensor]:
    supernet = Spy(SPACE)
    supernet.seen = []
    runner(supernet, seed=seed, flip=True, crop_padding=2).gradients(Step(passes, 1.0), number, 10, attempt, parts)
    return [x for _, x in supernet.seen]


def test_passes_over_a_micro_batch_see_the_same_augmented_images() -> None:
    parts = batches(16, 16)
    parts[1] = parts[0]  # the same images, augmented each time anew
    passes = (Pass((SMALL,), 0), Pass((SMALL,), 0), Pass((SMALL,), 1))
    first, again, other = spied(0, 0, 0, parts, passes)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, DATA.prepare(parts[0].pixels, 8))
    assert torch.equal(spied(0, 0, 0, parts, passes)[2], other)
    for seed, number, attempt in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2)):
        assert not torch.equal(spied(seed, number, attempt, parts, passes)[0], first)


def test_an_image_is_resized_after_it_is_augmented() -> None:
    passes = (Pass((SMALL,)), Pass((LARGE,)))
    small, large = spied(0, 0, 0, batches(16), passes)
    assert small.shape[-1] == 8 and large.shape[-1] == 10
    resized = F.interpolate(small, size=(10, 10), mode="bilinear", align_corners=False)
    assert float((resized - large).abs().mean()) < 0.2 * float(large.std())  # the same crop, the same side


@pytest.mark.parametrize("arithmetic", ["fp32", "fp32_channels_last"])
def test_images_arrive_in_the_format_of_the_arithmetic(arithmetic: str) -> None:
    """Random crops are made of gathered pixels, whose memory is channels last whatever was asked for."""
    formats = set()
    supernet = Supernet(SPACE)
    held = runner(supernet, crop_padding=1)
    held.arithmetic = arithmetic
    real = supernet.forward

    def forward(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        formats.add(x.is_contiguous(memory_format=torch.channels_last))
        return real(x, *arguments, **options)

    supernet.forward = forward  # type: ignore[method-assign]
    three = [Batch(part.pixels.repeat(1, 3, 1, 1), *part[1:]) for part in batches(8)]
    with pytest.raises(ValueError, match="expected images of shape"):
        held.gradients(Step((Pass((SMALL,)),), 1.0), 0, 10, 0, three)
    assert formats == {arithmetic != "fp32"}


# regularization ------------------------------------------------------------------------------------------


def test_drop_path_grows_and_spares_passes_that_are_not_regularized() -> None:
    deep = SPACE.build({**LARGE.values, "resolution": 8})

    def found(number: int, regularized: bool, drop_path: float) -> dict[str, Tensor | None]:
        held = runner(drop_path=drop_path)
        held.gradients(Step((Pass((deep,), regularized=regularized),), 1.0), number, 10, 0, batches(16))
        return gradients_of(held.supernet)

    def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
        return all(
            torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True) if x is not None and y is not None
        )

    plain = found(9, True, 0.0)
    assert same(found(9, False, 0.9), plain) and same(found(0, True, 0.9), plain)
    assert not same(found(9, True, 0.9), plain)
    assert same(found(9, True, 0.9), found(9, True, 0.9))


def test_bias_loss_weighs_images_and_remembers_the_lowest_variance() -> None:
    held, (first, second) = runner(bias_loss=True, label_smoothing=0.0), batches(16, 16)
    plain, lowest = Plain(), math.inf
    for number, batch in enumerate((first, second)):
        for supernet in (held.supernet, plain.supernet):
            supernet.zero_grad()
        held.gradients(Step((Pass((LARGE,)),), 1.0), number, 10, 0, [batch])
        tap = FeatureTap(plain.supernet.network(LARGE))
        logits = plain.supernet(DATA.prepare(batch.pixels, 10), LARGE, tap=tap)
        variances = tap.features.flatten(1).var(dim=1, correction=0)
        lowest = min(lowest, float(variances.min()))
        scaled = (variances - lowest) / (variances.max() - variances.min())
        weights = torch.exp(0.3 * scaled) - 1 + 0.3
        (plain.labels(logits, batch, 0.0) * weights).mean().backward()
        assert_gradients(held.supernet, plain.supernet)
        assert held.lowest_variance == pytest.approx(lowest)


def test_gradient_noise_is_added_once_a_step() -> None:
    def found(eta: float, number: int, attempt: int = 0) -> Tensor:
        held = runner(gradient_noise=eta)
        held.gradients(Step((Pass((LARGE,)), Pass((SMALL,))), 1.0), number, 10, attempt, batches(16))
        return torch.cat([p.grad.flatten() for p in held.supernet.parameters() if p.grad is not None])

    noise = found(0.3, 4) - found(0.0, 4)
    assert float(noise.std()) == pytest.approx(math.sqrt(0.3 / 5**0.55), rel=0.05)
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert torch.equal(found(0.3, 4), found(0.3, 4))
    assert not torch.allclose(found(0.3, 4), found(0.3, 4, attempt=1))


@pytest.mark.parametrize("segments", [2, 5])
def test_checkpointing_changes_no_gradient(segments: int) -> None:
    passes = (Pass((LARGE,)), Pass((SMALL,), teacher="largest", labels=0.0))
    held, other = (
        runner(drop_path=0.5, bias_loss=True),
        runner(drop_path=0.5, bias_loss=True, checkpoint_segments=segments),
    )
    losses = [one.gradients(Step(passes, 1.0), 5, 10, 0, batches(16)) for one in (held, other)]
    assert losses[0] == losses[1] and held.macs == other.macs
    for a, b in zip(gradients_of(held.supernet).values(), gradients_of(other.supernet).values(), strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


# what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_returned(poison: float) -> None:
    held = runner()
    passes = (Pass((LARGE,)), Pass((SMALL,), weight=poison))
    assert not math.isfinite(held.gradients(Step(passes, 1.0), 0, 10, 0, batches(16)))


def test_teachers_that_are_not_there() -> None:
    held, parts = runner(), batches(8, 8)
    for passes in (
        (Pass((SMALL,), teacher="largest"),),
        (Pass((LARGE,), teacher="largest"),),  # not its own teacher
        (Pass((LARGE,), 0), Pass((SMALL,), 1, teacher="largest")),  # of other images
    ):
        with pytest.raises(RuntimeError, match="in-place distillation before the pass over the largest"):
            held.gradients(Step(passes, 1.0), 0, 10, 0, parts)
    for teacher in ("frozen", "nobody"):
        with pytest.raises(RuntimeError, match=f"planned the teacher '{teacher}', which there is not"):
            held.gradients(Step((Pass((SMALL,), teacher=teacher),), 1.0), 0, 10, 0, parts)


# arithmetic and compilation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"fp32": 1.0, "fp32_channels_last": 0.95, "bf16_channels_last": 3.0}, "fp32"),  # not 10 % faster
        ({"fp32": 1.0, "fp32_channels_last": 0.8, "bf16_channels_last": 0.85}, "fp32_channels_last"),
        ({"fp32": 1.0, "fp32_channels_last": 0.8, "bf16_channels_last": 0.5}, "bf16_channels_last"),
        ({"fp32": 1.0, "fp32_channels_last": 0.8, "bf16_channels_last": 40.0}, "fp32_channels_last"),
    ],
)
def test_the_fastest_arithmetic(seconds: dict[str, float], best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    ran: list[str] = []

    def gradients(held: StepRunner, *_: Any) -> float:
        slow = 1.0 if held.arithmetic in ran else 5.0 if ran else 15.0  # when everything is cold
        ran.append(held.arithmetic)
        clock[0] += slow * seconds[held.arithmetic]
        return 0.0

    monkeypatch.setattr(StepRunner, "gradients", gradients)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    assert fastest_arithmetic(runner(), Step((Pass((LARGE,)),), 1.0), batches(8)[0]) == best
    assert ran.count("bf16_channels_last") == (1 if seconds["bf16_channels_last"] > 12 else 4)


def test_timing_arithmetics_changes_nothing() -> None:
    held = runner(mixup=0.0)
    before = held.supernet.digest()
    plan = Step((Pass((LARGE,)), Pass((SMALL, OTHERS[0]), teacher="largest", labels=0.0)), 1.0, ("sort_channels",))
    assert fastest_arithmetic(held, plan, batches(16)[0]) in module.ARITHMETICS
    assert held.supernet.digest() == before and held.macs == 0
    assert all(p.grad is None for p in held.supernet.parameters())


def test_the_largest_and_the_smallest_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []

    def compile_(network: torch.nn.Module, **_: Any) -> Callable[[Tensor], Tensor]:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    architectures = [*(SPACE.sample(np.random.default_rng(i)) for i in range(5)), SPACE.largest, SPACE.smallest]
    held, other = runner(compile=True), runner()
    passes = tuple(Pass((architecture,)) for architecture in architectures)
    for one in (held, other):
        one.gradients(Step(passes + passes, 1.0), 0, 10, 0, batches(8))
    assert len(compiled) == 2
    assert_gradients(held.supernet, other.supernet)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler of torch meets its own
def test_a_compiled_network_has_the_gradients_of_one_that_is_not() -> None:
    held, other = runner(compile=True), runner()
    for one in (held, other):
        one.gradients(Step((Pass((SPACE.largest,)), Pass((SPACE.largest,))), 1.0), 0, 10, 0, batches(8))
    assert_gradients(held.supernet, other.supernet)
