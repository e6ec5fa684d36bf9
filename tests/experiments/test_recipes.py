"""Shipped recipes: what they name exists, and they are what they say."""

from __future__ import annotations

import pytest

from hardware_profiles import load_device
from nas.config import load_experiment, recipe_names
from search_spaces import SearchSpace, build_space


def space_of(recipe: str) -> SearchSpace:
    settings = dict(load_experiment(recipe).space)
    return build_space(str(settings.pop("family")), settings)


@pytest.mark.parametrize("name", recipe_names())
def test_spaces_build_and_devices_are_known(name: str) -> None:
    space = space_of(name)
    assert space.lower(space.smallest).macs < space.lower(space.largest).macs
    for device in load_experiment(name).devices:
        assert load_device(device.name).name == device.name


def test_the_delayed_recipe_has_the_published_sizes() -> None:
    """About 45 and 180 million MACs; kernels of 7 only; three depths for each of five stages, three expansions for each
    of twenty blocks."""
    space = space_of("cifar10_delayed_gpu")
    assert space.lower(space.smallest).macs == pytest.approx(45e6, rel=0.02)
    assert space.lower(space.largest).macs == pytest.approx(180e6, rel=0.02)
    blocks_of_depth = 3**2 + 3**3 + 3**4  # expansions of stages of 2, 3 and 4 blocks
    assert space.size == blocks_of_depth**5
    strides = [layer.stride for layer in space.lower(space.largest).layers if layer.kernel == 7]
    assert strides == [1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
