"""A fake CUDA device: everything that Inductor needs of a GPU to generate code for it.

Inductor does not use the GPU before it loads the module that it has generated. Until then it needs four things. The caller's
FakeTensorMode has the first, tensors whose device is "cuda". `fake_device` has the others: properties of the device (a
DeviceInterface and some `torch.cuda` functions), a target for Triton, and a C++ device guard, which a CPU build of torch
lacks. On exit everything is as it was, and nothing about the fake device is left in a cache.

This replaces functions of torch for all threads of the process. So `explain` does it in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.fx.experimental import proxy_tensor
from torch.utils._pytree import tree_map

from fp6_compile._compat import inductor
from fp6_compile._compat.torch import TorchDispatchMode, ensure_cuda_device_guard_set
from fp6_compile.fake_gpu.attention import attention_of_a_gpu
from fp6_compile.fake_gpu.devices import Device
from fp6_compile.fake_gpu.driver import fake_target

# shape_padding times two matmuls, which a fake device cannot; worker processes would not see what is replaced here.
_CONFIG = {"shape_padding": False, "compile_threads": 1}


@contextlib.contextmanager
def fake_device(device: Device) -> Iterator[None]:
    """Inside, cuda:0 is `device`, an NVIDIA GPU, to Inductor and Triton.

    Raises ImportError where Triton is not installed, and OSError or ValueError where torch's C++ library is not as expected.
    """
    properties = _properties(device)
    interface = _interface(properties)
    registry = inductor.device_interfaces()
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_the_device)
        stack.enter_context(fake_target(properties.cc))
        for name, answer in _answers(properties).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.dict(registry, {"cuda": interface, "cuda:0": interface}))
        stack.enter_context(inductor.config.patch(_CONFIG))
        stack.enter_context(attention_of_a_gpu())
        # AOTAutograd would compute with small constants, such as torch.tensor([], device="cuda"), on the device.
        stack.enter_context(mock.patch.object(proxy_tensor, "CONSTANT_NUMEL_LIMIT", -1))
        stack.enter_context(
            mock.patch.object(inductor.ConstantFolder, "run", _fold_on_cpu(inductor.ConstantFolder.run))
        )
        stack.enter_context(_device_guard())
        _forget_the_device()
        yield


def _properties(device: Device) -> types.SimpleNamespace:
    """What `torch.cuda.get_device_properties` would say on it."""
    sm = int(device.arch or 0)
    return types.SimpleNamespace(
        name=device.reported,
        type="cuda",
        index=0,
        multi_processor_count=device.multiprocessors,
        cc=sm,
        major=sm // 10,
        minor=sm % 10,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048 if sm in (80, 90, 100) else 1536,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        L2_cache_size=device.l2_mb << 20,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=device.shared,
        shared_memory_per_multiprocessor=device.shared + 1024,
        gcnArchName="",
        uuid="00000000-0000-0000-0000-000000000000",
    )


def _interface(properties: types.SimpleNamespace) -> type:
    """The DeviceInterface of the fake device. What is not defined here is CudaInterface's, and raises an error."""

    class FakeWorker(inductor.CudaInterface.Worker):
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: properties)

    class FakeInterface(inductor.CudaInterface):
        Worker = FakeWorker
        device = staticmethod(lambda index: contextlib.nullcontext())
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)
        synchronize = staticmethod(lambda device=None: None)
        get_raw_stream = staticmethod(lambda index: 0)
        memory_allocated = staticmethod(lambda device=None: 0)
        get_device_properties = staticmethod(lambda device=None: properties)
        get_compute_capability = staticmethod(lambda device=None: properties.cc)
        is_triton_capable = staticmethod(lambda device=None: True)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)

    return FakeInterface


def _answers(properties: types.SimpleNamespace) -> dict[str, Callable[..., Any]]:
    """Functions of torch.cuda that Inductor calls directly instead of through the DeviceInterface."""
    return {
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
    }


class _OnCPU(TorchDispatchMode):
    """Operators that are to run on the GPU run on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda a: torch.device("cpu") if isinstance(a, torch.device) else a, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _fold_on_cpu(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`run` on the CPU: Inductor finds uniform constants by computing them."""

    def folding(self: Any) -> Any:
        with _OnCPU():
            return run(self)

    return folding


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Let a CPU build of torch index and copy fake CUDA tensors.

    `x[1:]` and `x.copy_(y)` set a C++ device guard before they dispatch, and a CPU build has none for CUDA ("PyTorch is
    not linked with support for cuda devices"). Meanwhile the meta device's guard, which does nothing, is CUDA's, too. In a
    CUDA build without a GPU, torch itself installs such a guard.
    """
    if torch.backends.cuda.is_built():
        ensure_cuda_device_guard_set()
        yield
        return
    cuda, meta = 1, 14  # c10::DeviceType
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    missing = not guards[cuda]
    if missing:
        guards[cuda] = guards[meta]
    try:
        yield
    finally:
        if missing:
            guards[cuda] = None


def _forget_the_device() -> None:
    """Empty every cache of Inductor's that may hold an answer about the device."""
    for module in inductor.MODULES_WITH_DEVICE_CACHES:
        members = list(vars(module).values())
        classes = [member for member in members if isinstance(member, type) and member.__module__ == module.__name__]
        members += [getattr(cls, attribute) for cls in classes for attribute in vars(cls)]
        for member in members:
            if isinstance(getattr(member, "__func__", member), functools._lru_cache_wrapper):
                member.cache_clear()
