"""Errors of memory that ran out, as torch and Python raise them."""

import errno
import weakref

import pytest
import torch

from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.memory_errors import MemoryExhaustedError, convert_memory_errors

GPU_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("gpu_memory.h:594 cuMemCreate(...) failed: CUDA_ERROR_OUT_OF_MEMORY"),
]
CPU_ERRORS = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
    MemoryError("Unable to allocate 8.00 GiB for an array"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize(
    ("error", "place"), [*((e, "GPU") for e in GPU_ERRORS), *((e, "computer") for e in CPU_ERRORS)]
)
def test_memory_errors_become_a_sentence(error: Exception, place: str) -> None:
    with pytest.raises(MemoryExhaustedError) as raised, convert_memory_errors("in a test", lambda: "use less."):
        raise error
    assert str(raised.value) == f"The {place} ran out of memory in a test: use less."


def test_torchs_own_error_of_the_cpu_is_recognized() -> None:
    with pytest.raises(MemoryExhaustedError, match="The computer"), convert_memory_errors("", lambda: ""):
        torch.empty(10**15)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space"), ValueError("out of memory"), WysError("a")],
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, convert_memory_errors("", lambda: pytest.fail("not needed")):
        raise error
    assert raised.value is error


def test_tensors_of_the_failed_call_are_freed() -> None:
    held: list[weakref.ref] = []

    def fail() -> None:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryExhaustedError) as raised, convert_memory_errors("", lambda: ""):
        fail()
    assert raised.value.__cause__ is not None and held[0]() is None
