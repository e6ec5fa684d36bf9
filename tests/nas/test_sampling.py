"""Random architectures that cover a space."""

from __future__ import annotations

import numpy as np
import pytest

from nas.sampling import sample_spread
from search_spaces import CompactTransformer, MobileNet, SearchSpace
from tests.nas import tiny

SPACES = {
    "mobilenet": MobileNet(resolutions=(16, 24, 32)),
    "transformer": CompactTransformer(resolutions=(16,), depths=(1, 2, 4)),
}


@pytest.mark.parametrize("name", SPACES)
def test_samples_are_distinct_and_cover_sizes_and_precisions(name: str) -> None:
    space: SearchSpace = SPACES[name]
    found = sample_spread(space, 60, np.random.default_rng(3))
    assert len(set(found)) == len(found) == 60
    networks = [space.lower(a) for a in found]
    uniform = [space.lower(space.sample(np.random.default_rng(i))) for i in range(60)]
    spans = [max(n.macs for n in group) / min(n.macs for n in group) for group in (networks, uniform)]
    assert spans[0] > 1.1 * spans[1]
    mixtures = [set(n.precisions.values()) for n in networks]
    for precisions in ({"fp32"}, {"int8"}, {"fp32", "int8"}):
        assert mixtures.count(precisions) >= 6


def test_the_same_generator_gives_the_same_samples() -> None:
    space = SPACES["mobilenet"]
    first, second, other = (sample_spread(space, 10, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == second != other


def test_a_small_space_gives_no_more_than_it_has() -> None:
    space = tiny.space(depths=(1,), width_multipliers=(0.5, 1.0), expansions=(1,), precisions=("int8",))
    found = sample_spread(space, 50, np.random.default_rng(0))
    assert 2 <= len(found) <= space.size < 50
    assert len(set(found)) == len(found)
