"""Two processes against one with the same global batch: the loss curves, and images a second.

    python experiments/benchmarks/processes.py [CIFAR10.npz] [--images 4000] [--epochs 6] [--seeds 3] [--out FILE.json]

Runs `torchrun --standalone --nproc-per-node N -m nas train` for N = 1 and 2 and each seed, one run after the other,
with one thread a process. Without a file it trains on scikit-learn's digits. No augmentation: each process draws its
own, which would be noise of another kind; what remains different is that a batch norm sees half of the batch.

- `loss`, `smallest`, `largest`: of each epoch; the loss is that of its last step, the accuracies are on val_search.
- `same_seed_difference`: two processes minus one, with the same seed, over all epochs and seeds: the largest and the
  mean absolute difference. `seed_to_seed_difference`: one process with one seed minus one process with another.
- `images_per_s`: training images a second, evaluations left out, the median over seeds; each image goes through all
  passes of its step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from common import about, finish, out_option

CURVES = ("loss", "smallest", "largest")
# processes and threads of each: what two of each take the machine for, and what one process does with two threads
WAYS = {"one_process": (1, 1), "two_processes": (2, 1), "one_process_two_threads": (1, 2)}
BATCH = 64
TEST_IMAGES = 500  # nothing here reads them, but a data set has some


def experiment(data: str, epochs: int) -> dict[str, Any]:
    """A small MobileNet, trained by the sandwich rule: four passes a step, over different networks."""
    side = 8 if data == "digits" else 32
    return {
        "name": "processes",
        "data": {"path": data, "val_search": 0.15, "val_front": 0.05, "calibration": 256},
        "space": {
            "family": "mobilenet",
            "resolutions": [side],
            "widths": [16, 24, 40],
            "width_multipliers": [0.5, 1.0],
            "strides": [1 if side == 8 else 2, 2, 1],
            "depths": [1, 2],
            "kernels": [3, 5],
            "expansions": [2, 3],
            "stem_width": 16,
            "head_width": 96,
        },
        "train": {
            "strategy": "sandwich",
            "epochs": epochs,
            "batch_size": BATCH,
            "learning_rate": 0.1,
            "arithmetic": "fp32",
            "evaluate_every": 1,
        },
        "search": {"objectives": ["accuracy", "macs"]},
    }


def subset(path: Path, images: int, out: Path) -> str:
    """A random part of the training images of a data set, and a few test images, as a smaller one."""
    rng = np.random.default_rng(0)
    with np.load(path, allow_pickle=False) as whole:
        kept = {}
        for split, count in (("train", images), ("test", TEST_IMAGES)):
            x, y = whole[f"x_{split}"], np.asarray(whole[f"y_{split}"]).reshape(-1)
            chosen = rng.permutation(len(y))[:count]
            kept |= {f"x_{split}": x[chosen], f"y_{split}": y[chosen]}
    np.savez(out, **kept)
    return str(out)


def run(recipe: Path, folder: Path, processes: int, threads: int, seed: int) -> list[dict[str, float]]:
    """The entries of metrics.jsonl of one training; raises RuntimeError with the end of what a failed one said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "nas", "train", str(recipe), "--out", str(folder), "--set", f"seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"training with {processes} processes failed:\n{done.stderr[-2000:]}")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def differences(pairs: Sequence[tuple[Sequence[Mapping[str, float]], Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """Largest and mean absolute difference of each curve, over pairs of runs and all epochs."""
    found = {}
    for name in CURVES:
        gaps = [abs(a[name] - b[name]) for one, two in pairs for a, b in zip(one, two, strict=True)]
        found[name] = {"largest": max(gaps), "mean": float(np.mean(gaps))} if gaps else None
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="an .npz of images; scikit-learn's digits by default")
    parser.add_argument("--images", type=int, default=4000, help="of the .npz that are trained and validated on")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    out_option(parser, "processes")
    parsed = parser.parse_args(arguments)
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = subset(parsed.data, parsed.images, folder / "data.npz") if parsed.data else "digits"
        recipe = folder / "processes.yaml"
        content = experiment(data, parsed.epochs)
        recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
        for seed in range(parsed.seeds):
            for way, (processes, threads) in WAYS.items():
                entries = run(recipe, folder / f"{way}{seed}", processes, threads, seed)
                runs[way].append(entries)
                last = entries[-1]
                print(f"seed {seed}, {way}: loss {last['loss']:.3f} in {last['seconds']:.1f} s", file=sys.stderr)
    rates = {way: median(BATCH * e[-1]["step"] / e[-1]["seconds"] for e in found) for way, found in runs.items()}
    one, two = runs["one_process"], runs["two_processes"]
    content["data"]["path"] = f"{parsed.images} images of {parsed.data.name}" if parsed.data else "digits"
    result = {
        "what": "two processes against one with the same global batch: loss and accuracy by epoch, images a second",
        **about(range(parsed.seeds)),
        "experiment": content,
        "same_seed_difference": differences(list(zip(one, two, strict=True))),
        "seed_to_seed_difference": differences(list(combinations(one, 2))),
        "images_per_s": {way: round(rate, 1) for way, rate in rates.items()},
        "two_processes_over": {
            way: round(rates["two_processes"] / rates[way], 3) for way in WAYS if way != "two_processes"
        },
        "curves": {
            way: [{curve: [entry[curve] for entry in entries] for curve in CURVES} for entries in found]
            for way, found in runs.items()
        },
    }
    finish(result, parsed.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
