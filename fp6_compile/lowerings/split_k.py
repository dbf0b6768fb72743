"""Who adds up the parts of a split K: the kernel that follows, or the program of the template that comes last.

- A reduction follows, as RMSNorm's behind the residual: the template stores its parts [SPLIT_K, M, N], and their sum is an
  expression that Inductor inlines into the reduction's kernel. No launch more than without the split.
- Otherwise the last program of each tile adds the parts up (`kernels.triton.mm.reduce`), and bias, activation and residual
  stay fused into its store. Where several kernels read the product, or one reads it twice (rotary embeddings), the sum would
  become a kernel of its own.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import Node

from fp6_compile._compat import inductor
from fp6_compile._compat.torch import OpOverload
from fp6_compile.kernels.triton.config import LOCKS

aten, prims = torch.ops.aten, torch.ops.prims

_VIEWS = (
    *(aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten._unsafe_view.default, aten.expand.default),
)
_zeros: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def reduction_follows(node: Node) -> bool:
    """Whether a reduction reads `node`, directly or past views and pointwise operators that keep its size."""
    size = node.meta["val"].numel()
    for user in node.users:
        if user.op != "call_function" or not isinstance(user.target, OpOverload):
            continue
        if torch.Tag.reduction in user.target.tags:
            return True
        passes_on = user.target in _VIEWS or torch.Tag.pointwise in user.target.tags
        if passes_on and user.meta["val"].numel() == size and reduction_follows(user):
            return True
    return False


def sum_of_parts(parts: Any, count: int, dtype: torch.dtype) -> Any:
    """parts [count, M, N] float32 -> [M, N] in `dtype`: an expression, added in order, that is no kernel of its own."""
    lower = inductor.lowerings
    total = lower[aten.select.int](parts, 0, 0)
    for part in range(1, count):
        total = lower[aten.add.Tensor](total, lower[aten.select.int](parts, 0, part))
    return lower[prims.convert_element_type.default](total, dtype)


def scratch(count: int, out: Any) -> tuple[Any, Any]:
    """Buffers for `kernels.triton.mm.reduce` of `out`, a layout [M, N]: parts float32 [count, M, N], and locks, zeros int32.

    Inductor takes both for inputs that the template only reads. That is right as far as others can see: nobody else reads
    the parts, and the locks are zeros again after every launch, so one tensor of them serves all launches of a graph.
    """
    lower, device, (m, n) = inductor.lowerings, out.device, out.size
    parts = lower[aten.empty_strided.default]([count, m, n], [m * n, n, 1], dtype=torch.float32, device=device)
    graph = inductor.V.graph
    if graph not in _zeros:
        _zeros[graph] = lower[aten.full.default]([LOCKS], 0, dtype=torch.int32, device=device)
        _zeros[graph].realize()
    return parts, _zeros[graph]


def zero_locks(buffer: Any) -> torch.Tensor:
    """What stands for the locks while choices are timed: random numbers would leave every sum unfinished."""
    return torch.zeros(LOCKS, dtype=torch.int32, device=buffer.get_device())
