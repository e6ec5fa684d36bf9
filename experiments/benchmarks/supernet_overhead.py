"""What a supernet costs beside the networks in it: the time of a training step, and of an extraction.

    python experiments/benchmarks/supernet_overhead.py [--rounds 20] [--out FILE.json]

Steps: the supernet at an architecture against the same network extracted, on the same images, turn by turn, the
first of a turn alternating. `pass` is forward, cross-entropy and backward; `step_NAME` is that and the SGD update
(Nesterov momentum, weight decay) by one of torch's implementations. The supernet's update covers the whole shared
tensors of the layers that ran, the subnet's only its slices; a layer that did not run has no gradient and costs
nothing. A ratio is the median over the rounds of supernet time / subnet time; the target is 1.05 in the median over
the architectures.

Extraction: different 20-block networks of a space like that of once-for-all (arXiv 1908.09791), each for the first
time (the architecture is lowered, too) and again. The target is a median of 10 ms.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import about, finish, out_option, recipe_space
from torch import Tensor, nn

from nas.sampling import sample_spread
from nas.supernet import Supernet
from search_spaces import Architecture, MobileNet, SearchSpace

UPDATES: Mapping[str, Mapping[str, bool]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
WARM_UP = 2  # rounds that do not count: they allocate gradients and momentum


def cifar_space() -> SearchSpace:
    """That of experiments/cifar10.yaml, in fp32: precisions do not change a training step."""
    return recipe_space("cifar10", precisions=["fp32"])


def twenty_block_space() -> SearchSpace:
    """Five stages of up to four blocks, with the kernels, expansions and widths of MobileNetV3-Large."""
    return MobileNet(
        resolutions=(224,),
        classes=1000,
        widths=(24, 40, 80, 112, 160),
        width_multipliers=(1.0,),
        depths=(2, 3, 4),
        kernels=(3, 5, 7),
        expansions=(3, 4, 6),
        head_width=960,
        nonlinearity="hardswish",
        precisions=("fp32",),
    )


class _Trained:
    """A network in training: times its passes, and its updates by each implementation, on the same gradients."""

    def __init__(self, module: nn.Module, logits: Callable[[], Tensor], labels: Tensor) -> None:
        self.module, self._logits, self._labels = module, logits, labels
        self._optimizers = {
            name: torch.optim.SGD(
                module.parameters(), lr=1e-5, momentum=0.9, nesterov=True, weight_decay=5e-5, **options
            )
            for name, options in UPDATES.items()
        }

    def step(self) -> dict[str, float]:
        """Seconds of each part."""
        self.module.zero_grad(set_to_none=True)
        start = _now()
        F.cross_entropy(self._logits(), self._labels).backward()
        seconds = {"pass": _now() - start}
        for name, optimizer in self._optimizers.items():
            start = _now()
            optimizer.step()
            seconds[name] = _now() - start
        return {"pass": seconds["pass"], **{f"step_{name}": seconds["pass"] + seconds[name] for name in UPDATES}}

    def updated_numbers(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.grad is not None)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare_steps(supernet: Supernet, architecture: Architecture, batch: int, rounds: int, seed: int) -> dict[str, Any]:
    """Times of the subnet, and ratios of the supernet's to them."""
    network = supernet.network(architecture)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *network.input_shape, generator=generator)
    labels = torch.randint(supernet.space.classes, (batch,), generator=generator)
    device = next(supernet.parameters()).device
    x, labels = x.to(device, memory_format=torch.channels_last), labels.to(device)
    subnet = supernet.extract(architecture)
    shared = _Trained(supernet, lambda: supernet(x, architecture), labels)
    alone = _Trained(subnet, lambda: subnet(x), labels)
    pairs = []
    for number in range(WARM_UP + rounds):
        if number % 2:
            of_subnet, of_supernet = alone.step(), shared.step()
        else:
            of_supernet, of_subnet = shared.step(), alone.step()
        pairs.append((of_supernet, of_subnet))
    del pairs[:WARM_UP]
    return {
        "architecture": str(architecture),
        "macs": network.macs,
        "layers": len(network.layers),
        "updated_numbers": {"supernet": shared.updated_numbers(), "subnet": alone.updated_numbers()},
        "subnet_ms": {part: 1e3 * median(own[part] for _, own in pairs) for part in pairs[0][1]},
        "supernet_ms": {part: 1e3 * median(whole[part] for whole, _ in pairs) for part in pairs[0][0]},
        "ratio": {part: median(whole[part] / own[part] for whole, own in pairs) for part in pairs[0][0]},
    }


def measure_steps(space: SearchSpace, count: int, batch: int, rounds: int, seed: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    supernet = Supernet(space, seed).to(device).train()
    architectures = sample_spread(space, count, np.random.default_rng(seed))
    rows = [compare_steps(supernet, architecture, batch, rounds, seed) for architecture in architectures]
    return {
        "device": str(device),
        "batch": batch,
        "rounds": rounds,
        "median_ratio": {part: median(row["ratio"][part] for row in rows) for part in rows[0]["ratio"]},
        "rows": rows,
    }


def measure_extraction(space: SearchSpace, count: int, seed: int) -> dict[str, Any]:
    """Milliseconds to extract `count` different networks of full depth, first and again."""
    supernet = Supernet(space, seed)
    deepest = {choice.name: choice.options[-1] for choice in space.choices if choice.role == "depth"}
    rng = np.random.default_rng(seed)
    drawn = [space.build({**space.sample(rng).values, **deepest}) for _ in range(count)]
    seconds: dict[str, list[float]] = {"first": [], "again": []}
    for times in seconds.values():
        for architecture in drawn:
            start = time.perf_counter()
            supernet.extract(architecture)
            times.append(time.perf_counter() - start)
    networks = [supernet.network(architecture) for architecture in drawn]
    return {
        "networks": count,
        "blocks": sum(layer.is_depthwise for layer in networks[0].layers),
        "params": median(network.params for network in networks),
        **{f"{name}_ms": 1e3 * median(times) for name, times in seconds.items()},
        **{f"{name}_slowest_ms": 1e3 * max(times) for name, times in seconds.items()},
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, default=12, help="compared, spread over MACs")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each network that count")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--extractions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="of the steps; an extraction has one")
    parser.add_argument("--seed", type=int, default=0)
    out_option(parser, "supernet_overhead")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    extraction = measure_extraction(twenty_block_space(), parsed.extractions, parsed.seed)
    torch.set_num_threads(parsed.threads)
    result = {
        **about([parsed.seed]),
        "what": "supernet time / subnet time of a training step, by part; milliseconds to extract 20-block networks",
        "threads": parsed.threads,
        "extraction": extraction,
        "steps": measure_steps(cifar_space(), parsed.architectures, parsed.batch, parsed.rounds, parsed.seed),
    }
    finish(result, parsed.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
