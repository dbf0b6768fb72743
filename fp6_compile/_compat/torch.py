"""Private names that `import torch` has loaded already, so that importing them costs nothing.

All of them are the same in torch 2.11, 2.13 and 2.15. Each is called here as it is there, without a leading underscore.
"""

from typing import Any

import torch
from torch import _transformer_encoder_layer_fwd as transformer_encoder_layer
from torch._C import DisableTorchFunctionSubclass, DispatchKey
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
from torch._C import _AutoDispatchBelowAutograd as AutoDispatchBelowAutograd
from torch._C import _dispatch_has_kernel_for_dispatch_key as dispatch_has_kernel_for_dispatch_key
from torch._C import _ensureCUDADeviceGuardSet as ensure_cuda_device_guard_set
from torch._C._dynamo.eval_frame import _FrameAction as FrameAction
from torch._C._dynamo.eval_frame import _FrameExecStrategy as FrameExecStrategy
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as unsafe_preserve_version_counter
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    return_and_correct_aliasing,
)

__all__ = [
    "CONFIG_MODULES",
    "INDUCTOR_LOWERING",
    "AutoDispatchBelowAutograd",
    "DisableTorchFunctionSubclass",
    "DispatchKey",
    "FakeTensor",
    "FakeTensorMode",
    "FrameAction",
    "FrameExecStrategy",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "TracingContext",
    "are_functorch_transforms_active",
    "changed_settings",
    "dispatch_has_kernel_for_dispatch_key",
    "enable_python_dispatcher",
    "ensure_cuda_device_guard_set",
    "functional_collectives",
    "is_fake",
    "is_traceable_wrapper_subclass",
    "return_and_correct_aliasing",
    "set_code_exec_strategy",
    "transformer_encoder_layer",
    "unsafe_preserve_version_counter",
]

# Collectives as operators that return a tensor; DTensor calls these.
functional_collectives = torch.ops._c10d_functional

# Modules of settings that change what torch.compile does. They need not be imported: look in sys.modules.
CONFIG_MODULES = ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config")

# The module of Inductor's lowerings, for asking sys.modules whether somebody has imported it (inductor.py does).
INDUCTOR_LOWERING = "torch._inductor.lowering"


def changed_settings(config: Any) -> dict[str, Any]:
    """The settings of one of CONFIG_MODULES that are not at their defaults; its load_config takes them."""
    changed: dict[str, Any] = config._get_dict(skip_default=True)
    return changed
