"""Random patch stages, for the tests of what they cost and of what they compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from search_spaces import INPUT, Layer, Network
from search_spaces import layers as L
from search_spaces.layers import Port, port


def random_stage(rng: np.random.Generator, *, height: int, width: int, patches: int) -> Network:
    """Convolutions, depthwise ones, max pools and residuals in random order, with a layer after them."""
    made: list[Layer] = []
    tensor = Port(INPUT, (2, height, width))
    for index in range(int(rng.integers(2, 6))):
        kernel, stride = int(rng.choice([1, 3, 5])), int(rng.integers(1, 3))
        stride = min(stride, kernel)
        padding = str(rng.choice(["symmetric", "same"]))
        what = str(rng.choice(["conv", "depthwise", "pool", "residual"]))
        name, channels = f"layer{index}", tensor.shape[0]
        if min(tensor.shape[1:]) < 2 * patches or what == "residual":
            shortcut = tensor
            if rng.random() < 0.5:  # made before the branch that sees more of the map
                made.append(L.conv2d(f"{name}.shortcut", tensor, channels))
                shortcut = port(made[-1])
            made.append(L.conv2d(f"{name}.conv", tensor, channels, kernel=3, padding=padding))
            made.append(L.add(name, port(made[-1]), shortcut))
        elif what == "pool":
            made.append(L.max_pool(name, tensor, kernel=3, stride=stride))
        else:
            groups = channels if what == "depthwise" else 1
            width_out = channels if what == "depthwise" else channels + 1
            made.append(L.conv2d(name, tensor, width_out, kernel=kernel, stride=stride, groups=groups, padding=padding))
        tensor = port(made[-1])
    stage = tuple(replace(layer, patches=patches) for layer in made)
    return Network((2, height, width), (*stage, L.global_average_pool("after", tensor)))
