"""Random architectures that cover a space, from its smallest networks to its largest."""

from __future__ import annotations

import numpy as np

from search_spaces import Architecture, SearchSpace


def sample_spread(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """Up to `count` distinct architectures, spread evenly over log MACs and over shares of each precision.

    Independent uniform choices would all be of middle size: many choices average out. Here each architecture
    draws a size first and its choices around it, and a share of quantized layers, 0 and 1 included.
    """
    pool = dict.fromkeys(_sized(space, rng) for _ in range(6 * count))
    macs = {architecture: space.lower(architecture).macs for architecture in pool}
    ranked = sorted(pool, key=macs.__getitem__)  # equals stay as drawn: by code, fp32 would come before int8
    log_macs = np.log([macs[architecture] for architecture in ranked])
    wanted = np.linspace(log_macs[0], log_macs[-1], count)
    chosen: dict[Architecture, None] = {}
    for target in wanted:
        order = np.argsort(np.abs(log_macs - target), kind="stable")
        fresh = next((ranked[int(i)] for i in order if ranked[int(i)] not in chosen), None)
        if fresh is not None:
            chosen[fresh] = None
    return list(chosen)


def _sized(space: SearchSpace, rng: np.random.Generator) -> Architecture:
    size = rng.uniform(-0.1, 1.1)
    share = float(np.clip(rng.uniform(-0.5, 1.5), 0.0, 1.0))  # a quarter each all-first and all-last precision
    codes = []
    for choice in space.choices:
        last = len(choice.options) - 1
        if choice.role == "precision":
            codes.append(int(rng.integers(1, last + 1)) if last and rng.random() < share else 0)
        else:
            codes.append(round(float(np.clip(size + rng.normal(0.0, 0.25), 0.0, 1.0)) * last))
    return space.from_codes(codes)
