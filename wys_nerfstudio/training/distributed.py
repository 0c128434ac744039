"""Several processes that train one scene, a device each: what they tell each other. In a single process all of it is trivial.

Every process, or rank, holds the whole scene and all views. They stay one run because gradients are averaged (torch's
DistributedDataParallel), because each makes a share of the maps and edits and all get the results, because all do what the
first one has heard from its user, and because the first one alone writes files.
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

LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "gloo")
"""What torch's errors speak of when another rank is gone."""
T = TypeVar("T")
P = ParamSpec("P")


def world_size() -> int:
    """Number of processes that train the scene."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0 on."""
    return dist.get_rank() if world_size() > 1 else 0


def shard(items: Sequence[T]) -> list[T]:
    """This rank's items: every item belongs to one rank, and no rank has two more than another."""
    return list(items[rank() :: world_size()])


def gather(mine: T) -> list[T]:
    """What each rank brings, in the order of the ranks; tensors must be on the CPU. All ranks must come here."""
    if world_size() == 1:
        return [mine]
    everyones: list[T] = [mine] * world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def broadcast_from_main(get: Callable[[], T]) -> T:
    """What the first rank gets; the others do not ask. Tensors must be on the CPU. All ranks must come here."""
    if world_size() == 1:
        return get()
    told = [get() if rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    return told[0]  # type: ignore


def broadcast_parameters(module: nn.Module) -> None:
    """Gives all ranks the first one's parameters. All ranks must come here."""
    if world_size() > 1:
        for parameter in module.parameters():
            dist.broadcast(parameter.data, src=0)


def wrap_ddp(model: nn.Module) -> DistributedDataParallel:
    """Wraps a model whose every backward pass averages its gradients over the ranks. All ranks must come here."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


def main_process_only(function: Callable[P, None]) -> Callable[P, None]:
    """For what is done to files: what ranks would write is equal, so the first one does it and the others do nothing."""

    @functools.wraps(function)
    def on_first(*arguments: P.args, **named: P.kwargs) -> None:
        if rank() == 0:
            function(*arguments, **named)

    return on_first


@contextmanager
def convert_lost_rank_errors() -> Iterator[None]:
    """Makes a `WysError` of what torch raises when another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        said = textwrap.shorten(str(error), 100)
        if world_size() == 1 or not any(word in said.lower() for word in LOST):
            raise
        raise WysError(
            f"Of the {world_size()} processes that train this scene another one seems to have ended ({said}), so this one "
            f"(rank {rank()}) ends too: see what that one said last."
        ) from error
