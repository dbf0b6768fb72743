"""Six-bit weights for torch.compile: `torch.compile(model, backend="fp6")`.

From the top down; a package imports only what stands below it.

    algorithms    old name of calibration.algorithms
    integrations  transformers quantizes, loads and saves packed models; vLLM serves them
    cli           the command fp6-compile: quantize, explain, inspect, verify
    explanation   explain: what compiling would do, without doing it
    fake_gpu      a GPU that is not there, for explanations and tests
    calibration   calibrate_: codes chosen by what the layers see; its algorithms; sensitivities
    checkpoint    save and load, MXFP6 checkpoints
    backend       the torch.compile backend: find linears, keep their bit planes fresh, rewrite the graph   <- start here
    packed        PackedTensor and quantize_
    lowerings     fp6::mm in Inductor: a Triton template with its epilogue fused
    ops           fp6::mm and fp6::dequantize: what a packed weight means
    kernels       Triton for GPUs, C++ for CPUs
    storage       safetensors files of others
    report        which linears were quantized, which were skipped and why
    config        the options
    layouts       codes <-> bit planes <-> what a device's kernel reads
    quantize      weight -> codes and scales
    formats       EeMm of 3 to 8 bits: values, bias shift
    _compat       private names of torch and Triton

Nothing needs to be imported to use the backend: torch finds it by its entry point. Importing this package imports neither
Triton nor Inductor; a public name is imported when it is first used.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp6_compile import integrations

if TYPE_CHECKING:
    from fp6_compile.backend.weights import mark_weights_changed
    from fp6_compile.calibration.run import calibrate_
    from fp6_compile.calibration.sensitivity import sensitivities
    from fp6_compile.checkpoint.distributed.state_dict import load_planes_state_dict, planes_state_dict
    from fp6_compile.checkpoint.load_model import load
    from fp6_compile.checkpoint.mx import load_quark_mxfp6
    from fp6_compile.checkpoint.packed_weight import CheckpointError
    from fp6_compile.checkpoint.save_model import save
    from fp6_compile.config import QuantConfig
    from fp6_compile.explanation import Explanation, explain
    from fp6_compile.integrations.transformers.config import Fp6Config as Fp6Config
    from fp6_compile.kernels.cpu.build import operator_library
    from fp6_compile.packed.quantize_model import quantize_
    from fp6_compile.packed.slots import init_empty_weights
    from fp6_compile.packed.tensor import PackedTensor
    from fp6_compile.report import LinearReport, Refresh, Report, last_refresh, last_report, reports

_PUBLIC = {
    "CheckpointError": "checkpoint.packed_weight",
    "Explanation": "explanation",
    "Fp6Config": "integrations.transformers.config",
    "LinearReport": "report",
    "PackedTensor": "packed.tensor",
    "QuantConfig": "config",
    "Refresh": "report",
    "Report": "report",
    "calibrate_": "calibration.run",
    "explain": "explanation",
    "init_empty_weights": "packed.slots",
    "last_refresh": "report",
    "last_report": "report",
    "load": "checkpoint.load_model",
    "load_planes_state_dict": "checkpoint.distributed.state_dict",
    "load_quark_mxfp6": "checkpoint.mx",
    "mark_weights_changed": "backend.weights",
    "operator_library": "kernels.cpu.build",
    "planes_state_dict": "checkpoint.distributed.state_dict",
    "quantize_": "packed.quantize_model",
    "reports": "report",
    "save": "checkpoint.save_model",
    "sensitivities": "calibration.sensitivity",
}
# Names of version 0.1. They go with the next version.
_DEPRECATED = {
    "empty_parameters": "init_empty_weights",
    "load_mx": "load_quark_mxfp6",
    "refresh": "mark_weights_changed",
}

# All but Fp6Config: `import *` does not need transformers.
__all__ = [
    "CheckpointError",
    "Explanation",
    "LinearReport",
    "PackedTensor",
    "QuantConfig",
    "Refresh",
    "Report",
    "calibrate_",
    "explain",
    "init_empty_weights",
    "last_refresh",
    "last_report",
    "load",
    "load_planes_state_dict",
    "load_quark_mxfp6",
    "mark_weights_changed",
    "operator_library",
    "planes_state_dict",
    "quantize_",
    "reports",
    "save",
    "sensitivities",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        new = _DEPRECATED[name]
        warnings.warn(f"fp6_compile.{name} is called {new} now", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[__name__], new)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def _unpickle(*parts: Any) -> Tensor:
    from fp6_compile.packed.tensor import _rebuild

    return _rebuild(*parts)


# Importing this package is enough for torch.load(weights_only=True). The second name is that of pickles of version 0.1.
_PICKLED = ("fp6_compile.packed.tensor._rebuild", "fp6_compile.tensor._rebuild")
torch.serialization.add_safe_globals([(_unpickle, name) for name in _PICKLED])


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


integrations.install()
