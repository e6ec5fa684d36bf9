"""Carries out one planned step: augments its batches, runs its passes and accumulates their gradients."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nas.augmentation import augment
from nas.data import Data
from nas.distributed import Workers
from nas.interpreter import Tap
from nas.losses import DISTILLATIONS, bias_weights, counts, label_loss
from nas.regularize import DropPath, FeatureTap, Taps, add_gradient_noise, drop_path_rate_at
from nas.strategies import FROZEN, LARGEST, Pass, Step
from nas.supernet import Subnet, Supernet
from nas.train_settings import ARITHMETICS, TrainSettings
from search_spaces import Architecture

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """A worker's share of a micro-batch."""

    pixels: Tensor  # uint8 (n, channels, side, side)
    labels: Tensor  # int64 (n,)
    size: int  # of the whole micro-batch, over all workers


@dataclass
class _MicroBatch:
    """What the passes over one micro-batch share."""

    pixels: Tensor  # augmented
    targets: Tensor
    size: int  # over all workers
    scale: float  # of this worker's loss: gradients are averaged over workers as if their shares were of one size
    label_scale: float  # the same for the loss on labels, whose images may count differently
    images: dict[int, Tensor]  # network inputs by resolution
    largest_logits: Tensor | None = None
    frozen_logits: Tensor | None = None


class StepRunner:
    """Gradients of planned steps, left in the `.grad` of the supernet's parameters.

    Attributes:
        macs: multiply-accumulates spent so far, three times those of a forward pass for each trained image and
            one for each that only a teacher or a candidate sees; what checkpointing recomputes is not counted.
        teacher: the largest network as it was at the event `freeze_teacher`.
        lowest_variance: of any image's features so far, which the Bias loss needs.
    """

    def __init__(self, supernet: Supernet, data: Data, settings: TrainSettings, seed: int, workers: Workers) -> None:
        self.supernet, self.data, self.settings, self.seed, self.workers = supernet, data, settings, seed, workers
        self.model = workers.wrap(supernet)
        self.arithmetic = settings.arithmetic
        self.macs = 0
        self.teacher: Subnet | None = None
        self.lowest_variance = math.inf
        self._compiled: dict[Architecture, torch.nn.Module] = {}
        self._distil = DISTILLATIONS[settings.distillation]
        if settings.compile and workers.count > 1:
            raise ValueError(f"train.compile with {workers.count} processes: expected one process, or compile: false")
        weights = [settings.class_weights.get(name, 1.0) for name in data.classes]
        self._class_weights = torch.tensor(weights, device=workers.device) if settings.class_weights else None

    def freeze_teacher(self) -> Subnet:
        """Keep the largest network as it is now; it normalizes by the batch, as its students do."""
        self.teacher = self.supernet.extract(self.supernet.space.largest).train()
        return self.teacher

    def gradients(self, step: Step, number: int, steps: int, attempt: int, batches: Sequence[Batch]) -> float:
        """Run the passes of a step; returns the loss, the weighted sum over passes and the mean over workers."""
        self.supernet.train()
        generator = self._generator(number, attempt, 4, self.workers.rank)
        parts = [self._augmented(batch, generator) for batch in batches]
        total = torch.zeros((), device=self.workers.device)
        for index, one in enumerate(step.passes):
            part = parts[one.micro_batch]
            with self.workers.accumulating(self.model, last=index == len(step.passes) - 1):
                loss = one.weight * self._loss(one, part, number, steps, generator)
                loss.backward()
            total += loss.detach()
        if self.settings.gradient_noise:
            noise = self._generator(number, attempt, 5)  # the same on every worker, or their weights would part
            add_gradient_noise(self.supernet.parameters(), number, self.settings.gradient_noise, noise)
        return float(self.workers.mean(total))

    def _generator(self, number: int, attempt: int, purpose: int, rank: int = 0) -> torch.Generator:
        """Of one step; another one after a collapse, so that what made it does not come again."""
        key = [self.seed, purpose, number, attempt, rank]
        return torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62)))

    def _augmented(self, batch: Batch, generator: torch.Generator) -> _MicroBatch:
        pixels, labels = (tensor.to(self.workers.device, non_blocking=True) for tensor in batch[:2])
        pixels, targets = augment(pixels, labels, self.settings.augmentation, len(self.data.classes), generator)
        scale = self.workers.factor(len(labels), batch.size)
        label_scale = scale
        if self._class_weights is not None:
            counted = counts(targets, self._class_weights).sum()
            label_scale = float(counted / self.workers.mean(counted))
        return _MicroBatch(pixels, targets, batch.size, scale, label_scale, {})

    def _images(self, part: _MicroBatch, resolution: int) -> Tensor:
        if resolution not in part.images:
            x = self.data.prepare(part.pixels, resolution)
            last = self.arithmetic.endswith("channels_last")  # augmented images come in either format
            part.images[resolution] = x.contiguous(
                memory_format=torch.channels_last if last else torch.contiguous_format
            )
        return part.images[resolution]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.workers.device.type, torch.bfloat16, enabled=self.arithmetic.startswith("bf16"))

    # one pass ------------------------------------------------------------------------------------------

    def _loss(self, one: Pass, part: _MicroBatch, number: int, steps: int, generator: torch.Generator) -> Tensor:
        architecture = self._chosen(one, part)
        features = FeatureTap(self.supernet.network(architecture)) if self.settings.bias_loss and one.labels else None
        logits = self._logits(architecture, part, self._tap(one, architecture, features, number, steps, generator))
        self.macs += 3 * self.supernet.network(architecture).macs * part.size
        image_weights = None
        if features is not None:
            lowest = torch.tensor(self.lowest_variance, device=logits.device)
            image_weights, lowest = bias_weights(features.features, lowest)
            self.lowest_variance = float(self.workers.lowest(lowest))  # one for all, or a resumed run would differ
        loss = self._loss_of(logits, one, part, image_weights)
        if part.largest_logits is None and architecture == self.supernet.space.largest:
            part.largest_logits = logits.detach()  # a student that is drawn as large does not replace its teacher
        return loss

    def _loss_of(self, logits: Tensor, one: Pass, part: _MicroBatch, image_weights: Tensor | None = None) -> Tensor:
        loss = logits.new_zeros(())
        if one.labels:
            loss = (one.labels * part.label_scale) * label_loss(
                logits,
                part.targets,
                smoothing=self.settings.label_smoothing,
                class_weights=self._class_weights,
                image_weights=image_weights,
            )
        if one.teacher:
            taught = self._distil(logits, self._teacher_logits(one.teacher, part), self.settings.temperature)
            loss = loss + part.scale * taught
        return loss

    def _logits(self, architecture: Architecture, part: _MicroBatch, tap: Tap | None = None) -> Tensor:
        x = self._images(part, self.supernet.network(architecture).input_shape[1])
        with self._autocast():
            if self.settings.compile and architecture in (self.supernet.space.largest, self.supernet.space.smallest):
                return self._compile(architecture)(x).float()
            segments = self.settings.checkpoint_segments
            return self.model(x, architecture, tap=tap, segments=segments).float()

    def _compile(self, architecture: Architecture) -> torch.nn.Module:
        """The network of an architecture, compiled when it is first trained."""
        if architecture not in self._compiled:
            bound = _Bound(self.model, architecture)
            self._compiled[architecture] = torch.compile(bound, dynamic=False)  # type: ignore[assignment]
        return self._compiled[architecture]

    def _tap(
        self,
        one: Pass,
        architecture: Architecture,
        features: FeatureTap | None,
        number: int,
        steps: int,
        generator: torch.Generator,
    ) -> Tap | None:
        taps: list[Tap] = [features] if features is not None else []
        if self.settings.drop_path and one.regularized:
            rate = drop_path_rate_at(number, steps, self.settings.drop_path)
            taps.append(DropPath(self.supernet.network(architecture), rate, generator))
        return Taps(taps) if taps else None

    def _chosen(self, one: Pass, part: _MicroBatch) -> Architecture:
        """The only candidate, or the one with the lowest, or highest, loss now."""
        if len(one.candidates) == 1:
            return one.candidates[0]
        losses = []
        with torch.no_grad():
            for architecture in one.candidates:
                x = self._images(part, self.supernet.network(architecture).input_shape[1])
                with self._autocast():
                    logits = self.supernet(x, architecture).float()
                losses.append(self._loss_of(logits, one, part))
                self.macs += self.supernet.network(architecture).macs * part.size
        shared = self.workers.mean(torch.stack(losses))  # so that all workers choose the same
        return one.candidates[int(shared.argmax() if one.highest else shared.argmin())]

    def _teacher_logits(self, teacher: str, part: _MicroBatch) -> Tensor:
        if teacher == LARGEST:
            if part.largest_logits is None:
                raise RuntimeError("a strategy planned in-place distillation before the pass over the largest network")
            return part.largest_logits
        if teacher != FROZEN or self.teacher is None:
            raise RuntimeError(f"a strategy planned the teacher {teacher!r}, which there is not")
        if part.frozen_logits is None:
            x = self._images(part, self.teacher.network.input_shape[1])
            with torch.no_grad(), self._autocast():
                part.frozen_logits = self.teacher(x).float()
            self.macs += self.teacher.network.macs * part.size
        return part.frozen_logits


