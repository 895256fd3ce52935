"""What a process of a training needs to know of the others; without any it is rank 0 of 1."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Our own, because PyTorch deprecates torch.distributed.nn.functional.all_gather and moves what replaces it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        everyone = rows.new_empty(count() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, rows.contiguous())
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank's loss depends on these rows: their gradients add up.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(count())[rank()]


def gather(rows: Tensor) -> Tensor:
    """[B, ...] of each rank, equally many -> [count * B, ...] on every rank, by rank; with gradient."""
    return rows if count() == 1 else _Gather.apply(rows)
