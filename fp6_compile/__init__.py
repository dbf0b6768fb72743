"""Six-bit weights for torch.compile: `torch.compile(model, backend="fp6")`.

    formats    EeMm of 3 to 8 bits: values, bias shift                    <- start here
    quantize   weight -> codes and scales
    algorithms weight -> codes and scales, with an eye on the layer's inputs: GPTQ and others
    packing    codes <-> canonical planes <-> device layout
    slabs      the device layouts of GPUs
    ops        fp6::dequantize, fp6::mm: what a packed weight means
    config     the options
    linears    which inputs of a graph are weights, and why others are not
    hidden     which other weights matmuls read: inside of functions, or computed
    fused      fused attention, written out as ordinary linears
    names      what modules and parameters are called
    merging    which weights multiply the same input
    planes     packed weights side by side, and the states of the parameters that they were made from
    weights    packed planes, once per parameter, never stale
    report     what was taken, what was left alone and why
    graph      Dynamo's graph with packed weights
    views      what views show of a dequantized weight
    passes     matmul of a dequantized weight => fp6::mm
    lowerings  fp6::mm => Inductor template, epilogue fused
    kernels    Triton for GPUs, C++ for CPUs
    backend    all of it behind one name
    launches   which kernels a compiled graph launches

What it would do, without doing it:

    explanation  explain: a report for people, from tensors without values   <- start here
    devices      GPUs by name: bandwidths, and what else decides on their code

Packed models as files and objects:

    tensor      a packed weight that stays the parameter of its nn.Linear  <- start here
    lowrank     what quantization may add to a linear: low-rank factors, a bias
    held        its planes and scale, for it and its aliases: replaced as a whole
    dispatch    what such a weight can do beside multiplying
    files       what others wrote: regular files inside their folder, plain JSON
    storage     safetensors folders, one tensor at a time
    scaled      FP8 and int8 checkpoints, with their scales
    places      a model's tensors and all their names
    model       quantize_: a model's linears in place, one by one
    calibration calibrate_: quantize_ with an algorithm, block by block
    sensitivity how much a model suffers from errors in each weight
    manifest    what a checkpoint folder says, and everything that can be wrong with it
    checkpoint  save and load
    mx          OCP MXFP6 checkpoints, as AMD Quark writes them
    cli         fp6-compile: quantize, explain, inspect, verify

Nothing needs to be imported to use the backend: torch finds it by its entry point. Importing this package imports neither
Triton nor Inductor.
"""

from fp6_compile.calibration import calibrate_
from fp6_compile.checkpoint import load, save
from fp6_compile.explanation import Explanation, explain
from fp6_compile.manifest import CheckpointError
from fp6_compile.model import quantize_
from fp6_compile.mx import load_mx
from fp6_compile.places import empty_parameters
from fp6_compile.report import LinearReport, Refresh, Report, last_refresh, last_report, reports
from fp6_compile.sensitivity import sensitivities
from fp6_compile.tensor import PackedTensor
from fp6_compile.weights import refresh

__all__ = [
    "CheckpointError",
    "Explanation",
    "LinearReport",
    "PackedTensor",
    "Refresh",
    "Report",
    "calibrate_",
    "empty_parameters",
    "explain",
    "last_refresh",
    "last_report",
    "load",
    "load_mx",
    "quantize_",
    "refresh",
    "reports",
    "save",
    "sensitivities",
]
__version__ = "0.1.0"
