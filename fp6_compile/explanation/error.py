"""How much of a weight six bits lose, measured on the weight itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp6_compile.backend.planes import PlanesKey
from fp6_compile.formats import get_format
from fp6_compile.quantize import check_finite, dequantize, quantize

# Weights that are looked at; of a larger matrix, rows at equal distances.
_SAMPLE = 1 << 20


def sqnr(parameter: Tensor, key: PlanesKey) -> float:
    """Signal to quantization noise in dB, 10 log10(sum w^2 / sum (w - six bits of w)^2), of `parameter` packed as in `key`.

    Infinite where nothing is lost. Raises ValueError for a weight with NaN or infinite values.
    """
    spec = key.spec
    fmt = get_format(spec.format)
    with torch.no_grad():
        check_finite(parameter)
        weight = parameter.detach().t() if spec.transposed else parameter.detach()
        weight = weight[:: max(1, weight.numel() // _SAMPLE)].float()
        codes, scale = quantize(weight, fmt, spec.group_size, key.scale_method)
        noise = float((dequantize(codes, scale, fmt, spec.group_size, torch.float32) - weight).square_().sum())
        return 10 * math.log10(float(weight.square().sum()) / noise) if noise else math.inf
