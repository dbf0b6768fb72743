"""`fp6::mm` in Inductor: a Triton template for a GPU and a known M, the eager operator for everything else.

The template is the kernel's body (kernels/triton/mm.py, imported by the generated module) with Inductor's `store_output`
after it, so that bias, activation, residual and casts run on the float32 accumulator before the one store. It computes the
transpose, [BLOCK_N, BLOCK_M]; `store_output` takes the indices as they are, and nothing is transposed back.

With a symbolic M the tile must not be the first shape's: the call stays a call, and the launcher picks the tile each time.
With a static M so large that a dequantized copy and ATen's matmul are faster, it stays a call, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch

from fp6_compile._compat import inductor
from fp6_compile.formats import get_format
from fp6_compile.kernels.selection import choices as kernels_device
from fp6_compile.kernels.triton.config import Config, constexprs
from fp6_compile.kernels.triton.run import uses_asm
from fp6_compile.lowerings import split_k
from fp6_compile.ops import has_kernel, mm_by_aten

aten = torch.ops.aten


@inductor.SymbolicGridFn
def _grid(*sizes_and_meta: Any, cdiv: Any) -> tuple[Any, int, int]:
    *_, m, n, meta = sizes_and_meta  # of parts the sizes are [SPLIT_K, M, N]
    return cdiv(n, meta["BLOCK_N"]) * cdiv(m, meta["BLOCK_M"]) * meta["SPLIT_K"], 1, 1


_template = inductor.TritonTemplate(
    name="fp6_mm", grid=_grid, source=Path(__file__).with_name("fp6_mm.py.jinja").read_text()
)
_aten_mm = inductor.ExternKernelChoice(mm_by_aten, "fp6_mm_by_aten", has_out_variant=False)


def lower_mm(x: Any, planes: Sequence[Any], scale: Any, format: str, layout: str, group_size: int | None) -> Any:
    """The lowering of fp6::mm: x [*, K] -> [*, N]."""
    *leading, k = x.get_size()
    m, n = sympy.prod(leading), scale.get_size()[1]
    static = all(isinstance(size, sympy.Integer) and size > 0 for size in (m, n, k))
    if not (static and has_kernel(x.get_device(), x.get_dtype(), layout, group_size)):
        return _call_eager(x, planes, scale, format, layout, group_size)
    problem = (x.get_device(), int(m), int(n), int(k), group_size, x.get_dtype(), get_format(format))
    configs = kernels_device.choices(*problem)
    if not inductor.autotunes():
        configs = configs[:1]
    if configs == (None,):
        return _call_eager(x, planes, scale, format, layout, group_size)
    lower = inductor.lowerings
    x, *weight = inductor.realize_inputs(lower[aten.reshape](x, [m, k]), *planes, scale)
    if x.get_stride()[1] != 1:
        x = lower[aten.clone](x, memory_format=torch.contiguous_format)
    how = {"format": format, "group_size": group_size}
    first = configs[0]
    if first is not None and first.SPLIT_K > 1 and split_k.reduction_follows(inductor.V.graph.current_node):
        out = _in_parts([x, *weight], [c for c in configs if c is not None and c.SPLIT_K == first.SPLIT_K], how)
    else:
        out = _whole([x, *weight], configs, how)
    return lower[aten.reshape](out, [*leading, n])


def _in_parts(inputs: list[Any], configs: Sequence[Config], how: Mapping[str, Any]) -> Any:
    """[M, N] as the sum of parts of K, by the best of `configs`, which have equally many."""
    x, count = inputs[0], configs[0].SPLIT_K
    out = inductor.FixedLayout(
        x.get_device(), torch.float32, [count, x.get_size()[0], _scale(inputs, how).get_size()[1]]
    )
    choices: list[Any] = []
    for config in configs:
        _append(choices, config, inputs, out, how)
    return split_k.sum_of_parts(_best(choices, inputs, out, how), count, x.get_dtype())


def _whole(inputs: list[Any], configs: Sequence[Config | None], how: Mapping[str, Any]) -> Any:
    """[M, N] by the best of `configs`: a tile each or, for None, ATen's matmul."""
    x = inputs[0]
    out = inductor.FixedLayout(x.get_device(), x.get_dtype(), [x.get_size()[0], _scale(inputs, how).get_size()[1]])
    most = max(config.SPLIT_K for config in configs if config is not None)
    if most > 1:  # Choices are timed on the same inputs, so all get what one of them needs.
        inputs = [*inputs, *split_k.scratch(most, out)]
    choices: list[Any] = []
    for config in configs:
        if config is None:
            choices.append(_aten_mm.bind(inputs, out, **how))
        else:
            _append(choices, config, inputs, out, how)
    return _best(choices, inputs, out, how)


def _append(choices: list[Any], config: Config, inputs: list[Any], out: Any, how: Mapping[str, Any]) -> None:
    fmt, k, asm = get_format(how["format"]), int(inputs[0].get_size()[1]), uses_asm(out.device.type)
    _template.maybe_append_choice(
        choices,
        input_nodes=inputs,
        layout=out,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        PLANES=len(fmt.planes),
        WITH_SCRATCH=len(inputs) > 2 + len(fmt.planes),
        **constexprs(config, fmt, how["group_size"], k, asm),
    )


def _scale(inputs: list[Any], how: Mapping[str, Any]) -> Any:
    """`inputs` are x, the planes, the scale and, if K is split, the scratch: parts and locks."""
    return inputs[_scale_position(how)]


def _scale_position(how: Mapping[str, Any]) -> int:
    return 1 + len(get_format(how["format"]).planes)


def _best(choices: list[Any], inputs: list[Any], out: Any, how: Mapping[str, Any]) -> Any:
    scale = _scale_position(how)
    generators: dict[int, Any] = dict.fromkeys(range(1, scale), _random_codes)
    if scale != len(inputs) - 1:
        generators[len(inputs) - 1] = split_k.zero_locks
    return inductor.autotune_select_algorithm("fp6_mm", choices, inputs, out, input_gen_fns=generators)


def _random_codes(buffer: Any) -> torch.Tensor:
    """What stands for bit planes while choices are timed. Inductor would make zeros, which a GPU multiplies faster."""
    size, dtype = [int(n) for n in buffer.get_size()], buffer.get_dtype()
    about = torch.iinfo(dtype)
    return torch.randint(about.min, about.max, size, dtype=dtype, device=buffer.get_device())


_call_eager = inductor.fallback_handler(torch.ops.fp6.mm.default, add_to_fallback_set=False)