class _Bound(torch.nn.Module):
    """A supernet at one architecture."""

    def __init__(self, model: torch.nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self._model = [model]  # not a child: its parameters are the supernet's
        self._architecture = architecture

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._model[0](x, self._architecture)
        return logits


def fastest_arithmetic(runner: StepRunner, step: Step, batch: Batch) -> str:
    """Time forward and backward of a few networks in each arithmetic; fp32 unless another is 10 % faster."""
    alone = runner.workers.alone()
    eager = replace(runner.settings, compile=False)  # compiling each arithmetic would take minutes
    trial = StepRunner(copy.deepcopy(runner.supernet), runner.data, eager, runner.seed, alone)
    batch = batch._replace(size=len(batch.labels))
    architectures = list(dict.fromkeys(one.candidates[0] for one in step.passes))
    passes = tuple(Pass((architecture,)) for architecture in architectures)
    cold: dict[str, float] = {}  # seconds of the first round, in which libraries prepare themselves
    seconds: dict[str, float] = {}
    for turn in range(4):  # interleaved, and the best of three, since machines have slow moments
        for arithmetic in ARITHMETICS:
            if turn and cold[arithmetic] > 4 * cold["fp32"]:
                continue  # bf16 without hardware for it is many times slower: once is enough to know
            trial.arithmetic = arithmetic
            start = time.perf_counter()
            trial.gradients(Step(passes, 1.0), 0, 1, 0, [batch])
            if runner.workers.device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            if turn:
                seconds[arithmetic] = min(seconds.get(arithmetic, math.inf), took)
            else:
                cold[arithmetic] = took
    best = min(seconds, key=lambda name: seconds[name] * (1.0 if name != "fp32" else 0.9))
    log.info("training in %s (%s)", best, ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in seconds.items()))
    return best
