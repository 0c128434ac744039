"""Seconds and peak memory of work on a device."""

import gc
import sys
import time
from collections.abc import Callable

import torch

from wys_nerfstudio.cli.check_table import Table


def synchronize(device: torch.device) -> None:
    """Wait for the work that a GPU was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mean_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the mean wall-clock seconds of a call, after one for warmup."""
    work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def reset_peak_memory(device: torch.device) -> None:
    """Free unused memory and start `peak_memory` anew; on the CPU it counts from the start of the process."""
    gc.collect()  # the first load of an editor in a process leaves its networks in reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> Table:
    """Return the peak memory in GB as a row: what torch allocated on a GPU, or what this process occupied in all."""
    if device.type == "cuda":
        return {"peak memory, GB": torch.cuda.max_memory_allocated(device) / 1e9}
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak memory of this process, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
