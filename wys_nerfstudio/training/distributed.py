"""Several processes that train one scene, one device each. In a single process every function is trivial.

Every process (rank) holds the whole scene and all views. Gradients are averaged by torch's DistributedDataParallel, maps and
edits are sharded and gathered, commands of the viewer are broadcast from rank 0, and only rank 0 writes files.

Tensors of the model are exchanged over the default group (NCCL on GPUs), everything else over a gloo group of its own.
"""

import functools
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Optional, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

from wys_nerfstudio.utils.errors import WysError

LOST_RANK_MESSAGES = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "gloo")
"""Parts of torch's error messages when another process has ended."""
GRACE_SECONDS = 2.0
"""Time that a process has to end by itself after another one has ended."""
FINISHED = 1
"""Tag of the message that a process sends when it has finished its work."""
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


@functools.cache
def object_group() -> dist.ProcessGroup:
    """Collective on the first call: return the group that exchanges Python objects.

    On NCCL they would pass through GPU memory, and a process that waits there notices nothing. Here nothing times out: a rank may
    wait long for another one, and a lost one closes its connections.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))  # type: ignore  # this process is a member


def gather(value: T) -> list[T]:
    """Collective: return the values of all processes in the order of their ranks. Tensors must be on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value, group=object_group())
    return values


def broadcast_from_main(get: Callable[[], T]) -> T:
    """Collective: call `get` on rank 0 and return its value on all. Tensors must be on the CPU."""
    if world_size() == 1:
        return get()
    values = [get() if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, group=object_group())
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


def _lost_rank_error(reason: Exception) -> WysError:
    return WysError(
        f"Another of the {world_size()} processes that train this scene seems to have ended "
        f"({textwrap.shorten(str(reason), 100)}), so this one (rank {rank()}) ends too: see the last lines of the other one's "
        "output."
    )


@contextmanager
def convert_lost_rank_errors() -> Iterator[None]:
    """Convert torch's error about a lost process to a `WysError`."""
    try:
        yield
    except RuntimeError as error:
        message = str(error).lower()
        if world_size() == 1 or not any(part in message for part in LOST_RANK_MESSAGES):
            raise
        raise _lost_rank_error(error) from error


class PeerMonitor:
    """Collective context manager: ends this process when another one has ended early, even while this one is blocked.

    On NCCL a process that waits for a lost one is blocked in C++, where it neither raises nor handles signals. Therefore a thread
    waits for the next rank to report that it has finished; the connection closes when that process ends without. Each rank
    watches the next one only: ends propagate around the ring.

    The watch begins with the construction. Processes leave the context together, except for errors.
    """

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if world_size() > 1:
            object_group()
            self._thread.start()

    def __enter__(self) -> "PeerMonitor":
        return self

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        # An interrupted run ends all processes with SystemExit at the same step.
        if world_size() > 1 and kind in (None, SystemExit):
            dist.send(torch.zeros(1), dst=(rank() - 1) % world_size(), group=object_group(), tag=FINISHED)
            self._thread.join()

    def _watch(self) -> None:
        try:
            dist.recv(torch.zeros(1), src=(rank() + 1) % world_size(), group=object_group(), tag=FINISHED)
        except RuntimeError as error:
            time.sleep(GRACE_SECONDS)  # unless it is blocked, this process ends with a sentence of its own
            print(f"wys: {_lost_rank_error(error)}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def shorten_launcher_errors() -> None:
    """Replace the traceback with which nerfstudio's launcher ends after one of its processes by a sentence."""
    previous = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, traceback: Optional[TracebackType]) -> None:
        if isinstance(error, ProcessExitedException):
            print(f"wys: The run has ended, because {error}: see the last lines of its output.", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = report
