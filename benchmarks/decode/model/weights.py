"""Random weights, made in six bits: a model that does not fit into memory in sixteen bits need never be there.

The model is built on the meta device, with shapes and no memory. Each linear then gets random bit planes on the device: any
bits are codes, so random bytes are a weight whose codes are all equally likely. Models with 16-bit, int8 and int4 weights
are made from the same planes, dequantized one linear at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from benchmarks.decode.model.llama import Llama
from examples.code_lm.model import ModelConfig, RMSNorm
from fp6_compile import PackedTensor
from fp6_compile.formats import DEFAULT, get_format
from fp6_compile.layouts.packing import PLANES, pack

# Bits of a weight by kind, scales left out.
KINDS = {"float": 16, "fp6": 6, "int8": 8, "int4": 4}


def build(
    config: ModelConfig,
    kind: str,
    *,
    head: str | None = None,
    dtype: torch.dtype,
    device: str,
    format: str = DEFAULT,
    group_size: int | None = None,
) -> Llama:
    """A model whose linears are of `kind`, one of KINDS, and its head of kind `head`, by default the same."""
    with torch.device("meta"):
        model = Llama(config)
    generator = torch.Generator(device).manual_seed(0)
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear):
                n, k = module.weight.shape
                packed = random_packed(n, k, format, group_size, dtype, generator)
                setattr(parent, name, linear(packed, head or kind if name == "head" else kind))
            elif isinstance(module, nn.Embedding):
                noise = torch.randn(module.weight.shape, generator=generator, device=device, dtype=dtype)
                module.weight = nn.Parameter(noise.mul_(0.5))
            elif isinstance(module, RMSNorm):
                module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device))
    return model.requires_grad_(False).eval()


def random_packed(
    n: int, k: int, format: str, group_size: int | None, dtype: torch.dtype, generator: torch.Generator
) -> PackedTensor:
    """A weight [n, k] of random codes, on the generator's device, with a standard deviation of 0.5 / sqrt(k)."""
    fmt, device = get_format(format), generator.device
    row = pack(torch.zeros(1, k, dtype=torch.uint8), fmt, PLANES)
    planes = [
        torch.randint(0, 256, (n, plane.shape[1]), dtype=torch.uint8, device=device, generator=generator)
        for plane in row
    ]
    std = fmt.values().square().mean().sqrt()
    scale = torch.full((-(-k // (group_size or k)), n), 0.5 / math.sqrt(k) / float(std), device=device)
    return PackedTensor.from_planes(planes, scale, format, group_size, k, dtype)


def linear(packed: PackedTensor, kind: str) -> nn.Module:
    """A linear without bias whose weight is `packed`, or its values in another `kind`."""
    module = nn.Linear(packed.shape[1], packed.shape[0], bias=False, device="meta")
    weight = packed if kind == "fp6" else packed.dequantize()
    module.weight = nn.Parameter(weight, requires_grad=False)
    return integers(module, kind) if kind in ("int8", "int4") else module


def integers(model: nn.Module, kind: str) -> nn.Module:
    """The linears of `model` by torchao, weight-only: int8 per row, or int4 in groups of 128 for CUDA's tiles.

    Written for torchao 0.14 and later; it has not been run here.
    """
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {
        "int8": lambda: Int8WeightOnlyConfig(),
        "int4": lambda: Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"),
    }[kind]()
    inside = nn.Sequential(model)  # quantize_ replaces children, and a linear by itself is nobody's
    quantize_(inside, config)
    return inside[0]


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all weights, and of those that one token reads: of an embedding it reads a row."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tensors = [*model.parameters(), *model.buffers()]
    read = sum(_bytes(t) for t in tensors if id(t) not in embeddings - tied)
    return sum(map(_bytes, tensors)), read


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors inside a tensor subclass; an ordinary tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [leaf for name in tensor.__tensor_flatten__()[0] for leaf in inner_tensors(getattr(tensor, name))]


def _bytes(tensor: Tensor) -> int:
    return sum(inner.nbytes for inner in inner_tensors(tensor))
