"""`fp6::mm` in Inductor: a Triton template for a GPU and a known M, the eager operator for everything else.

The template is the kernel's body (kernels/mm.py, imported by the generated module) with Inductor's `store_output` after it,
so that bias, activation, residual and casts run on the float32 accumulator before the one store. It computes the transpose,
[BLOCK_N, BLOCK_M]; `store_output` takes the indices as they are, and nothing is transposed back.

With a symbolic M the tile must not be the first shape's: the call stays a call, and the launcher picks the tile each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sympy
import torch

from fp6_compile.formats import get_format
from fp6_compile.kernels.config import config_for, constexprs
from fp6_compile.kernels.launch import uses_asm
from fp6_compile.lowerings import _inductor as inductor
from fp6_compile.ops import has_kernel

aten = torch.ops.aten


@inductor.SymbolicGridFn
def _grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    return cdiv(n, meta["BLOCK_N"]) * cdiv(m, meta["BLOCK_M"]), 1, 1


_template = inductor.TritonTemplate(
    name="fp6_mm", grid=_grid, source=Path(__file__).with_name("fp6_mm.py.jinja").read_text()
)


def lower_mm(x: Any, w4: Any, w2: Any, scale: Any, format: str, layout: str, group_size: int | None) -> Any:
    """The lowering of fp6::mm: x [*, K] -> [*, N]."""
    *leading, k = x.get_size()
    m, n = sympy.prod(leading), scale.get_size()[1]
    static = all(isinstance(size, sympy.Integer) and size > 0 for size in (m, n, k))
    if not (static and has_kernel(x.get_device(), x.get_dtype(), layout, group_size)):
        return _call_eager(x, w4, w2, scale, format, layout, group_size)
    lower = inductor.lowerings
    x, w4, w2, scale = inductor.realize_inputs(lower[aten.reshape](x, [m, k]), w4, w2, scale)
    if x.get_stride()[1] != 1:
        x = lower[aten.clone](x, memory_format=torch.contiguous_format)
    out = inductor.FixedLayout(x.get_device(), x.get_dtype(), [m, n])
    config = config_for(int(m), int(n), int(k), group_size, x.get_dtype())
    choices: list[Any] = []
    _template.maybe_append_choice(
        choices,
        input_nodes=(x, w4, w2, scale),
        layout=out,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constexprs(config, get_format(format), group_size, int(k), uses_asm(x.get_device().type)),
    )
    chosen = inductor.autotune_select_algorithm("fp6_mm", choices, [x, w4, w2, scale], out)
    if isinstance(chosen, tuple):  # with the choice, from torch 2.12
        chosen = chosen[0]
    return lower[aten.reshape](chosen, [*leading, n])


_call_eager = inductor.fallback_handler(torch.ops.fp6.mm.default, add_to_fallback_set=False)
