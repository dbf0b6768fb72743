"""Which attention kernel torch chooses on an NVIDIA GPU, for a fake one.

C++ code that a CPU build of torch lacks makes this choice, and without it `scaled_dot_product_attention` becomes matmuls
and a softmax. Here is that choice (aten/native/transformers/cuda/sdp_utils.cpp), shortened: flash attention without a mask;
with a mask the memory-efficient kernel, which supports no grouped heads. On a Hopper torch may choose cuDNN's kernel instead
of either. That is one launch, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from fp6_compile._compat.torch import DispatchKey

aten = torch.ops.aten
_OP = aten.scaled_dot_product_attention.default


@contextlib.contextmanager
def attention_of_a_gpu() -> Iterator[None]:
    """Inside, attention on CUDA tensors is traced as the fused kernel that would be chosen, if any."""
    key = DispatchKey.CompositeImplicitAutograd
    with mock.patch.dict(_OP.py_kernels, {key: _attention}):
        _OP._dispatch_cache.clear()
        try:
            yield
        finally:
            _OP._dispatch_cache.clear()


def _attention(
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
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill(attn_mask.logical_not(), -torch.inf)
    if not _is_fused(query, key, value, attn_mask, enable_gqa):
        how = {"scale": scale, "enable_gqa": enable_gqa}
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, **how)[0]
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, False, dropout_p, is_causal, scale=scale
    )[0]


def _is_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> bool:
    head = query.shape[-1]
    return (
        query.is_cuda
        and query.dim() == 4
        and query.dtype in (torch.float16, torch.bfloat16)
        and head == value.shape[-1]
        and head % 8 == 0
        and head <= 256
        and (mask is None or (not enable_gqa and not query.requires_grad))
    )
