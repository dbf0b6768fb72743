"""The attention kernel that a real GPU would have chosen, on the fake one.

`F.scaled_dot_product_attention` asks the CUDA build's C++ which kernel takes its inputs; a CPU build has nobody to ask, and
falls back to matmuls around a softmax. `choose_efficient` answers instead, and always the same: the memory-efficient kernel.
It takes FP16, BF16 and FP32 on all the devices of fake_cuda.py and, unlike flash attention, a mask, which decoding with a
static cache has. Nothing of the real choice is imitated: on a device where cuDNN's attention is preferred the launch has
another name, and grouped heads (enable_gqa), for which the kernel is not eligible, are an error here.

Importing this module also lets a CPU compute that operator, so that the interpreter can run what was generated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

aten = torch.ops.aten
_on_cpu = torch.library.Library("aten", "IMPL")


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What transformers.cpp of ATen does with the memory-efficient kernel; masks are additive, and broadcast to 4-D."""
    if enable_gqa or (attn_mask is not None and attn_mask.shape[-1] % 16):
        raise NotImplementedError("the fake device has attention without enable_gqa, masks of multiples of 16 keys")
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    how = (attn_mask, False, dropout_p, is_causal)
    return aten._scaled_dot_product_efficient_attention(query, key, value, *how, scale=scale)[0]


@contextlib.contextmanager
def choose_efficient() -> Iterator[None]:
    """Inside, attention on a CUDA device is `aten::_scaled_dot_product_efficient_attention`."""
    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradCUDA", "CUDA"):
        library.impl("scaled_dot_product_attention", _scaled_dot_product_attention, key)
    try:
        yield
    finally:
        library._destroy()


def _efficient_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    out, _ = aten._scaled_dot_product_attention_math(query, key, value, attn_bias, dropout_p, is_causal, scale=scale)
    none = query.new_empty(0)
    # Strides as the kernel's: heads are next to each other.
    return out.transpose(1, 2).contiguous().transpose(1, 2), none, none, none


_on_cpu.impl("_scaled_dot_product_efficient_attention", _efficient_on_cpu, "CPU")
