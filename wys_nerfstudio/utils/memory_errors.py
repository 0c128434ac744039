"""Conversion of out-of-memory errors, of a GPU or of the main memory, to a sentence."""

import errno
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from wys_nerfstudio.utils.errors import WysError

MESSAGES = (
    "out of memory",
    "out_of_memory",
    "alloc_failed",
    "allocate memory",
    "not enough memory",
    "unable to find a valid cudnn algorithm",
)
"""Parts of the messages, in lower case, of CUDA, cuBLAS, cuDNN, tiny-cuda-nn and torch's CPU allocator."""


class MemoryExhaustedError(WysError):
    """The memory does not suffice for what was tried; the message says what to change."""


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in MESSAGES)


@contextmanager
def convert_memory_errors(activity: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Convert errors of memory that ran out to a `MemoryExhaustedError`, after freeing what the failed code held.

    Args:
        activity: What was done, such as "while views were edited".
        remedy: Return what to change, in words that follow a colon, with a full stop.

    Raises:
        MemoryExhaustedError: If memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_memory_error(error):
            raise
        # The traceback keeps every tensor of the failed calls alive.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        torch.cuda.empty_cache()
        on_cpu = isinstance(error, (MemoryError, OSError)) or "CPUAllocator" in str(error)
        place = "The computer" if on_cpu else "The GPU"
        raise MemoryExhaustedError(f"{place} ran out of memory {activity}: {remedy()}") from error
