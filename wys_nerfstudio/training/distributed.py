"""Several processes that train one scene, one device each. In a single process every function is trivial.

Every process (rank) holds the whole scene and all views. Gradients are averaged by torch's DistributedDataParallel, maps and
edits are sharded and gathered, commands of the viewer are broadcast from rank 0, and only rank 0 writes files.
"""

import functools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wys_nerfstudio.utils.errors import WysError

LOST_RANK_MESSAGES = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "gloo")
"""Parts of torch's error messages when another process has ended."""
T = TypeVar("T")
P = ParamSpec("P")


def world_size() -> int:
    """Return the number of processes that train the scene."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def shard(items: Sequence[T]) -> list[T]:
    """Return this process's items. Every item belongs to one process; counts differ by at most one."""
    return list(items[rank() :: world_size()])


def gather(value: T) -> list[T]:
    """Collective: return the values of all processes in the order of their ranks. Tensors must be on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_main(get: Callable[[], T]) -> T:
    """Collective: call `get` on rank 0 and return its value on all. Tensors must be on the CPU."""
    if world_size() == 1:
        return get()
    values = [get() if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore


def broadcast_parameters(module: nn.Module) -> None:
    """Collective: copy the parameters of rank 0 to all."""
    if world_size() > 1:
        for parameter in module.parameters():
            dist.broadcast(parameter.data, src=0)


def wrap_ddp(model: nn.Module) -> DistributedDataParallel:
    """Collective: wrap a model so that every backward pass averages its gradients over all processes."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


def main_process_only(function: Callable[P, None]) -> Callable[P, None]:
    """Make a function do nothing except on rank 0. For file writes: all processes would write the same."""

    @functools.wraps(function)
    def wrapper(*arguments: P.args, **named: P.kwargs) -> None:
        if rank() == 0:
            function(*arguments, **named)

    return wrapper


@contextmanager
def convert_lost_rank_errors() -> Iterator[None]:
    """Convert torch's error about a lost process to a `WysError`."""
    try:
        yield
    except RuntimeError as error:
        message = textwrap.shorten(str(error), 100)
        if world_size() == 1 or not any(part in message.lower() for part in LOST_RANK_MESSAGES):
            raise
        raise WysError(
            f"Another of the {world_size()} processes that train this scene seems to have ended ({message}), so this one "
            f"(rank {rank()}) ends too: see the last lines of the other one's output."
        ) from error
