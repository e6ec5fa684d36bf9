"""Training a supernet: sampled architectures, one optimizer, resumable at every step.

All randomness is a function of (seed, step): data order, augmentation and architectures of a step do not
depend on what ran before it, so a run that was killed goes on with exactly the batches it would have seen.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardware_profiles.files import write_text
from nas.checkpoints import load_checkpoint, save_checkpoint
from nas.data import Data, augment
from nas.evaluate import accuracy, calibration_images, recalibrate
from nas.progress import progress_bar
from nas.strategies import LARGEST_SET, STRATEGIES, Strategy
from nas.supernet import Supernet
from search_spaces import Architecture, SearchSpace

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
ARITHMETICS = ("fp32", "fp32_channels_last", "bf16_channels_last")


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class TrainSettings:
    """How a supernet is trained.

    strategy: which architectures a step trains; see `nas.strategies`.
    architectures: size of the strategy's fixed set.
    micro_batches: architectures trained, and gradients accumulated, in one step.
    arithmetic: fp32, fp32_channels_last, bf16_channels_last, or auto, which times a few steps of each; name one
        where the same seed must give the same weights.
    warmup: share of all steps in which the learning rate rises linearly; then it follows a cosine to zero.
    crop_padding: pixels of reflected border from which random crops are taken.
    evaluate_every: epochs between evaluations of the smallest and the largest subnet.
    """

    strategy: str = "sorted"
    architectures: int = 160
    epochs: int = 20
    batch_size: int = 64
    micro_batches: int = 1
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    label_smoothing: float = 0.1
    flip: bool = False
    crop_padding: int = 0
    arithmetic: str = "auto"
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"train.strategy = {self.strategy!r}; expected one of {', '.join(STRATEGIES)}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"train.optimizer = {self.optimizer!r}; expected sgd or adamw")
        if self.arithmetic not in ("auto", *ARITHMETICS):
            raise ValueError(f"train.arithmetic = {self.arithmetic!r}; expected auto, {', '.join(ARITHMETICS)}")
        for name in ("epochs", "batch_size", "micro_batches", "evaluate_every", "learning_rate"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in ("weight_decay", "crop_padding"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("momentum", "label_smoothing"):
            self._check(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self._check("warmup", 0 <= self.warmup <= 1, "a share of the steps, from 0 to 1")
        self._check("architectures", 2 <= self.architectures <= LARGEST_SET, f"2 to {LARGEST_SET}")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"train.{name} = {getattr(self, name)}; expected {expected}")


def learning_rate_at(step: int, steps: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine that ends at zero."""
    warm = max(1, round(settings.warmup * steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    supernet: Supernet,
    data: Data,
    *,
    seed: int = 0,
    folder: Path | None = None,
    settings: TrainSettings | None = None,
    **options: object,
) -> dict[str, float]:
    """Train a supernet in place; returns the last loss and the accuracies of the smallest and largest subnet.

    Args:
        supernet: of a space that fits the data's channels and classes.
        data: its train split is trained on; calibration and val_search are used for evaluations.
        seed: of data order, augmentation and architectures.
        folder: where checkpoints (`supernet/`) and `metrics.jsonl` go; a run found there goes on. None keeps nothing.
        settings: how; or give fields of `TrainSettings` as keywords.

    Raises TrainingDiverged when the loss is not finite (the last good checkpoint stays), ValueError when the
    space does not fit the data.
    """
    settings = settings or TrainSettings(**options)  # type: ignore[arg-type]
    check_fit(supernet.space, data)
    return _Trainer(supernet, data, settings, seed, folder).run()


def check_fit(space: SearchSpace, data: Data) -> None:
    """Raise ValueError when a space was made for other images or classes than the data has."""
    channels = space.lower(space.smallest).input_shape[0]
    if channels != data.channels:
        raise ValueError(f"the space takes {channels} channels, {data.name} has {data.channels}; set space.channels")
    if space.classes != len(data.classes):
        raise ValueError(
            f"the space has {space.classes} classes, {data.name} has {len(data.classes)}; set space.classes"
        )


class _Trainer:
    """The state of one training: everything that a checkpoint holds, and what is derived from it."""

    def __init__(self, supernet: Supernet, data: Data, settings: TrainSettings, seed: int, folder: Path | None) -> None:
        self.supernet, self.data, self.settings, self.seed, self.folder = supernet, data, settings, seed, folder
        self.device = pick_device()
        self.supernet.to(self.device)
        self.strategy: Strategy = STRATEGIES[settings.strategy](supernet.space, seed, settings.architectures)
        self.optimizer = _optimizer(supernet, settings)
        if len(data["train"]) < settings.micro_batches:
            raise ValueError(f"{len(data['train'])} training images; expected one or more a micro-batch")
        per_step = settings.batch_size * settings.micro_batches
        self.steps_an_epoch = max(1, len(data["train"]) // per_step)
        self.steps = self.steps_an_epoch * settings.epochs
        self.step = 0
        self.arithmetic = settings.arithmetic
        self.results: dict[str, float] = {}
        self.kept = False  # whether the folder holds a checkpoint

    def run(self) -> dict[str, float]:
        self._restore()
        if self.arithmetic == "auto":
            self.arithmetic = self._fastest_arithmetic()
        saved = time.monotonic()
        with progress_bar(total=self.steps, initial=self.step, desc="train", unit="step", smoothing=0.02) as bar:
            while self.step < self.steps:
                epoch = self.step // self.steps_an_epoch
                for batches in self._epoch(epoch):
                    loss = self._train_step(batches)
                    self.step += 1
                    bar.update()
                    self._show(bar, loss)
                    if time.monotonic() - saved > CHECKPOINT_SECONDS and self.step % self.steps_an_epoch:
                        self._save()
                        saved = time.monotonic()
                self._end_epoch(epoch + 1, loss)
                saved = time.monotonic()
        return self.results

    # one step ------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The micro-batches of each remaining step of an epoch."""
        settings, split = self.settings, self.data["train"]
        order = np.random.default_rng([self.seed, 3, epoch]).permutation(len(split))
        count = self.steps_an_epoch * settings.micro_batches
        batches = np.array_split(order[: count * settings.batch_size], count)
        first = (self.step - epoch * self.steps_an_epoch) * settings.micro_batches
        streamed = split.batches(settings.batch_size, batches[first:])
        while group := [batch for _, batch in zip(range(settings.micro_batches), streamed, strict=False)]:
            yield group

    def _train_step(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        self.supernet.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.steps, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        architectures = self.strategy.architectures(self.step, len(batches))
        generator = torch.Generator().manual_seed(int(np.random.default_rng([self.seed, 4, self.step]).integers(2**62)))
        total = 0.0
        for (pixels, labels), architecture in zip(batches, architectures, strict=True):
            pixels = augment(
                pixels.to(self.device),
                flip=self.settings.flip,
                crop_padding=self.settings.crop_padding,
                generator=generator,
            )
            loss = self._loss(self.supernet, pixels, labels, architecture, self.arithmetic) / len(batches)
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise TrainingDiverged(self._divergence(f"the loss became {total}"))
        self.optimizer.step()
        return total

    def _loss(
        self, supernet: Supernet, pixels: Tensor, labels: Tensor, architecture: Architecture, arithmetic: str
    ) -> Tensor:
        x = self.data.prepare(pixels, supernet.network(architecture).input_shape[1])
        channels_last = arithmetic.endswith("channels_last")  # augmented images come in either format
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=arithmetic.startswith("bf16")):
            logits = supernet(x, architecture)
        return F.cross_entropy(logits.float(), labels.to(self.device), label_smoothing=self.settings.label_smoothing)

    def _fastest_arithmetic(self) -> str:
        """Time forward and backward of a middle network in each arithmetic; fp32 unless another is 10 % faster."""
        count = min(self.settings.batch_size, len(self.data["train"]))
        pixels, labels = next(self.data["train"].batches(count, [np.arange(count)]))
        pixels = pixels.to(self.device)
        architectures = self.strategy.architectures(0, 2)
        trial = copy.deepcopy(self.supernet)
        seconds: dict[str, float] = {}
        for _ in range(3):  # interleaved, and the best of three, since machines have slow moments
            for arithmetic in ARITHMETICS:
                if seconds.get(arithmetic, 0.0) > 2 * min(seconds.values(), default=0.0):
                    continue  # bf16 without hardware for it is many times slower: once is enough to know
                start = time.perf_counter()
                for architecture in architectures:
                    self._loss(trial, pixels, labels, architecture, arithmetic).backward()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[arithmetic] = min(seconds.get(arithmetic, math.inf), time.perf_counter() - start)
        best = min(seconds, key=lambda name: seconds[name] * (1.0 if name != "fp32" else 0.9))
        shown = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
        log.info("training in %s (%s)", best, shown)
        return best

    # around the steps ----------------------------------------------------------------------------------

    def _show(self, bar: tqdm[Any], loss: float) -> None:
        if self.step % 10 and self.step != self.steps:
            return
        rate = bar.format_dict["rate"] or 0.0
        images = rate * self.settings.batch_size * self.settings.micro_batches
        shown = {"loss": f"{loss:.3f}", "images/s": f"{images:.0f}"}
        if self.results:
            shown |= {"smallest": f"{self.results['smallest']:.1%}", "largest": f"{self.results['largest']:.1%}"}
        bar.set_postfix(shown, refresh=False)

    def _end_epoch(self, epoch: int, loss: float) -> None:
        last = epoch == self.settings.epochs
        if last or epoch % self.settings.evaluate_every == 0:
            self.results = {"loss": loss, **self._accuracies()}
            self._record({"step": self.step, "epoch": epoch, **self.results})
        self._save()

    def _accuracies(self) -> dict[str, float]:
        space = self.supernet.space
        found = {}
        for name, architecture in (("smallest", space.smallest), ("largest", space.largest)):
            subnet = self.supernet.extract(architecture)
            recalibrate(subnet, [x.to(self.device) for x in calibration_images(self.data, subnet)])
            found[name] = accuracy(subnet, self.data, "val_search")
        return found

    def _record(self, entry: dict[str, float]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")

    def _divergence(self, what: str) -> str:
        kept = f"the last good checkpoint stays in {self.folder / 'supernet'}; " if self.folder and self.kept else ""
        return (
            f"{what} at step {self.step} of {self.steps}; {kept}"
            f"lower train.learning_rate (now {self.settings.learning_rate:g}) or raise train.warmup "
            f"(now {self.settings.warmup:g}) and start again"
        )

    # checkpoints ---------------------------------------------------------------------------------------

    def _save(self) -> None:
        tensors = {f"weights/{name}": tensor for name, tensor in self.supernet.state_dict().items()}
        for name, parameter in self.supernet.named_parameters():
            held = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{name}/{key}": value for key, value in held.items() if isinstance(value, Tensor)}
        spoilt = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if spoilt:  # the loss would only show it one step later, when the checkpoint is spoilt too
            raise TrainingDiverged(self._divergence(f"{spoilt} is not finite"))
        if self.folder is None:
            return
        state = {
            "step": self.step,
            "steps": self.steps,
            "arithmetic": self.arithmetic,
            "results": self.results,
            "settings": asdict(self.settings),
            "seed": self.seed,
            "data": self.data.key,
            "space": self.supernet.space.name,
        }
        save_checkpoint(self.folder / "supernet", self.step, tensors, state)
        self.kept = True

    def _restore(self) -> None:
        if self.folder is None:
            return
        found = load_checkpoint(self.folder / "supernet")
        if found is None:
            _truncate_metrics(self.folder, 0)
            return
        tensors, state = found
        self.kept = True
        expected = {"space": self.supernet.space.name, "data": self.data.key, "settings": asdict(self.settings)}
        changed = [name for name, value in expected.items() if state[name] != value]
        if changed or state["seed"] != self.seed:
            raise ValueError(
                f"{self.folder} was trained with another {', '.join(changed) or 'seed'}; "
                "use another run directory, or delete its supernet folder"
            )
        load_weights(self.supernet, tensors)
        for name, parameter in self.supernet.named_parameters():
            prefix = f"optimizer/{name}/"
            held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if held:  # AdamW counts its steps on the CPU
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(self.device) for key, value in held.items()
                }
        self.step, self.arithmetic = int(state["step"]), str(state["arithmetic"])  # type: ignore[call-overload]
        self.results = dict(state["results"])  # type: ignore[call-overload]
        _truncate_metrics(self.folder, self.step)
        if self.step < self.steps:
            log.info("going on from step %d of %d", self.step, self.steps)


def load_weights(supernet: Supernet, tensors: dict[str, Tensor]) -> None:
    """Put the weights of a checkpoint into a supernet of the same space."""
    prefix = "weights/"
    supernet.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def _truncate_metrics(folder: Path, step: int) -> None:
    """Drop what was recorded after the checkpoint, since it will be recorded again, and a line cut short."""
    path = folder / "metrics.jsonl"
    if path.exists():
        whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_text(path, "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step))


def _optimizer(supernet: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only, not on biases, norms and positions (arXiv 1812.01187)."""
    decayed = [p for name, p in supernet.named_parameters() if name.endswith(".weight")]
    rest = [p for name, p in supernet.named_parameters() if not name.endswith(".weight")]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(
        groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=settings.momentum > 0
    )
