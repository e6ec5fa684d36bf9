"""Training in several processes at once: what a process knows of the others, and how they agree.

`torchrun --nproc-per-node N -m nas train ...` starts N processes with the same arguments. All train the same
architectures, which the seed chooses, each on its share of every batch; torch's DistributedDataParallel averages
the gradients (over gloo on CPUs, nccl on GPUs), so all hold the same weights, to the bit. What follows:

- A batch norm sees a process's share of the batch only, and each process has running statistics of its own. Those
  of the first are kept: whoever wants an accuracy recalibrates them anyway.
- The first process alone evaluates, prints and writes; the others meanwhile wait for its next step.
- Where a process ends, by an error or a signal, its connections close: the others raise WorkerLost at their next
  exchange instead of waiting, and torchrun ends them too. One that lives but hangs is given up after TIMEOUT.

One process alone needs neither torchrun nor a process group: everything here then does nothing.
"""

from __future__ import annotations

import inspect
import io
import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=30)  # far more than what the first process does alone: an evaluation, a checkpoint

# gloo raises plain RuntimeErrors: parts of their texts where the other end is gone or silent
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "pair closure", "Timed out waiting")

_TRAININGS = itertools.count()  # of this process; the others count alike


class WorkerLost(RuntimeError):
    """Another process of the training ended, or did not answer within TIMEOUT."""


@dataclass(frozen=True)
class Workers:
    """This process among the `count` that train together; all must call the same methods in the same order.

    rank: 0 for the first, which evaluates, prints and writes.
    device: where this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def alone(self) -> Workers:
        """This process without the others, for work that they do not share."""
        return Workers(0, 1, self.device)

    def share(self, positions: np.ndarray) -> np.ndarray:
        """This process's part of a batch; all parts together are the batch, and sizes differ by at most one.

        Raises ValueError when there are fewer positions than processes.
        """
        if len(positions) < self.count:
            raise ValueError(
                f"a batch of {len(positions)} images for {self.count} processes; expected one image or more for each: "
                "raise train.batch_size or start fewer processes"
            )
        return np.array_split(positions, self.count)[self.rank]

    def factor(self, share: int, whole: int) -> float:
        """Times this, the mean loss over a share of so many images gives the gradient of that over the whole batch.

        DistributedDataParallel takes the mean over processes as if their shares were of one size.
        """
        return share * self.count / whole

    def mean(self, values: Tensor) -> Tensor:
        """Elementwise mean over all processes, the same on each; not finite where one of them is not."""
        return self._reduced(values, dist.ReduceOp.SUM) / self.count

    def lowest(self, values: Tensor) -> Tensor:
        """Elementwise minimum over all processes, the same on each."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.count == 1:
            return values.detach()
        reduced = values.detach().to(self.device, copy=True)
        dist.all_reduce(reduced, how)
        return reduced.to(values.device)

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on all: numbers, text, None and tensors (on the CPU then), nested as one likes."""
        if self.count == 1:
            return value
        packed = io.BytesIO()
        torch.save(value if self.is_first else None, packed)
        content = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8).to(self.device)
        size = torch.tensor(len(content), device=self.device)
        dist.broadcast(size, src=0)
        if not self.is_first:
            content = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, src=0)
        received = io.BytesIO(content.cpu().numpy().tobytes())
        return torch.load(received, map_location="cpu", weights_only=True)  # which executes nothing

    # gradients -------------------------------------------------------------------------------------------

    def wrap(self, supernet: nn.Module) -> nn.Module:
        """`supernet`, or where several processes train, a module whose backward pass averages gradients over them.

        It is called as `supernet` is. All processes hold the first one's weights afterwards. Each pass that is
        trained goes through what this returns, inside `accumulating`; passes without gradients go through the
        supernet itself, on as few processes as one likes. Parameters may change in place, but must stay the same
        objects.
        """
        if self.count == 1:
            return supernet
        # Running statistics stay each process's own. torch 2.13 renamed the option that says so.
        known = inspect.signature(DistributedDataParallel).parameters
        own_statistics = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        # A pass leaves the parameters of larger architectures without gradients: unless they are looked for, the
        # exchange waits for them forever.
        options: dict[str, Any] = {"find_unused_parameters": True, own_statistics: False}
        return DistributedDataParallel(_Passes(supernet), **options)

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward pass of a step: only its `last` one exchanges the gradients of all.

        Gradients add up in the passes before, and the last exchange takes them all, also those of parameters that
        it does not use itself: one exchange a step, however many passes. Parameters that no process used keep no
        gradient, so that momentum and weight decay leave them alone, as they do with one process.
        """
        if last or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()


class _Passes(nn.Module):
    """What DistributedDataParallel is given: the supernet, and a parameter that no pass ever uses.

    torch warns on stderr, from C++, when the first pass that it looks at uses all parameters, as that of a largest
    network does: it takes looking for unused ones for a mistake then. The optimizer never sees this one.
    """

    def __init__(self, supernet: nn.Module) -> None:
        super().__init__()
        self.supernet = supernet
        self.unused = nn.Parameter(next(supernet.parameters()).detach().new_zeros(1))

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        logits: Tensor = self.supernet(*arguments, **options)
        return logits


# processes -----------------------------------------------------------------------------------------------


def is_first_process() -> bool:
    """Whether this process prints and writes: torchrun started no other, or this one as the first."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def workers() -> Iterator[Workers]:
    """This process among those that torchrun started with it, connected while the block lasts; alone without torchrun.

    A process group that is there already is used, and left to whoever made it.
    Raises ValueError for more processes than GPUs, WorkerLost where another process ends before its time.
    """
    device = _device()
    if dist.is_initialized():
        yield Workers(dist.get_rank(), dist.get_world_size(), device)
        return
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Workers(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # nccl takes the current one
    try:
        store, rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
        # torchrun's store outlives a group: the next one of this process must not read where the last one listened
        store = dist.PrefixStore(f"training {next(_TRAININGS)}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        yield Workers(rank, count, device)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(part in str(error) for part in _LOST):
            raise WorkerLost(
                "another process of this training ended or hung: its own message says why; "
                "start the same command again and it goes on from the last checkpoint"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device() -> torch.device:
    """The GPU of this process, the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise ValueError(
            f"process {local + 1} of this machine has no GPU, there are {found}; expected one for each: "
            "lower --nproc-per-node, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return torch.device("cuda", local)
