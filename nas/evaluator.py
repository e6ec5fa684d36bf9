"""Accuracy of architectures as they would be deployed, no more of it than is needed, and nothing twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hardware_profiles.machine import int8_weight_limit
from hardware_profiles.quantization import Range
from nas.data import Data
from nas.evaluate import calibration_images, count_correct, recalibrate, statistics_of, with_statistics
from nas.quantize import Quantized, quantize
from nas.supernet import Subnet, Supernet
from search_spaces import Architecture

STAGES = (1 / 8, 1 / 4, 1 / 2)  # of a split, after which an evaluation may stop
FEWEST_IMAGES = 64  # of a first stage
REMEMBERED = 1000  # calibrations: statistics of norms and two numbers a tensor each
SURE = 3.0  # standard errors: the whole split says otherwise about once in a thousand


@dataclass(frozen=True)
class Score:
    """How many of the first images of a split were right, out of how many, and how many the split has."""

    correct: int
    seen: int
    images: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.seen

    @property
    def is_whole(self) -> bool:
        return self.seen == self.images

    @property
    def at_most(self) -> float:
        """What the accuracy on the whole split is hardly beyond: the upper end of Wilson's interval (1927), narrowed
        since the images are drawn without replacement."""
        if self.is_whole:
            return self.accuracy
        n = self.seen * (self.images - 1) / (self.images - self.seen)
        p, z2 = self.accuracy, SURE**2
        end = (p + z2 / (2 * n) + SURE * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
        return min(1.0, max(p, end))  # rounding puts the end of a share of 1 just below it


class Accuracies:
    """How many images were right after each stage, by what that depends on; kept in a file if there is one.

    Args:
        path: JSON lines, which several processes may append to; None keeps them in memory.
        key: of all that an accuracy depends on besides architecture and split.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self._held: dict[tuple[str, str], tuple[int, ...]] = {}
        self._read = 0  # bytes of the file

    def get(self, architecture: Architecture, split: str) -> tuple[int, ...]:
        self._refresh()
        return self._held.get((architecture.id, split), ())

    def put(self, architecture: Architecture, split: str, correct: tuple[int, ...]) -> None:
        self._held[architecture.id, split] = correct
        if self.path is not None:
            line = {"key": self.key, "architecture": architecture.id, "split": split, "correct": correct}
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")  # one write: lines of several processes do not mix

    def _refresh(self) -> None:
        if self.path is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # a last line without its end is being written
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                found = json.loads(line)
                where, correct = (found["architecture"], found["split"]), tuple(map(int, found["correct"]))
                is_ours = found["key"] == self.key
            except (ValueError, TypeError, KeyError):
                continue  # cut off when a process was killed: it is evaluated again
            if is_ours and len(correct) > len(self._held.get(where, ())):
                self._held[where] = correct


class _Images:
    """The first images of the calibration split, in batches; read once they are asked for."""

    def __init__(self, data: Data, subnet: Subnet, count: int) -> None:
        self._data, self._subnet, self._count = data, subnet, count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._batches)

    @cached_property
    def _batches(self) -> tuple[torch.Tensor, ...]:
        device = next(self._subnet.parameters()).device
        read = torch.cat([x.to(device) for x in calibration_images(self._data, self._subnet)])[: self._count]
        return read.tensor_split(-(-len(read) // 128))  # even: a norm takes no batch of one image


@dataclass(frozen=True)
class _Calibration:
    """What the calibration images say of an architecture in floats, whatever the precisions it is deployed in."""

    statistics: list[tuple[torch.Tensor, torch.Tensor]]
    ranges: dict[str, Range]  # grows


class Evaluator:
    """Accuracy of architectures as they would be deployed: recalibrated and quantized.

    `key` is a digest of all that an accuracy depends on besides the architecture: weights, data, calibration
    and the integer arithmetic.

    Args:
        calibration: images of the calibration split that set norm statistics and ranges.
        results: a file that keeps accuracies, so that none is computed twice; None keeps them in memory.
    """

    def __init__(self, supernet: Supernet, data: Data, *, calibration: int = 256, results: Path | None = None) -> None:
        self.supernet = supernet.eval()
        self.data = data
        self.weight_limit = int8_weight_limit()
        self._calibration = calibration
        self.supernet_sha256 = supernet.digest()
        parts = (supernet.space.name, self.supernet_sha256, data.key, calibration, self.weight_limit)
        self.key = hashlib.sha256(repr(parts).encode()).hexdigest()
        self._results = Accuracies(results, self.key)
        self._calibrations: dict[Architecture, _Calibration] = {}

    def deploy(self, architecture: Architecture) -> Quantized:
        """The subnet with its own norm statistics and ranges, folded and quantized.

        Those of an architecture that differs in precision alone are used again.
        """
        subnet = self.supernet.extract(architecture)
        images = _Images(self.data, subnet, self._calibration)
        floats = self.supernet.space.undeployed(architecture)
        held = self._calibrations.pop(floats, None)
        if held is None:
            held = _Calibration(statistics_of(recalibrate(subnet, images)), {})
        deployed = quantize(with_statistics(subnet, held.statistics), images, self.weight_limit, ranges=held.ranges)
        self._calibrations[floats] = held  # as the last one used
        if len(self._calibrations) > REMEMBERED:
            del self._calibrations[next(iter(self._calibrations))]
        return deployed

    def accuracy(self, architecture: Architecture, split: str) -> float:
        """In 0..1, on the whole split."""
        return self.score(architecture, split).accuracy

    def score(
        self, architecture: Architecture, split: str, is_enough: Callable[[Score], bool] = lambda score: False
    ) -> Score:
        """The score on a split, or on its first images where `is_enough` says so after a stage of them."""
        images, held = len(self.data[split]), self._results.get(architecture, split)
        correct, seen, subnet = list(held), 0, None
        for stage, end in enumerate(stages(images)):
            if stage == len(correct):
                subnet = subnet or self.deploy(architecture).simulated
                now = count_correct(subnet, self.data, split, seen, end)
                correct.append(now + (correct[-1] if correct else 0))
            seen, score = end, Score(correct[stage], end, images)
            if is_enough(score):
                break
        if len(correct) > len(held):
            self._results.put(architecture, split, tuple(correct))
        return score


def stages(images: int) -> list[int]:
    """How many images have been seen after each stage."""
    ends = [math.ceil(images * share) for share in STAGES]
    return [end for end in ends if FEWEST_IMAGES <= end < images] + [images]
