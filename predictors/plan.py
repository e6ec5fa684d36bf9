"""Which networks to measure next: those whose latency the fit is least sure of."""

from __future__ import annotations

import numpy as np

from predictors.regression import RIDGE


def most_uncertain(measured: np.ndarray, candidates: np.ndarray, count: int, ridge: float = RIDGE) -> list[int]:
    """Rows of `candidates` to measure, the least certain first, each chosen as if the ones before had been measured.

    The variance of a ridge regression's prediction at x is x' (M'M + ridge n I)^-1 x times the noise, which needs no
    latency: taking the largest again and again is the greedy D-optimal design (V. V. Fedorov, 1972). What no measured
    network has is the least certain of all.

    Args:
        measured: (n, d) features over latency, so that errors are relative.
        candidates: (m, d) features over predicted latency.
        count: how many; fewer where there are fewer candidates.
    """
    together = np.concatenate([measured, candidates])
    scale = np.sqrt((together**2).mean(axis=0))
    scale[scale == 0] = 1.0
    known, left = measured / scale, candidates / scale
    inverse = np.linalg.inv(known.T @ known + ridge * len(known) * np.eye(known.shape[1]))
    variance = np.einsum("md,de,me->m", left, inverse, left)
    chosen: list[int] = []
    for _ in range(min(count, len(left))):
        best = int(np.argmax(variance))
        chosen.append(best)
        gain = inverse @ left[best]
        inverse -= np.outer(gain, gain) / (1 + left[best] @ gain)  # Sherman and Morrison, 1950
        variance = np.einsum("md,de,me->m", left, inverse, left)
        variance[chosen] = -np.inf
    return chosen
