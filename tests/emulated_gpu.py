"""Emulation of a GPU on machines without one: tensors that report cuda:0 as their device and compute on the CPU.

Operations between tensors on different devices, and `numpy()` of a GPU tensor, raise the errors of a real GPU. As on a real GPU, a
zero-dimensional CPU tensor may be combined with a GPU tensor, and indices may be on the CPU. Autocast is that of the CPU with the
GPU's precision. `memory` counts the bytes of all tensors on the emulated GPU. Streams and speed are not emulated.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
CROSS_DEVICE = {"copy_", "_to_copy"}
"""Operations between tensors on different devices that are allowed."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations whose indices may be on the CPU."""
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
"""Operations whose result the program waits for."""
FROM_MEMORY = {torch.tensor, torch.as_tensor}
"""Functions that copy values from main memory to the device that they are given."""
UNWRAPPED = {torch.Tensor.quantile, torch.quantile}
"""Functions that are called with plain CPU tensors: their C++ code creates intermediate tensors on a device of its own choice."""


class Memory:
    """Bytes of the tensors on the emulated GPU; tensors that share storage count once."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0
        self._tensors: dict[int, int] = {}

    def add(self, tensor: "OnGpu") -> None:
        """Count a new tensor until it is deleted."""
        storage = tensor.inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._tensors[key] = self._tensors.get(key, 0) + 1
        if self._tensors[key] == 1:
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        weakref.finalize(tensor, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if self._tensors[key] == 0:
            self.allocated -= size

    def reset_peak(self) -> None:
        """Forget earlier peaks."""
        self.peak = self.allocated


memory = Memory()


class Transfers:
    """Record of copies between main memory and the emulated GPU, and of results that the program waits for."""

    def __init__(self) -> None:
        self._packages: tuple[str, ...] = ()
        self.places: set[str] = set()
        """Module, function and kind of each transfer."""

    @contextmanager
    def recorded(self, *packages: str) -> Iterator[set[str]]:
        """Context manager that records transfers.

        Args:
            packages: Packages whose innermost function is recorded.
        """
        self._packages, self.places = packages, set()
        try:
            yield self.places
        finally:
            self._packages = ()

    def add(self, kind: str) -> None:
        """Record a transfer under the function that caused it."""
        frame = sys._getframe() if self._packages else None
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.split(".")[0] in self._packages:
                self.places.add(
                    f"{module}.{frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name}: {kind}"
                )
                return
            frame = frame.f_back


transfers = Transfers()
STUBS: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "is_bf16_supported": lambda *_, **__: True,
    "get_rng_state_all": list,
    "max_memory_allocated": lambda *_: memory.peak,
    "reset_peak_memory_stats": lambda *_: memory.reset_peak(),
    "mem_get_info": lambda *_: (5 * 10**9, 8 * 10**9),
    "get_device_name": lambda *_: "emulated GPU",
    **dict.fromkeys(["set_device", "synchronize", "empty_cache"]),
    **dict.fromkeys(["manual_seed", "manual_seed_all", "set_rng_state_all"]),
}


class OnGpu(Tensor):
    """A tensor on the emulated GPU."""

    inner: Tensor
    """The values, on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        # For torch's C++ code it is a CPU tensor: a CUDA tensor would need a driver.
        return torch.Tensor._make_wrapper_subclass(  # type: ignore
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner
        memory.add(self)

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)  # type: ignore
    is_cuda = property(lambda self: True)  # type: ignore
    is_cpu = property(lambda self: False)  # type: ignore

    def get_device(self) -> int:
        return 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # saved as a CPU tensor

    def __repr__(self, **_: Any) -> str:  # type: ignore
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:  # type: ignore
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        on_cpu = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, OnGpu)]
        if name in INDEXING and isinstance(args[0], OnGpu):
            on_cpu = [t for t in args[2:3] if isinstance(t, Tensor) and not isinstance(t, OnGpu)]
        if any(t.dim() > 0 for t in on_cpu) and name not in CROSS_DEVICE:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} of cuda:0 and cpu")
        if name in WAITING or (name in INDEXING and any(_is_mask(t) for t in tree_leaves(args[1:2]))):
            transfers.add("wait")
        elif any(
            t.dim() > 0
            for t in tree_leaves((args[1:2] if name in INDEXING else args, kwargs))
            if isinstance(t, Tensor) and not isinstance(t, OnGpu)
        ):
            transfers.add("copy")
        result = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        if name == "copy_" and not isinstance(args[0], OnGpu):
            return args[0]
        result = tree_map(lambda t: OnGpu(t) if isinstance(t, Tensor) and not isinstance(t, OnGpu) else t, result)
        return return_and_correct_aliasing(func, args, kwargs, result)


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return OnGpu(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore
        return to_cpu(gradient)


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: OnGpu) -> Tensor:
        return tensor.inner.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore
        return OnGpu(gradient)


