"""Training a supernet: planned steps, one optimizer, a guard over its health, resumable at every step.

All randomness is a function of (seed, step): data order, augmentation and architectures of a step do not
depend on what ran before it, so a run that was killed goes on with exactly the batches it would have seen.
Under torchrun every process trains the same architectures on its share of each batch.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hardware_profiles.files import write_text
from nas.channel_sorting import permute, sort_channels
from nas.checkpoints import load_checkpoint, save_checkpoint
from nas.data import Data
from nas.distributed import Workers, workers
from nas.health import Guard, examine
from nas.progress import progress_bar
from nas.strategies import FREEZE_TEACHER, SORT_CHANNELS, STRATEGIES, Strategy
from nas.supernet import Supernet
from nas.train_settings import TrainSettings
from nas.train_step import Batch, StepRunner, fastest_arithmetic
from search_spaces import SearchSpace

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
RETRIES = 3  # collapses that a training may recover from
LATEST, GOOD = Path("supernet"), Path("supernet") / "good"
LOWER = 0.5  # what a collapse multiplies the learning rate by

Tensors = dict[str, Tensor]


class TrainingDiverged(RuntimeError):
    """Training collapsed, and collapsed again each time it went on from its last good state."""


class _Collapse(Exception):
    """Why training cannot go on from here."""


def train(
    supernet: Supernet,
    data: Data,
    *,
    seed: int = 0,
    folder: Path | None = None,
    settings: TrainSettings | None = None,
    strategy: Strategy | str | None = None,
    **options: object,
) -> dict[str, float]:
    """Train a supernet in place; returns what the last evaluation found.

    Args:
        supernet: of a space that fits the data's channels and classes.
        data: its train split is trained on; calibration and val_search are used for evaluations.
        seed: of data order, augmentation and architectures.
        folder: where checkpoints (`supernet/`) and `metrics.jsonl` go; a run found there goes on. None keeps nothing.
        settings: how; or give fields of `TrainSettings` as keywords.
        strategy: a strategy of your own, or the name of one; by default the one that the settings name.

    Returns the mean loss of the last epoch; accuracy on val_search and gradient norm of the smallest, the middle and
    the largest subnet; macs spent, seconds, rollbacks.

    Raises TrainingDiverged when training collapsed (a loss that is not finite, or a subnet back at chance) more
    often than a lower learning rate could help, the last good checkpoint kept; ValueError when the space does not
    fit the data.
    """
    if isinstance(strategy, str):
        options["strategy"], strategy = strategy, None
    if settings is not None and options:
        raise ValueError(f"train got settings and {', '.join(options)}; expected one or the other")
    settings = settings or TrainSettings(**options)  # type: ignore[arg-type]
    check_training(settings, supernet.space, data)
    if settings.kernel_transforms != supernet.kernel_transforms:
        raise ValueError(
            f"train.kernel_transforms is {settings.kernel_transforms}, but the supernet was made with "
            f"kernel_transforms={supernet.kernel_transforms}; expected the same"
        )
    with workers() as joined:
        return _Trainer(supernet, data, settings, seed, folder, joined, strategy).run()


def check_fit(space: SearchSpace, data: Data) -> None:
    """Raise ValueError when a space was made for other images or classes than the data has."""
    channels = space.lower(space.smallest).input_shape[0]
    if channels != data.channels:
        raise ValueError(f"the space takes {channels} channels, {data.name} has {data.channels}; set space.channels")
    if space.classes != len(data.classes):
        raise ValueError(
            f"the space has {space.classes} classes, {data.name} has {len(data.classes)}; set space.classes"
        )


def check_training(settings: TrainSettings, space: SearchSpace, data: Data) -> None:
    """Raise ValueError, or MissingKornia, for what can be known to fail before training begins."""
    check_fit(space, data)
    unknown = sorted(set(settings.class_weights) - set(data.classes))
    if unknown:
        raise ValueError(f"train.class_weights names {unknown[0]!r}; the classes are {', '.join(data.classes)}")
    settings.augmentation.check_library()


def steps_of(settings: TrainSettings, images: int) -> tuple[int, int]:
    """(optimizer steps in an epoch, in the whole training) for a number of training images."""
    an_epoch = max(1, images // settings.images_a_step)
    return an_epoch, settings.steps or an_epoch * settings.epochs


class _Trainer:
    """The state of one training: everything that a checkpoint holds, and what is derived from it."""

    def __init__(
        self,
        supernet: Supernet,
        data: Data,
        settings: TrainSettings,
        seed: int,
        folder: Path | None,
        joined: Workers,
        strategy: Strategy | None = None,
    ) -> None:
        self.supernet, self.data, self.settings, self.seed, self.workers = supernet, data, settings, seed, joined
        self.folder = folder
        self.supernet.to(joined.device)
        if len(data["train"]) < settings.micro_batches * joined.count:
            raise ValueError(f"{len(data['train'])} training images; expected one or more a micro-batch and process")
        self.steps_an_epoch, self.steps = steps_of(settings, len(data["train"]))
        self.strategy = strategy or STRATEGIES[settings.strategy](supernet.space, seed, self.steps, settings)
        self.optimizer = _optimizer(supernet, settings)
        self.runner = StepRunner(supernet, data, settings, seed, joined)
        self.average = _average(supernet, settings.average) if settings.average else None
        self.guard = Guard.of(data, settings.patience)
        self.step = 0
        self.rollbacks = 0
        self.losses: list[float] = [0.0, 0]  # sum and number of those of the epoch so far
        self.seconds = 0.0  # spent on steps
        self._since = time.monotonic()
        self.results: dict[str, float] = {}
        self._good: tuple[Tensors, dict[str, Any]] | None = None  # what a collapse goes back to

    def run(self) -> dict[str, float]:
        self._restore()
        if self.runner.arithmetic == "auto" and self.step < self.steps:
            batch = next(iter(self._epoch(0)))[0]
            self.runner.arithmetic = self.workers.broadcast(
                fastest_arithmetic(self.runner, self.strategy.step(self.step), batch)
            )
        with progress_bar(
            total=self.steps,
            initial=self.step,
            desc="train",
            unit="step",
            smoothing=0.02,
            disable=not self.workers.is_first,
        ) as bar:
            while self.step < self.steps:
                try:
                    self._train_epoch(bar)
                except _Collapse as collapse:
                    self._roll_back(str(collapse))
                    bar.n = self.step
                    bar.refresh()
        self._keep_average()
        return self.results

    def _train_epoch(self, bar: tqdm[Any]) -> None:
        """Train what is left of an epoch, evaluate, and keep what there is."""
        epoch = self.step // self.steps_an_epoch
        self._since = saved = time.monotonic()
        for batches in self._epoch(epoch):
            loss = self._train_step(batches)
            self.step += 1
            self.losses = [self.losses[0] + loss, self.losses[1] + 1]
            bar.update()
            self._show(bar, loss)
            if self.step == self.steps:
                break
            if self._is_due(saved) and self.step % self.steps_an_epoch:
                self._tick()
                self._save()
                saved = time.monotonic()
        self._tick()
        total, count = self.losses
        self.losses = [0.0, 0]
        self._end_epoch(epoch + 1, total / count)

    def _tick(self) -> None:
        """Count the seconds since the last time; evaluations are not counted."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now

    def _is_due(self, saved: float) -> bool:
        """Whether it is time for a checkpoint; the first worker's clock decides, now and then, for all."""
        if self.workers.count == 1:
            return time.monotonic() - saved > CHECKPOINT_SECONDS
        return self.step % 100 == 0 and bool(self.workers.broadcast(time.monotonic() - saved > CHECKPOINT_SECONDS))

    # one step ------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> Iterator[list[Batch]]:
        """This worker's micro-batches of each remaining step of an epoch."""
        settings, split = self.settings, self.data["train"]
        order = np.random.default_rng([self.seed, 3, epoch]).permutation(len(split))
        count = self.steps_an_epoch * settings.micro_batches
        batches = np.array_split(order[: count * settings.batch_size], count)
        batches = batches[(self.step - epoch * self.steps_an_epoch) * settings.micro_batches :]
        streamed = split.at([self.workers.share(batch) for batch in batches])
        parts = (Batch(*part, len(whole)) for part, whole in zip(streamed, batches, strict=True))
        while group := list(islice(parts, settings.micro_batches)):
            yield group

    def _train_step(self, batches: list[Batch]) -> float:
        plan = self.strategy.step(self.step)
        for event in plan.events:
            self._happen(event)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * plan.learning_rate * LOWER**self.rollbacks
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.runner.gradients(plan, self.step, self.steps, self.rollbacks, batches)
        if not math.isfinite(loss):
            raise _Collapse(f"the loss became {loss}")
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.supernet)
        return loss

    def _happen(self, event: str) -> None:
        if event == FREEZE_TEACHER:
            self.runner.freeze_teacher()
        elif event == SORT_CHANNELS:
            self._sort_channels()
        else:
            raise ValueError(f"a strategy planned the event {event!r}; expected {FREEZE_TEACHER} or {SORT_CHANNELS}")

    def _sort_channels(self) -> None:
        """Sort the channels of the weights, and of all that belongs to them."""
        orders = sort_channels(self.supernet)
        held: dict[str, Tensors] = {}
        for name, parameter in self.supernet.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    held.setdefault(key, {})[name] = value
        for tensors in held.values():
            permute(tensors, orders)
        if self.average is not None:
            permute(dict(self.average.module.named_parameters()), orders)

    # around the steps ----------------------------------------------------------------------------------

    def _show(self, bar: tqdm[Any], loss: float) -> None:
        if self.step % 10 and self.step != self.steps:
            return
        images = (bar.format_dict["rate"] or 0.0) * self.settings.images_a_step
        shown = {"loss": f"{loss:.3f}", "images/s": f"{images:.0f}"}
        if self.results:
            shown |= {name: f"{self.results[name]:.1%}" for name in ("smallest", "largest")}
        bar.set_postfix(shown, refresh=False)

    def _end_epoch(self, epoch: int, loss: float) -> None:
        if self.step < self.steps and epoch % self.settings.evaluate_every:
            self._save()
            return
        found = self.workers.broadcast(examine(self._evaluated, self.data) if self.workers.is_first else None)
        watched = self.strategy.step(self.step - 1).watched
        spoilt = [name for name in watched if not math.isfinite(found[f"{name}_gradient_norm"])]
        if spoilt:
            raise _Collapse(f"the gradient of the {' and the '.join(spoilt)} subnet is not finite")
        found = {name: value if math.isfinite(value) else None for name, value in found.items()}
        spent = {"macs": float(self.runner.macs), "seconds": round(self.seconds, 2), "rollbacks": float(self.rollbacks)}
        self.results = {"loss": loss, **found, **spent}
        self._record({"step": self.step, "epoch": epoch, **self.results})
        collapse = self.guard.collapse(found, watched)
        if collapse:
            raise _Collapse(collapse)
        if self.guard.stuck and self.workers.is_first:
            log.warning(
                "the %s subnet has never been better than guessing: train longer, or try another train.learning_rate",
                " and the ".join(self.guard.stuck),
            )
        self._save(good=self.guard.healthy)

    @property
    def _evaluated(self) -> Supernet:
        """What is worth evaluating: the average of the weights, where one is kept."""
        return self.supernet if self.average is None else cast(Supernet, self.average.module)

    def _record(self, entry: Mapping[str, object]) -> None:
        if self.folder is not None and self.workers.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")

    def _roll_back(self, reason: str) -> None:
        """Go back to the last good state, with a lower learning rate; the report goes to log and metrics."""
        at = self.step
        if self.rollbacks == RETRIES or self._good is None:
            raise TrainingDiverged(self._divergence(reason))
        self._tick()
        rollbacks, seconds = self.rollbacks + 1, self.seconds
        macs, arithmetic = self.runner.macs, self.runner.arithmetic
        self._unpack(*self._good)
        self.rollbacks, self.seconds = rollbacks, seconds  # what was spent stays spent
        self.runner.macs, self.runner.arithmetic = macs, arithmetic
        rate = self.settings.learning_rate * LOWER**rollbacks
        log.warning(
            "%s at step %d: going back to step %d with a learning rate of %g at most", reason, at, self.step, rate
        )
        if self.folder is not None and self.workers.is_first:
            _truncate_metrics(self.folder, self.step)
        self._record(
            {"step": self.step, "event": "rollback", "reason": f"{reason} at step {at}", "learning_rate": rate}
        )
        self._save()

    def _divergence(self, what: str) -> str:
        good = self.folder is not None and self._good is not None and self._good[1]["step"]
        kept = f"the last good checkpoint stays in {self.folder / GOOD}; " if self.folder and good else ""
        tried = f" after {self.rollbacks} attempts with lower learning rates" if self.rollbacks else ""
        return (
            f"{what} at step {self.step} of {self.steps}{tried}; {kept}"
            f"lower train.learning_rate (now {self.settings.learning_rate:g}) or raise train.warmup "
            f"(now {self.settings.warmup:g}) and start again"
        )

    def _keep_average(self) -> None:
        """The average is what was evaluated, so it is what is left in the supernet."""
        if self.average is not None:
            with torch.no_grad():
                for own, averaged in zip(self.supernet.parameters(), self.average.module.parameters(), strict=True):
                    own.copy_(averaged)

    # checkpoints ---------------------------------------------------------------------------------------

    def _save(self, *, good: bool = False) -> None:
        """Keep the state; a good one is one that a collapse may go back to."""
        tensors, state = self._pack()
        spoilt = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if float(self.workers.mean(torch.tensor(float(spoilt is not None)))):  # norm statistics differ between workers
            # the loss would only show it one step later, when the checkpoint is spoilt too
            raise _Collapse(f"{spoilt or 'a tensor of another process'} is not finite")
        if good:
            self._good = _on_cpu(tensors), state
        if self.folder is not None and self.workers.is_first:
            if good:
                save_checkpoint(self.folder / GOOD, self.step, tensors, state)
            save_checkpoint(self.folder / LATEST, self.step, tensors, state)

    def _pack(self) -> tuple[Tensors, dict[str, Any]]:
        tensors = {f"weights/{name}": tensor for name, tensor in self.supernet.state_dict().items()}
        for name, parameter in self.supernet.named_parameters():
            held = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{name}/{key}": value for key, value in held.items() if isinstance(value, Tensor)}
        if self.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.module.named_parameters()}
        if self.runner.teacher is not None:
            tensors |= {f"teacher/{name}": tensor for name, tensor in self.runner.teacher.state_dict().items()}
        lowest = self.runner.lowest_variance
        return tensors, {
            "step": self.step,
            "steps": self.steps,
            "arithmetic": self.runner.arithmetic,
            "results": self.results,
            "settings": asdict(self.settings),
            **self._identity(),
            "rollbacks": self.rollbacks,
            "macs": self.runner.macs,
            "seconds": self.seconds,
            "losses": self.losses,
            "guard": self.guard.state(),
            "averaged": int(self.average.n_averaged) if self.average is not None else 0,
            "lowest_variance": lowest if math.isfinite(lowest) else None,
        }

    def _unpack(self, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Put a state back; the inverse of `_pack`."""
        self.supernet.load_state_dict(_under("weights/", tensors))
        self.optimizer.state.clear()
        for name, parameter in self.supernet.named_parameters():
            held = _under(f"optimizer/{name}/", tensors)
            if held:  # AdamW counts its steps on the CPU
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(self.workers.device, copy=True)
                    for key, value in held.items()
                }
        if self.average is not None:
            self.average.module.load_state_dict(_under("average/", tensors), strict=False)
            self.average.n_averaged.fill_(state["averaged"])
        self.runner.teacher = None
        taught = _under("teacher/", tensors)
        if taught:
            self.runner.freeze_teacher().load_state_dict(taught)
        self.step, self.rollbacks = int(state["step"]), int(state["rollbacks"])
        self.runner.arithmetic, self.runner.macs = str(state["arithmetic"]), int(state["macs"])
        lowest = state["lowest_variance"]
        self.runner.lowest_variance = math.inf if lowest is None else float(lowest)
        self.seconds, self.results = float(state["seconds"]), dict(state["results"])
        self.losses = list(state["losses"])
        self.guard.restore(state["guard"])

    def _restore(self) -> None:
        """Go on from the checkpoint of the folder, if there is one."""
        kept = (self._kept(LATEST), self._kept(GOOD)) if self.workers.is_first else None
        found, self._good = self.workers.broadcast(kept)
        if self._good is None:  # nothing is good yet but the beginning
            tensors, state = self._pack()
            self._good = _on_cpu(tensors), state
        if found is not None:
            self._unpack(*found)
        if self.folder is not None and self.workers.is_first:
            _truncate_metrics(self.folder, self.step)
        if 0 < self.step < self.steps:
            log.info("going on from step %d of %d", self.step, self.steps)

    def _kept(self, where: Path) -> tuple[Tensors, dict[str, Any]] | None:
        found = load_checkpoint(self.folder / where) if self.folder is not None else None
        if found is None:
            return None
        tensors, state = found
        wanted = self._identity()
        changed = [
            f"{name} ({state.get(name)!r} then, {value!r} now)"
            for name, value in wanted.items()
            if state.get(name) != value
        ]
        held = cast(dict[str, object], state["settings"])
        now = asdict(self.settings)
        changed += [
            f"{name} ({held.get(name)!r} then, {now[name]!r} now)" for name in now if held.get(name) != now[name]
        ]
        if changed:
            raise ValueError(
                f"{self.folder} was trained with another {', '.join(changed)}; "
                "use another run directory, or delete its supernet folder"
            )
        return tensors, state

    def _identity(self) -> dict[str, object]:
        """What a checkpoint must be of, beside the settings, for this training to go on from it."""
        return {
            "space": self.supernet.space.name,
            "data": self.data.key,
            "seed": self.seed,
            "strategy": type(self.strategy).__qualname__,
        }


def load_weights(supernet: Supernet, tensors: Tensors) -> None:
    """Put the weights of a checkpoint into a supernet of the same space: their average, if one was kept."""
    supernet.load_state_dict(_under("weights/", tensors))
    supernet.load_state_dict(_under("average/", tensors), strict=False)


def _on_cpu(tensors: Tensors) -> Tensors:
    """Copies, which do not take the memory of a GPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _truncate_metrics(folder: Path, step: int) -> None:
    """Drop what was recorded after the checkpoint, since it will be recorded again, and a line cut short."""
    path = folder / "metrics.jsonl"
    if path.exists():
        whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_text(path, "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step))


def _average(supernet: Supernet, decay: float) -> AveragedModel:
    """An exponential moving average that follows quickly at first, when there is little to average."""

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        kept = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averaged), list(current), 1 - kept)

    return AveragedModel(supernet, multi_avg_fn=update)


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
