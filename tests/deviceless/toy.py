"""A toy quantized matmul, fp6test::mm, to test the harness with: an op, its template, its lowering and a model.

Importing this registers them, in this process only; no other test sees the namespace fp6test.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)

N, K = 64, 96
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half an ulp of 1: the largest relative error of a rounding

_TEMPLATE = (
    f"from {__package__}.toy_kernel import weight_times_x\n"
    + r"""
{{def_kernel("X", "W", "SCALE")}}
    M = {{size("X", 0)}}
    N = {{size("W", 0)}}
    K = {{size("X", 1)}}
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = weight_times_x(X, W, rows_n, rows_m, M, K, BLOCK_N, BLOCK_M, BLOCK_K)
    acc = acc * tl.load(SCALE + rows_n)[:, None]
    idx_m = rows_m[None, :]
    idx_n = rows_n[:, None]
    mask = (idx_m < M) & (idx_n < N)
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_N", "BLOCK_M"))}}
"""
)


@torch.library.custom_op("fp6test::mm", mutates_args=())
def mm(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x @ w.T * scale, with w int8 [N, K] and scale fp32 [N]."""
    return (x.float() @ w.float().T * scale).to(x.dtype)


@mm.register_fake
def _(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


@SymbolicGridFn
def _grid(m: Any, n: Any, meta: Any, *, cdiv: Any) -> tuple[Any, Any, int]:
    return cdiv(n, meta["BLOCK_N"]), cdiv(m, meta["BLOCK_M"]), 1


_template = TritonTemplate(name="fp6test_mm", grid=_grid, source=_TEMPLATE)


@register_lowering(torch.ops.fp6test.mm.default, type_promotion_kind=None)
def _lower(x: Any, w: Any, scale: Any) -> Any:
    inputs = realize_inputs(x, w, scale)
    (m, _), (n, _) = x.get_size(), w.get_size()
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [m, n])
    choices: list[Any] = []
    for block_n in (32, 64):  # two, so that a choice has to be made; the harness takes the first
        blocks = {"BLOCK_N": block_n, "BLOCK_M": 16, "BLOCK_K": 32}
        _template.maybe_append_choice(
            choices, input_nodes=tuple(inputs), layout=layout, num_stages=2, num_warps=4, **blocks
        )
    chosen = autotune_select_algorithm("fp6test_mm", choices, list(inputs), layout)
    return chosen[0] if isinstance(chosen, tuple) else chosen  # torch 2.13 and later also return the choice


class Gated(torch.nn.Module):
    """silu(x @ gate + bias) * (x @ up) + residual, the gate and up projections with int8 weights."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gate", "up"):
            self.register_buffer(name, torch.randint(-127, 128, (N, K), dtype=torch.int8))
            self.register_buffer(f"{name}_scale", torch.rand(N) * 1e-2 + 1e-3)
        self.bias = torch.nn.Parameter(torch.randn(N))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.silu(mm(x, self.gate, self.gate_scale) + self.bias.to(x.dtype))
        return gate * mm(x, self.up, self.up_scale) + residual

    def float64(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The exact output, and the largest error that the roundings to `unit` allow.

        Four values are rounded to 16 bits: each matmul, gate and bias (one rounding each at most), and the output. With
        |silu'| <= 1.1, an error d of the gate's argument moves the product by at most 1.1 |up| d, an error of up by
        |silu(gate)| |up|. fp32 accumulation of K products adds K 2^-24 times the sum of their magnitudes to each
        matmul, three orders below a rounding of fp16; the factor 1.01 holds it and all higher orders.
        """
        unit = UNIT[x.dtype]
        x, residual, bias = x.double(), residual.double(), self.bias.double()
        gate_mm = x @ self.gate.double().T * self.gate_scale.double()
        up = x @ self.up.double().T * self.up_scale.double()
        gate = gate_mm + bias
        output = torch.nn.functional.silu(gate) * up + residual
        of_gate = 1.1 * up.abs() * (gate_mm.abs() + bias.abs() + gate.abs())
        of_product = 2 * (torch.nn.functional.silu(gate) * up).abs()
        sums = x.abs() @ self.up.double().abs().T * K * 2.0**-24 * 1e-2 * (1 + gate.abs() + up.abs())
        return output, 1.01 * unit * (output.abs() + of_gate + of_product) + sums
