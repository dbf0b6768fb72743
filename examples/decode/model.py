"""Llamas of some sizes with random weights, in 16 bits or packed in six, built so that no more is ever in memory.

How it works. The model of examples/code_lm is made on the meta device, where it has shapes and no memory. Then each linear
gets its weight, one after the other; packed, the 16-bit weight of one linear is gone before the next is made. The same seed
gives both models the same weights.

`torch.compile(model, backend="fp6")` alone cannot do this: the float parameters belong to the caller, and stay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import fp6_compile.ops  # noqa: F401  (defines torch.ops.fp6)
from examples.code_lm.model import CodeLM, ModelConfig, RMSNorm
from fp6_compile.formats import get_format
from fp6_compile.packing import layout_for, pack, plane_names
from fp6_compile.quantize import quantize

SIZES = {
    "tiny": ModelConfig(),
    # The shape of TinyLlama-1.1B.
    "1b": ModelConfig(vocab=32000, dim=2048, layers=22, heads=32, kv_heads=4, hidden=5632),
}


class PackedLinear(nn.Module):
    """A linear without bias whose weight exists in six bits only."""

    scale: Tensor

    def __init__(self, weight: Tensor, format: str, group_size: int | None) -> None:
        super().__init__()
        fmt = get_format(format)
        self.format, self.group_size = format, group_size
        self.layout, self.names = layout_for(weight.device, weight.dtype, fmt), plane_names(fmt)
        codes, scale = quantize(weight, fmt, group_size)
        for name, tensor in zip((*self.names, "scale"), (*pack(codes, fmt, self.layout), scale), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x [*, K] to [*, N]."""
        planes = [getattr(self, name) for name in self.names]
        return torch.ops.fp6.mm(x, planes, self.scale, self.format, self.layout, self.group_size)


def build(
    config: ModelConfig,
    *,
    packed: bool,
    dtype: torch.dtype,
    device: str,
    format: str = "e3m2",
    group_size: int | None = None,
) -> CodeLM:
    """A model with random weights; `packed`: its linears are `PackedLinear`."""
    with torch.device("meta"):
        model = CodeLM(config)
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear):
                weight = random(module.weight.shape, 0.5 / math.sqrt(module.in_features))
                if packed:
                    setattr(parent, name, PackedLinear(weight, format, group_size))
                else:
                    module.weight = nn.Parameter(weight)
            elif isinstance(module, nn.Embedding):
                module.weight = nn.Parameter(random(module.weight.shape, 0.5))
            elif isinstance(module, RMSNorm):
                module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device))
    return model.requires_grad_(False).eval()


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all weights, and of those that one token reads: of an embedding it reads a row."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tensors = [*model.parameters(), *model.buffers()]
    read = sum(t.nbytes for t in tensors if id(t) not in embeddings)
    return sum(t.nbytes for t in tensors), read