def to_cpu(value: Any) -> Any:
    """Return the CPU tensor of an `OnGpu` without a copy, and anything else unchanged."""
    return value.inner if isinstance(value, OnGpu) else value


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _moved(value: Any, device: torch.device, asynchronous: bool = False) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, OnGpu) == (device.type == "cuda"):
        return value
    assert value.device.type != "meta", "a meta tensor has no values to move"
    if not asynchronous:
        transfers.add("copy" if device.type == "cuda" else "wait")
    return (_ToGpu if device.type == "cuda" else _ToCpu).apply(value)


def _device(value: Any) -> "torch.device | None":
    """Return the device that an argument names; None if it names none, or the meta device."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda")):
        device = torch.device(value)
        return device if device.type in ("cpu", "cuda") else None
    return None


class _Devices(TorchFunctionMode):
    """Replaces device arguments before torch needs a driver, and moves the results."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            return _moved(first, GPU if func is torch.Tensor.cuda else torch.device("cpu"))
        if func is torch.Tensor.pin_memory:
            return first
        if func is torch.Tensor.tolist:
            transfers.add("wait")
            return to_cpu(first).tolist()
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(first, OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.new_tensor and isinstance(first, OnGpu) and "device" not in kwargs:
            return _moved(torch.tensor(args[1], dtype=kwargs.get("dtype", first.dtype)), GPU)
        if func in UNWRAPPED and isinstance(first, OnGpu):
            return OnGpu(func(first.inner, *args[1:], **kwargs))
        device = _device(kwargs.get("device"))
        if device is None:
            return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        if func in (torch.tensor, torch.as_tensor) and not isinstance(first, Tensor):
            args = (tree_map(to_cpu, first), *args[1:])
        # Filled on the GPU, where only values come from main memory.
        created = func(*args, **kwargs)
        return tree_map(lambda value: _moved(value, device, func not in FROM_MEMORY), created)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        for value in args:
            if isinstance(value, Tensor):
                target, dtype = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif not isinstance(value, (bool, type(None))):  # flags, as in `to(device, dtype, non_blocking)`
                target = value
        device = _device(target)
        asynchronous = kwargs.pop("non_blocking", False)
        result = tensor.to(dtype=dtype, **kwargs) if target is None or device else tensor.to(target, dtype, **kwargs)
        return _moved(result, device or tensor.device, asynchronous)


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Context manager that emulates one GPU."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    run_backward, run_thread = torch.autograd._engine_run_backward, threading.Thread.run

    def emulated_backward(*args: Any, **kwargs: Any) -> Any:  # torch leaves the mode before it calls the engine
        with _Devices():
            return run_backward(*args, **kwargs)

    def emulated_run(thread: threading.Thread) -> None:  # modes are thread-local
        with _Devices():
            run_thread(thread)

    init_autocast = torch.autocast.__init__

    def cpu_autocast(self: torch.autocast, device_type: str, dtype: Any = None, **kwargs: Any) -> None:
        init_autocast(self, "cpu", torch.float16 if device_type == "cuda" and dtype is None else dtype, **kwargs)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.autocast, "__init__", cpu_autocast))
        patches.enter_context(mock.patch.object(threading.Thread, "run", emulated_run))
        for name, stub in STUBS.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, stub or (lambda *_, **__: None)))
        patches.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", emulated_backward))
        health_check = "_accelerator_graph_capture_health_check"
        patches.enter_context(mock.patch.object(torch.optim.Optimizer, health_check, lambda self: None, create=True))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        patches.enter_context(_Devices())
        yield
