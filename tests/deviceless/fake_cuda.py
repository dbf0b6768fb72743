"""A pretended CUDA device: what Inductor asks of one while it compiles, answered without one.

Inductor compiles for a GPU it never touches until the generated module is loaded. Up to there it asks five things,
and `fake_cuda` answers them: tensors that say "cuda" (FakeTensorMode), properties of the device (a DeviceInterface and
a few `torch.cuda` functions), a target for Triton (a driver that only names one), a choice of attention kernel
(attention.py), and a C++ device guard, which a CPU build of torch does not carry. Everything is put back on exit, and
whatever was cached about the device is forgotten.

Nothing runs on this device: kernels can be generated and compiled for it, not launched. See interpret.py for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import triton
from torch._dynamo import device_interface
from triton.backends.compiler import GPUTarget

from .attention import choose_efficient
from .fake_tensors import ValuedFakeMode

# (name, multiprocessors, shared memory a block may opt in to, registers, threads per multiprocessor, L2 bytes)
_DEVICES = {
    80: ("NVIDIA A100-SXM4-80GB", 108, 166_912, 65_536, 2048, 40 << 20),
    89: ("NVIDIA L40S", 142, 101_376, 65_536, 1536, 96 << 20),
    90: ("NVIDIA H200", 132, 232_448, 65_536, 2048, 60 << 20),
    100: ("NVIDIA B200", 148, 232_448, 65_536, 2048, 126 << 20),
    120: ("NVIDIA GeForce RTX 5090", 170, 101_376, 65_536, 1536, 96 << 20),
}

# Modules whose functools caches hold answers about the device; the same three in torch 2.11, 2.13 and 2.15, and one of
# ours. All of their caches are questions with no side effect (unlike fx_passes, where a cache guards a registration).
_MODULES_WITH_DEVICE_CACHES = (
    *("torch._inductor.utils", "torch._inductor.runtime.hints", "torch.utils._triton"),
    "fp6_compile.kernels.device",
)

# Compiling for a device that cannot be timed or loaded: no benchmark (shape_padding times two matmuls), no worker
# processes (they would not see our stand-ins), no cache (an entry made here would be served to a real device).
_INDUCTOR_CONFIG = {"shape_padding": False, "compile_threads": 1, "fx_graph_cache": False}
_FUNCTORCH_CONFIG = {"enable_autograd_cache": False}
_DYNAMO_CONFIG = {"automatic_dynamic_local_pgo": False}


def device_properties(sm: int) -> types.SimpleNamespace:
    """What `torch.cuda.get_device_properties` would say on a device of compute capability `sm`."""
    name, multiprocessors, shared, registers, threads, l2 = _DEVICES[sm]
    return types.SimpleNamespace(
        name=name,
        type="cuda",
        index=0,
        multi_processor_count=multiprocessors,
        cc=sm,
        major=sm // 10,
        minor=sm % 10,
        regs_per_multiprocessor=registers,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        L2_cache_size=l2,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        gcnArchName="",
        uuid="00000000-0000-0000-0000-000000000000",
    )


def _interface(sm: int) -> type[device_interface.DeviceInterface]:
    """The DeviceInterface of the pretended device; what it does not answer is CudaInterface's, and fails loudly."""
    properties = device_properties(sm)

    class Worker(device_interface.CudaInterface.Worker):
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: properties)

    class FakeCudaInterface(device_interface.CudaInterface):
        device = staticmethod(lambda index: contextlib.nullcontext())
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)
        synchronize = staticmethod(lambda device=None: None)
        get_raw_stream = staticmethod(lambda index: 0)
        memory_allocated = staticmethod(lambda device=None: 0)
        get_device_properties = staticmethod(lambda device=None: properties)
        get_compute_capability = staticmethod(lambda device=None: sm)
        is_triton_capable = staticmethod(lambda device=None: True)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)

    FakeCudaInterface.Worker = Worker
    return FakeCudaInterface


class _Driver:
    """A Triton driver that can name a target and nothing more."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0
        self.get_device_interface = lambda: torch.cuda
        self.get_active_torch_device = lambda: torch.device("cuda", 0)


def _torch_cuda_patches(sm: int) -> Iterator[Any]:
    """The questions Inductor asks torch.cuda directly, past the DeviceInterface."""
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda device=None: device_properties(sm),
        "get_device_capability": lambda device=None: divmod(sm, 10),
        "get_device_name": lambda device=None: _DEVICES[sm][0],
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
    }
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, answer)


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Let a CPU build of torch index and copy fake CUDA tensors.

    `x[1:]` and `x.copy_(y)` set a C++ device guard before they dispatch, and a CPU build has none for CUDA ("PyTorch is
    not linked with support for cuda devices"). The guard of the meta device does nothing, which is what
    torch._C._ensureCUDADeviceGuardSet installs in a CUDA build without a GPU, so it is lent to CUDA meanwhile.
    """
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


def forget_the_device() -> None:
    """Empty every cache that may hold an answer about the device."""
    for name in _MODULES_WITH_DEVICE_CACHES:
        if name not in sys.modules:
            continue
        members = list(vars(sys.modules[name]).values())
        classes = [member for member in members if isinstance(member, type) and member.__module__ == name]
        members += [getattr(cls, attribute) for cls in classes for attribute in vars(cls)]
        for member in members:
            if isinstance(getattr(member, "__func__", member), functools._lru_cache_wrapper):
                member.cache_clear()


@contextlib.contextmanager
def fake_cuda(sm: int = 90) -> Iterator[ValuedFakeMode]:
    """Pretend that cuda:0 is a device of compute capability `sm`; yields the fake mode its tensors live in."""
    if sm not in _DEVICES:
        raise ValueError(f"no stand-in for sm_{sm}; there is one for {', '.join(f'sm_{known}' for known in _DEVICES)}")
    device_interface.get_interface_for_device("cuda")  # fills the registry, which is patched below
    interface = _interface(sm)
    with contextlib.ExitStack() as stack:
        stack.callback(forget_the_device)
        for patch in _torch_cuda_patches(sm):
            stack.enter_context(patch)
        registry = device_interface.device_interfaces
        stack.enter_context(mock.patch.dict(registry, {"cuda": interface, "cuda:0": interface}))
        driver = _Driver(GPUTarget("cuda", sm, 32))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(inductor_config.patch(_INDUCTOR_CONFIG))
        stack.enter_context(functorch_config.patch(_FUNCTORCH_CONFIG))
        stack.enter_context(dynamo_config.patch(_DYNAMO_CONFIG))
        stack.enter_context(_device_guard())
        stack.enter_context(choose_efficient())
        forget_the_device()
        yield stack.enter_context(ValuedFakeMode(allow_non_fake_inputs=True))
