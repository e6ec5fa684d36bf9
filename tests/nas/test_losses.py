"""Losses against loops, hand-computed numbers, torch's own where it has one, and autograd of definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.losses import DISTILLATIONS, alpha_divergence, bias_weights, kl, label_loss, soft_cross_entropy


def tensor(values: object) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray([[value - math.log(sum(math.exp(v) for v in row)) for value in row] for row in logits])


def oracle(logits: np.ndarray, shares: np.ndarray, smoothing: float, classes: np.ndarray, images: np.ndarray) -> float:
    """The formula of `label_loss`, in loops."""
    total = counted = 0.0
    for row, share, image in zip(log_softmax(logits), shares, images, strict=True):
        smooth = [(1 - smoothing) * t + smoothing / len(share) for t in share]
        weight = sum(t * w for t, w in zip(share, classes, strict=True))
        total += weight * image * -sum(t * value for t, value in zip(smooth, row, strict=True))
        counted += weight
    return total / counted


# labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("by_image", [False, True])
def test_label_loss(rng, smoothing: float, soft: bool, by_class: bool, by_image: bool) -> None:  # type: ignore[no-untyped-def]
    logits = 3 * rng.normal(size=(7, 5))
    labels = np.array([0, 4, 2, 2, 1, 0, 3])
    shares = rng.dirichlet(np.ones(5), size=7) if soft else np.eye(5)[labels]
    classes, images = rng.uniform(0.2, 5.0, 5), rng.uniform(0.0, 2.0, 7)
    got = label_loss(
        tensor(logits),
        tensor(shares) if soft else torch.from_numpy(labels),
        smoothing=smoothing,
        class_weights=tensor(classes) if by_class else None,
        image_weights=tensor(images) if by_image else None,
    )
    expected = oracle(
        logits, shares, smoothing, classes if by_class else np.ones(5), images if by_image else np.ones(7)
    )
    assert got.shape == ()
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_class_weights_are_those_of_torch_for_hard_labels(rng: np.random.Generator) -> None:
    logits, labels = tensor(rng.normal(size=(9, 4))), torch.from_numpy(rng.integers(0, 4, 9))
    weights = tensor(rng.uniform(0.2, 5.0, 4))
    expected = F.cross_entropy(logits, labels, weight=weights)
    torch.testing.assert_close(label_loss(logits, labels, class_weights=weights), expected)
    torch.testing.assert_close(label_loss(logits, labels, class_weights=10 * weights), expected)


def test_a_heavier_class_moves_its_own_images_more(rng: np.random.Generator) -> None:
    logits = tensor(rng.normal(size=(2, 2))).requires_grad_()
    labels = torch.tensor([0, 1])
    label_loss(logits, labels, class_weights=tensor([1.0, 3.0])).backward()
    moved = logits.grad
    assert moved is not None
    (plain,) = torch.autograd.grad(label_loss(logits, labels), logits)
    torch.testing.assert_close(moved, plain * tensor([[0.5], [1.5]]))


def test_weights_of_another_length_are_refused() -> None:
    logits, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"class_weights of shape \(3,\); expected \(2,\)"):
        label_loss(logits, labels, class_weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"image_weights of shape \(1,\); expected \(3,\)"):
        label_loss(logits, labels, image_weights=torch.ones(1))


# distillation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_cross_entropy_and_kl(rng: np.random.Generator, temperature: float) -> None:
    student, teacher = 2 * rng.normal(size=(6, 5)), 2 * rng.normal(size=(6, 5))
    log_q, log_p = log_softmax(student / temperature), log_softmax(teacher / temperature)
    crossed = [-sum(math.exp(p) * q for p, q in zip(*rows, strict=True)) for rows in zip(log_p, log_q, strict=True)]
    entropy = [-sum(math.exp(p) * p for p in row) for row in log_p]
    got = soft_cross_entropy(tensor(student), tensor(teacher), temperature)
    assert float(got) == pytest.approx(temperature**2 * np.mean(crossed), rel=1e-12)
    divergence = kl(tensor(student), tensor(teacher), temperature)
    assert float(divergence) == pytest.approx(temperature**2 * (np.mean(crossed) - np.mean(entropy)), rel=1e-10)


@pytest.mark.parametrize("name", ["soft_cross_entropy", "kl"])
def test_gradients_by_finite_differences(rng: np.random.Generator, name: str) -> None:
    student, teacher = tensor(rng.normal(size=(4, 3))).requires_grad_(), tensor(rng.normal(size=(4, 3)))
    assert torch.autograd.gradcheck(lambda x: DISTILLATIONS[name](x, teacher, 2.5), (student,))


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_no_distillation_moves_the_teacher_or_a_student_that_agrees(rng: np.random.Generator, name: str) -> None:
    teacher = tensor(rng.normal(size=(4, 3))).requires_grad_()
    student = (teacher.detach() + tensor(rng.normal(size=(4, 1)))).requires_grad_()  # logits count up to a constant
    value = DISTILLATIONS[name](student, teacher, 2.0)
    value.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12
    if name != "soft_cross_entropy":
        assert float(value.detach()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_logits_of_different_shapes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected equal shapes"):
        DISTILLATIONS[name](torch.zeros(4, 3), torch.zeros(1, 3), 1.0)


def defined(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """D_alpha(p, q) of each image as it is defined."""
    p, q = teacher.softmax(dim=1), student.softmax(dim=1)
    return (q * ((p / q) ** alpha - 1)).sum(dim=1) / (alpha * (alpha - 1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_alpha_divergence_is_the_definition_where_nothing_is_clipped(
    rng: np.random.Generator, temperature: float
) -> None:
    student = tensor(rng.uniform(-0.4, 0.4, size=(40, 5))).requires_grad_()
    teacher = tensor(rng.uniform(-0.4, 0.4, size=(40, 5)))
    scaled, wanted = student / temperature, teacher / temperature
    assert (scaled.softmax(1) / wanted.softmax(1)).max() < 5
    limit = (wanted.softmax(1) * (wanted.log_softmax(1) - scaled.log_softmax(1))).sum(1)
    torch.testing.assert_close(defined(scaled, wanted, 1 + 1e-6), limit, rtol=1e-4, atol=1e-8)
    divergences = torch.stack([limit, defined(scaled, wanted, -1.0)])
    assert set(divergences.argmax(0).tolist()) == {0, 1}  # both alphas are taken
    expected = temperature**2 * divergences.amax(0).mean()
    got = alpha_divergence(student, teacher, temperature)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(expected, student, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], gradient)


def test_alpha_divergence_clips_what_the_teacher_is_sure_of() -> None:
    """p = (0.99, 0.01), q = (0.5, 0.5): q/p = (0.50505, 50), and 50 counts for 5.

    D_-1 = (0.5 (0.50505 - 1) + 0.5 (5 - 1)) / 2 = 0.876263 is more than KL = 0.99 ln 1.98 + 0.01 ln 0.02 = 0.637146;
    q rho = (0.5 (0.5 - 0.50505), 0.5 (0.5 - 5)) = (-0.0025253, -2.25), and the gradient in the logits is
    q sum(q rho) - q rho = (-1.1237374, 1.1237374).
    """
    student = tensor([[0.0, 0.0]]).requires_grad_()
    value = alpha_divergence(student, tensor([[math.log(0.99), math.log(0.01)]]), 1.0)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.876263, abs=1e-6)
    assert student.grad is not None
    assert student.grad.flatten().tolist() == pytest.approx([-1.1237374, 1.1237374], abs=1e-7)


def test_alpha_divergence_takes_kl_where_the_student_misses_a_class() -> None:
    student = tensor([[0.0, -6.0]]).requires_grad_()
    teacher = tensor([[0.0, 0.0]])
    expected = kl(student, teacher, 1.0)
    got = alpha_divergence(student, teacher, 1.0)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], torch.autograd.grad(expected, student)[0])


def test_alpha_divergence_stays_finite() -> None:
    student = torch.tensor([[0.0, 200.0, 0.0], [300.0, 0.0, 0.0]], requires_grad=True)
    value = alpha_divergence(student, torch.tensor([[300.0, 0.0, 0.0], [300.0, 0.0, 0.0]]), 1.0)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.abs().max() <= 5


# image weights -----------------------------------------------------------------------------------------


def test_bias_weights(rng: np.random.Generator) -> None:
    features = rng.normal(size=(6, 4, 3, 3)) * rng.uniform(0.5, 2.0, size=(6, 1, 1, 1)) + 3.0
    variances = [np.mean((image - image.mean()) ** 2) for image in features]
    for seen, lowest in ((math.inf, min(variances)), (0.1, 0.1), (torch.tensor(0.2), 0.2)):
        weights, kept = bias_weights(tensor(features), seen)
        scaled = [(v - lowest) / (max(variances) - min(variances)) for v in variances]
        assert max(scaled) < 5
        expected = [math.exp(0.3 * v) - 1 + 0.3 for v in scaled]
        assert weights.tolist() == pytest.approx(expected, rel=1e-5)
        assert float(kept) == pytest.approx(lowest, rel=1e-6)


def test_the_least_varied_image_ever_counts_least() -> None:
    features = torch.tensor([[0.0, 2.0], [0.0, 4.0], [0.0, 6.0]])  # variances 1, 4, 9
    weights, lowest = bias_weights(features, math.inf)
    assert weights.tolist() == pytest.approx([0.3, math.exp(0.3 * 3 / 8) - 0.7, math.exp(0.3) - 0.7])
    weights, lowest = bias_weights(features + 1, lowest - 0.5)
    assert float(lowest) == 0.5
    assert weights.tolist() == pytest.approx([math.exp(0.3 * v / 8) - 0.7 for v in (0.5, 3.5, 8.5)])
    weights, _ = bias_weights(features, 1.0, alpha=0.5, beta=2.0)
    assert weights.tolist() == pytest.approx([0.5, math.exp(0.75) - 0.5, math.exp(2.0) - 0.5])


def test_bias_weights_of_images_that_vary_alike_stay_small() -> None:
    alike = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    weights, lowest = bias_weights(alike, math.inf)
    assert weights.tolist() == pytest.approx([0.3, 0.3])
    nearly = torch.tensor([[0.0, 20.0], [0.0, 20.0001]])
    weights, _ = bias_weights(nearly, lowest)
    assert weights.tolist() == pytest.approx([math.exp(1.5) - 0.7] * 2, rel=1e-4)


def test_bias_weights_pass_no_gradient_and_keep_their_state_through_a_collapse() -> None:
    features = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights, lowest = bias_weights(features, math.inf)
    assert not weights.requires_grad
    assert not lowest.requires_grad
    spoilt = features.detach().clone()
    spoilt[1, 2] = math.nan
    weights, kept = bias_weights(spoilt, lowest)
    assert weights.isnan().all()  # so the loss shows it
    assert kept == lowest
