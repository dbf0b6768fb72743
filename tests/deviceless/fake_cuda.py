"""The fake CUDA device of fp6_compile.fake_gpu, with tensors that remember their values.

Nothing runs on this device: kernels can be generated and compiled for it, not launched. See interpret.py for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config

from fp6_compile.fake_gpu.device import fake_device
from fp6_compile.fake_gpu.devices import DEVICES

from .fake_tensors import ValuedFakeMode

_DEVICES = {80: "A100", 89: "L40S", 90: "H200", 100: "B200", 120: "RTX 5090"}


@contextlib.contextmanager
def fake_cuda(sm: int = 90) -> Iterator[ValuedFakeMode]:
    """Inside, cuda:0 is a fake device of compute capability `sm`; yields the fake mode that its tensors live in."""
    if sm not in _DEVICES:
        raise ValueError(f"no stand-in for sm_{sm}; there is one for {', '.join(f'sm_{known}' for known in _DEVICES)}")
    with (
        fake_device(DEVICES[_DEVICES[sm]]),
        # No cache: an entry made here would be served to a real device.
        inductor_config.patch({"fx_graph_cache": False}),
        functorch_config.patch({"enable_autograd_cache": False}),
        dynamo_config.patch({"automatic_dynamic_local_pgo": False}),
        ValuedFakeMode(allow_non_fake_inputs=True) as mode,
    ):
        yield mode
