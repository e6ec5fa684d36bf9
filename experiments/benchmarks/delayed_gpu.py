"""DepS's CIFAR-10 setting on a GPU: smallest and largest network of a once-for-all supernet, on the test images.

    python experiments/benchmarks/delayed_gpu.py CIFAR10.npz [--epochs 200] [--strategy delayed]

The recipe is experiments/cifar10_delayed_gpu.yaml; the published figures are those of Delayed eps-Shrinking
(arXiv 2407.06167, read off its figure): smallest 94.26 %, largest 95.06 %; once-for-all 92.9 and 95.04; BigNAS 91.2
and 91.8, of networks of about 45 and 180 million MACs trained for 200 epochs. The curve against epochs is on
val_search, the end on the 10,000 test images. A stopped training goes on. Without a GPU the result says "not run".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import about, finish, out_option

from nas import Supernet, accuracy, load_data, load_experiment, recalibrate, train
from nas.evaluate import calibration_images
from nas.train import steps_of
from search_spaces import build_space

RECIPE = "cifar10_delayed_gpu"
PUBLISHED = {
    "delayed": {"smallest": 0.9426, "largest": 0.9506},
    "once-for-all": {"smallest": 0.929, "largest": 0.9504},
    "sandwich (BigNAS)": {"smallest": 0.912, "largest": 0.918},
}
CURVE = ("epoch", "loss", "smallest", "middle", "largest", "seconds")


def measured(data_path: Path, strategy: str, epochs: int, folder: Path) -> dict[str, Any]:
    """Train the recipe for some epochs and evaluate both ends on the test images."""
    experiment = load_experiment(RECIPE, [f"data.path={data_path}"])
    options = dict(vars(experiment.data))
    data = load_data(options.pop("path"), seed=experiment.seed, **options)
    settings: dict[str, Any] = {"channels": data.channels, "classes": len(data.classes), **experiment.space}
    space = build_space(str(settings.pop("family")), settings)
    supernet = Supernet(space, seed=experiment.seed)
    how = replace(experiment.train, strategy=strategy, epochs=epochs)
    results = train(supernet, data, seed=experiment.seed, folder=folder, settings=how)
    supernet.cpu()
    ends = {}
    for name, architecture in (("smallest", space.smallest), ("largest", space.largest)):
        subnet = recalibrate(supernet.extract(architecture), calibration_images(data, supernet.extract(architecture)))
        ends[name] = {"test_accuracy": accuracy(subnet, data, "test", batch_size=500), "macs": subnet.network.macs}
    steps = steps_of(how, len(data["train"]))[1]
    return {
        "strategy": strategy,
        "epochs": epochs,
        "seed": experiment.seed,
        "ends": ends,
        "images_per_s": round(steps * how.images_a_step / results["seconds"], 1),
        "tmacs": results["macs"] / 1e12,
        "curve": curve((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()),
    }


def curve(lines: Sequence[str]) -> list[dict[str, float]]:
    """One entry an evaluation; rollbacks are left out."""
    entries: list[Mapping[str, float]] = [json.loads(line) for line in lines]
    return [{name: entry[name] for name in CURVE} for entry in entries if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="an .npz of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--strategy", default="delayed")
    parser.add_argument("--runs", type=Path, default=Path("runs/delayed_gpu"), help="where checkpoints go")
    out_option(parser, "delayed_gpu")
    asked = parser.parse_args()
    told: dict[str, Any] = {**about([0]), "published": PUBLISHED, "recipe": RECIPE}
    if not torch.cuda.is_available():
        finish({**told, "status": "not run: there is no GPU here"}, asked.out)
        return
    folder = asked.runs / f"{asked.strategy}-{asked.epochs}"
    told |= {"gpu": torch.cuda.get_device_name(), "status": "run"}
    finish({**told, **measured(asked.data, asked.strategy, asked.epochs, folder)}, asked.out)


if __name__ == "__main__":
    main()
