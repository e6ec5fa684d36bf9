"""What a training step minimizes: labels, distillation from a teacher, and weights of classes and images.

Logits are (images, classes). Every loss is one number, differentiable in the (student's) logits only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_RATIO = 5.0  # of student to teacher probability that alpha = -1 still counts (arXiv 2102.07954)
BIAS_ALPHA = BIAS_BETA = 0.3  # of the Bias loss (arXiv 2107.11170)
LARGEST_BIAS = 5.0  # of the scaled variance; ours, it only binds where all images of a batch are nearly alike


def label_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    image_weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy with the labels: sum_i c_i w_i l_i / sum_i c_i, over the images i of the batch.

    l_i is the cross-entropy of image i. Without class weights every c_i is 1, without image weights every w_i: the
    image weights scale the loss of an image, the class weights average it. For hard targets without smoothing, class
    weights do exactly what they do in `torch.nn.functional.cross_entropy`; with smoothing, torch weighs the smoothed
    target, this the class that the image is of.

    Args:
        logits: (n, classes).
        targets: class numbers, int64 (n,), or shares of the classes, floating (n, classes) (of mixup and cutmix).
        smoothing: share of the target that is spread evenly over all classes (arXiv 1512.00567).
        class_weights: (classes,), each more than 0: what a miss of each class costs. Those of an image are
            c_i = sum_c t_ic class_weights_c, t being the target before smoothing.
        image_weights: (n,), 0 or more, such as those of `bias_weights`.

    Raises ValueError for weights of another length.
    """
    losses = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    if image_weights is not None:
        _check_length("image_weights", image_weights, len(logits))
        losses = losses * image_weights
    if class_weights is None:
        return losses.mean()
    _check_length("class_weights", class_weights, logits.shape[1])
    counted = counts(targets, class_weights)
    return (losses * counted).sum() / counted.sum()


def counts(targets: Tensor, class_weights: Tensor) -> Tensor:
    """What each image counts in a class-weighted mean, (n,): the weight of its class, or of its share of each."""
    return targets @ class_weights if targets.is_floating_point() else class_weights[targets]


def _check_length(name: str, weights: Tensor, expected: int) -> None:
    if tuple(weights.shape) != (expected,):
        raise ValueError(f"{name} of shape {tuple(weights.shape)}; expected ({expected},), one weight for each")


# distillation ------------------------------------------------------------------------------------------


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log q of the student, log p of the teacher (detached), each (n, classes)."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)}, teacher {tuple(teacher.shape)}; expected equal shapes"
        )
    log_p = F.log_softmax(teacher.detach() / temperature, dim=1)
    return F.log_softmax(student / temperature, dim=1), log_p


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy with the teacher's probabilities p: -T^2 mean_i sum_c p_ic log q_ic (arXiv 1503.02531).

    Its gradient is that of `kl`; its value also holds the teacher's entropy.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return -(temperature**2) * (log_p.exp() * log_q).sum(dim=1).mean()


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the student q to the teacher p: T^2 mean_i sum_c p_ic log(p_ic / q_ic)."""
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def alpha_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The larger, for each image, of two alpha-divergences of teacher p and student q (arXiv 2102.07954).

        D_alpha(p, q) = sum_c q_c ((p_c / q_c)^alpha - 1) / (alpha (alpha - 1))

    alpha = 1 (the limit: KL) punishes a student that misses what the teacher believes, alpha = -1 one that believes
    what the teacher does not. The differential in q is dD_alpha = -sum_c q_c rho_c dlog q_c with
    rho = (p / q)^alpha / alpha, up to a constant, which changes nothing since sum_c q_c dlog q_c = 0; the paper's
    constant is 1 / (alpha (alpha - 1)). For alpha = -1 that is rho = 1/2 - q / p, unbounded where the teacher is
    sure; there q / p counts for at most 5, in rho, in the value and in the choice of alpha. So the gradient is that
    of the divergence wherever nothing was clipped, and bounded everywhere.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    q, p, held = log_q.detach().exp(), log_p.exp(), log_q.detach()
    inverse = (held - log_p).clamp(max=math.log(LARGEST_RATIO)).exp()  # clipped before exp, which may overflow
    plus, minus = (p * (log_p - held)).sum(dim=1), 0.5 * (q * (inverse - 1.0)).sum(dim=1)
    q_rho = torch.where((plus >= minus).unsqueeze(1), p, q * (0.5 - inverse))
    slope = -(q_rho * log_q).sum(dim=1)  # only its gradient is wanted: the value is the divergence itself
    return temperature**2 * (torch.maximum(plus, minus) + slope - slope.detach()).mean()


DISTILLATIONS: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "soft_cross_entropy": soft_cross_entropy,
    "kl": kl,
    "alpha_divergence": alpha_divergence,
}
"""(student logits, teacher logits, temperature) -> loss, by name.

Each is a mean over the batch times temperature squared, so that its gradient keeps its size as the temperature
changes; none sends a gradient to the teacher. Raises ValueError for logits of different shapes.
"""


# image weights -----------------------------------------------------------------------------------------


def bias_weights(
    features: Tensor, lowest: float | Tensor, *, alpha: float = BIAS_ALPHA, beta: float = BIAS_BETA
) -> tuple[Tensor, Tensor]:
    """Weights of the images of a batch by the variance of their features (Bias loss, arXiv 2107.11170).

        weight_i = exp(beta v_i) - 1 + alpha,    v_i = (variance_i - lowest) / (largest - smallest variance here)

    `lowest` is the lowest variance ever seen, this batch included. v_i is at most 5: the divisor is never below a
    fifth of (largest - lowest), and v_i = 0 where that is 0 too, so alike images cannot make weights explode.

    Args:
        features: (n, ...), the last map of the network for each image; no gradient flows into it.
        lowest: what the call before returned second; infinity for the first.

    Returns the weights, float32 (n,), for `label_loss(image_weights=)`, and the new lowest variance, a scalar, which
    stays as it was where the features are not finite.
    """
    variance = features.detach().flatten(1).float().var(dim=1, correction=0)
    smallest, largest = variance.min(), variance.max()
    lowest = torch.fmin(smallest, torch.as_tensor(lowest, dtype=variance.dtype, device=variance.device))
    spread = torch.maximum(largest - smallest, (largest - lowest) / LARGEST_BIAS)
    scaled = (variance - lowest) / torch.where(spread == 0, 1.0, spread)
    return torch.expm1(beta * scaled) + alpha, lowest
