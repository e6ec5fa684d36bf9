"""Which architectures a training step trains: one small interface, one class a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from search_spaces import Architecture, SearchSpace

LARGEST_SET = 160  # SortedNet trained up to 160 sub-models at once (arXiv 2309.00255)


class Strategy(Protocol):
    """Chooses the architectures of each step; the trainer knows no strategy by name."""

    def architectures(self, step: int, micro_batches: int) -> list[Architecture]:
        """One architecture for each micro-batch of step `step`; the same for the same step, always."""


class Sorted:
    """SortedNet (arXiv 2309.00255): uniform draws from a fixed set of nested sub-models.

    The set is a chain that shrinks everything together, a chain that shrinks each role alone (width, depth,
    kernel, ...), and random architectures up to `size`. Precisions do not change weights, so the set ignores them.
    """

    def __init__(self, space: SearchSpace, seed: int, size: int = LARGEST_SET) -> None:
        if not 2 <= size <= LARGEST_SET:
            raise ValueError(f"the sorted set has {size} architectures; expected 2 to {LARGEST_SET}")
        self.set = nested_set(space, size, np.random.default_rng([seed, 1]))
        self._seed = seed

    def architectures(self, step: int, micro_batches: int) -> list[Architecture]:
        rng = np.random.default_rng([self._seed, 2, step])
        return [self.set[int(i)] for i in rng.integers(len(self.set), size=micro_batches)]


def nested_set(space: SearchSpace, size: int, rng: np.random.Generator) -> tuple[Architecture, ...]:
    """Up to `size` distinct architectures: the chains first, then random ones; fewer in a smaller space."""
    found = dict.fromkeys([space.largest, space.smallest])
    roles = [role for role in dict.fromkeys(c.role for c in space.choices) if role != "precision"]
    for shrinking in [roles, *([role] for role in roles)]:
        found |= dict.fromkeys(_chain(space, shrinking))
    stale = 0
    while len(found) < size and stale < 200:
        sampled = space.sample(rng).codes
        fresh = space.from_codes(0 if c.role == "precision" else i for c, i in zip(space.choices, sampled, strict=True))
        stale = stale + 1 if fresh in found else 0
        found[fresh] = None
    return tuple(found)[:size]


def _chain(space: SearchSpace, roles: list[str]) -> list[Architecture]:
    """From the largest down: every choice of these roles at the same fraction of its options."""
    steps = max((len(c.options) for c in space.choices if c.role in roles), default=1)
    chain = []
    for step in range(steps):
        codes = list(space.largest.codes)
        for i, choice in enumerate(space.choices):
            if choice.role in roles:
                codes[i] = round((len(choice.options) - 1) * (1 - step / max(1, steps - 1)))
        chain.append(space.from_codes(codes))
    return chain


STRATEGIES: Mapping[str, type[Sorted]] = {"sorted": Sorted}
