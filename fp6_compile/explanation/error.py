"""How much of a weight six bits lose, measured on the weight itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fp6_compile import quantize
from fp6_compile.backend.weights import PackSpec
from fp6_compile.formats import get_format

# Weights that are looked at; of a larger matrix, rows at equal distances.
_SAMPLE = 1 << 20


def sqnr(parameter: Tensor, spec: PackSpec) -> float:
    """Signal to quantization noise in dB, 10 log10(sum w^2 / sum (w - six bits of w)^2), of `parameter` packed as in `spec`.

    Infinite where nothing is lost. Raises ValueError for a weight with NaN or infinite values.
    """
    fmt = get_format(spec.format)
    with torch.no_grad():
        quantize.check_finite(parameter)
        weight = parameter.detach().t() if spec.transposed else parameter.detach()
        weight = weight[:: max(1, weight.numel() // _SAMPLE)].float()
        codes, scale = quantize.quantize(weight, fmt, spec.group_size, spec.scale)
        return quantize.sqnr(weight, quantize.dequantize(codes, scale, fmt, spec.group_size, torch.float32))
