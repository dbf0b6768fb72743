"""Memory-efficient attention on a CPU, so that the interpreter can run code that was generated for a GPU with it.

Importing this module registers it.
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten
_on_cpu = torch.library.Library("aten", "IMPL")


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
