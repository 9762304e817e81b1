"""One run over several processes (``torchrun``): images and classes are split by rank, the step is that of one process.

Every rank holds all parameters. The loss of a step is the mean of the ranks' losses: a mean over images is the mean of equal
shares of the batch, and what does not depend on images is the same on each. Class features are computed by rank, class r,
r + size, ..., and gathered; on the way back each rank gets the sum of all ranks' gradients for its own classes. Then the mean
of all ranks' parameter gradients is exactly the gradient of one process.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from plpp_reg.errors import InputError

T = TypeVar("T")


class Ranks(NamedTuple):
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``size``-th, from this rank's on."""
        return items[self.rank :: self.size]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """The mean over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.size

    @torch.no_grad()
    def mean_values(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """Scalar tensors as plain numbers, the mean over the ranks, in one transfer; a rank's inf or nan is everyone's."""
        values = torch.stack([scalar.reshape(()) for scalar in scalars.values()])
        if self.size > 1:
            values = values.to(_device(), torch.float64)
            self.average([values])
        return dict(zip(scalars, values.tolist(), strict=True))

    def total(self, counts: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.size > 1:
            on_device = counts.to(_device())
            dist.all_reduce(on_device)
            counts = on_device.to(counts.device)
        return counts

    def of_the_first(self, number: int) -> int:
        """The first rank's value on every rank."""
        return int(self.total(torch.tensor(number if self.first else 0)))

    def all_agree(self, this: bool) -> bool:
        """Whether it holds on every rank."""
        return this if self.size == 1 else int(self.total(torch.tensor(int(this)))) == self.size

    def gather_rows(self, share: Tensor, count: int) -> Tensor:
        """(rows of this rank, ...) -> (count, ...): the inverse of :meth:`share`, differentiable."""
        return share if self.size == 1 else _GatherRows.apply(share, count, self)


class _GatherRows(torch.autograd.Function):
    """all_gather of interleaved rows; the gradient of a row is the sum over the ranks, at the rank that made it."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, count: int, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        most = -(-count // ranks.size)
        device = share.device
        padded = share.new_zeros(most, *share.shape[1:])
        padded[: len(share)] = share
        padded = padded.to(_device())
        parts = [torch.empty_like(padded) for _ in range(ranks.size)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, 1).flatten(0, 1)[:count].to(device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.share(ctx.ranks.total(gradient.contiguous())).contiguous(), None, None


def _device() -> torch.device:
    """Where the backend's collectives work."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def current() -> Ranks:
    """Of the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def start(use_cuda: bool) -> Ranks:
    """Join the processes that ``torchrun`` has started; alone, nothing happens."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        cuda = use_cuda and torch.cuda.is_available()
        if cuda:
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise InputError(f"--nproc-per-node: expected at most {gpus} processes, one a GPU, got more")
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    return current()
