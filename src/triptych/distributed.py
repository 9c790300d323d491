"""What the rest needs of torch.distributed: the identity on one process."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def all_mean(x: Tensor) -> Tensor:
    """Mean over processes, without gradient; x itself is left as it is."""
    if world_size() == 1:
        return x
    y = x.detach().clone()
    dist.all_reduce(y)
    return y / world_size()


def any_process(flag: bool, device: torch.device) -> bool:
    """Is it true on any process?  All must agree where one would otherwise wait for the others for ever."""
    if world_size() == 1:
        return flag
    return bool(all_mean(torch.tensor(float(flag), device=device)) > 0)


class _AllMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_mean(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_mean(grads[0])  # the mean over processes is its own adjoint


def all_mean_grad(x: Tensor) -> Tensor:
    """Mean over processes; each process's gradient flows to all of them."""
    return x if world_size() == 1 else cast(Tensor, _AllMean.apply(x))


def all_gather(x: Tensor, dim: int = 0) -> Tensor:
    """The processes' tensors, which have one shape, side by side along `dim`; without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts, dim)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        total = all_mean(grads[0].contiguous()) * world_size()
        return total.chunk(world_size(), ctx.dim)[rank()], None


def all_gather_grad(x: Tensor, dim: int = 0) -> Tensor:
    """`all_gather` through which each process's gradient flows back to where a row came from."""
    return x if world_size() == 1 else cast(Tensor, _AllGather.apply(x, dim))


def start() -> torch.device:
    """Join the group that torchrun describes, if any.  Returns this process's device."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def first_process_first(work: Callable[[], T]) -> T:
    """work() on every process, on each machine's first one before the others: what it downloads is there for them."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first and world_size() > 1:
        dist.barrier()
    done = work()
    if first and world_size() > 1:
        dist.barrier()
    return done


def from_main(work: Callable[[], T]) -> T:
    """What work() gives on the first process, on all of them."""
    if world_size() == 1:
        return work()
    box = [work() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
