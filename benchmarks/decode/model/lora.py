"""LoRA beside a base weight of any kind: y = W x + B A x, the adapter in 16 bits, in the same compiled step.

Between two steps an adapter can be

    swapped    `swap` copies other values into A and B. They are ordinary inputs of the graph: nothing is requantized.
    fused      `fuse` adds B A to W. A 16-bit W that `backend="fp6"` reads is quantized anew at the next call; a PackedTensor
               is dequantized, added to, and quantized again into the same planes.

Neither compiles anything. Fusing rounds to six bits once more: to take an adapter out again, keep a clone of W and copy it
back, rather than subtract.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp6_compile import PackedTensor


class LoRA(nn.Module):
    """A linear with an adapter of `rank`, at first zero. The names are those of PEFT."""

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = base_layer.weight
        self.base_layer = base_layer
        how: Any = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.zeros(rank, weight.shape[1], **how), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, **how), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[*, K] to [*, N]."""
        out: Tensor = self.base_layer(x)
        return out + F.linear(F.linear(x, self.lora_A), self.lora_B)


def attach(model: nn.Module, rank: int, leave: tuple[str, ...] = ("head", "lm_head")) -> list[LoRA]:
    """Wrap every linear of `model` in a LoRA, except those named in `leave`. Returns the LoRAs."""
    adapters = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name not in leave and not isinstance(parent, LoRA):
                adapters.append(LoRA(child, rank))
                setattr(parent, name, adapters[-1])
    return adapters


@torch.no_grad()
def swap(model: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Copy `adapter`, tensors by the names of `model`'s parameters, into place. Raises KeyError for an unknown name."""
    parameters = dict(model.named_parameters())
    for target, values in [(parameters[name], values) for name, values in adapter.items()]:
        target.copy_(values)


@torch.no_grad()
def fuse(layer: LoRA) -> None:
    """Add the adapter to the base weight in place, and set the adapter to zero."""
    weight, delta = layer.base_layer.weight, layer.lora_B.float() @ layer.lora_A.float()
    if isinstance(weight, PackedTensor):
        spec = weight.spec
        fused = weight.dequantize(torch.float32).add_(delta)
        weight.copy_(PackedTensor.quantize(fused, spec.format, spec.group_size, dtype=weight.dtype))
    else:
        weight.add_(delta.to(weight.dtype))
    layer.lora_B.zero_()


def random_adapter(adapters: list[LoRA], model: nn.Module, seed: int) -> dict[str, Tensor]:
    """New values for all of `adapters` of `model`, by parameter name: B A x is about as large as W x."""
    wanted = {id(p) for layer in adapters for p in (layer.lora_A, layer.lora_B)}
    found = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    if not found:
        return {}
    generator = torch.Generator(next(iter(found.values())).device).manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return noise.mul_(0.7 * like.shape[1] ** -0.5)

    return {name: draw(p) for name, p in found.items()}
