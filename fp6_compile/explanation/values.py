"""What `explain` needs to know of the values of weights, computed in the process that has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fp6_compile import quantize
from fp6_compile.backend.planes import PlanesKey
from fp6_compile.formats import AUTO, get_format
from fp6_compile.packed.tensor import PackedTensor

# The SQNR is measured on about this many values: of a larger matrix, on rows at equal distances.
_SAMPLE = 1 << 20


class Values:
    """Answers questions about tensors, which are named by their index. The answer is None where there are no values."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def __call__(self, question: str, *args: Any) -> Any:
        """The method called `question`, of `args`."""
        answers: dict[str, Callable[..., Any]] = {"sqnr": self.sqnr, "best_format": self.best_format}
        return answers[question](*args)

    def sqnr(self, key: int, how: PlanesKey) -> float | None:
        """The SQNR in dB of a weight packed as `how` says. Raises ValueError for a weight with NaN or infinite values."""
        weight = self._tensors[key]
        return None if weight.is_meta or isinstance(weight, PackedTensor) else sqnr(weight, how)

    def best_format(self, keys: Sequence[int], transposed: bool, group_size: int | None, scale: str) -> str | None:
        """The name of the format that format="auto" chooses for weights that are packed side by side."""
        weights = [self._tensors[key].detach() for key in keys]
        if any(weight.is_meta for weight in weights):
            return None
        weights = [weight.t() if transposed else weight for weight in weights]
        return quantize.choose_format(weights, [get_format(name) for name in AUTO], group_size, scale).name


def sqnr(parameter: Tensor, key: PlanesKey) -> float:
    """Signal to quantization noise in dB, 10 log10(sum w^2 / sum (w - dequantized w)^2), of `parameter` packed by `key`.

    Infinite where nothing is lost. Raises ValueError for a weight with NaN or infinite values.
    """
    spec, fmt = key.spec, get_format(key.spec.format)
    with torch.no_grad():
        quantize.check_finite(parameter)
        weight = parameter.detach().t() if spec.transposed else parameter.detach()
        weight = weight[:: max(1, weight.numel() // _SAMPLE)].float()
        codes, scale = quantize.quantize(weight, fmt, spec.group_size, key.scale_method)
        return quantize.sqnr(weight, quantize.dequantize(codes, scale, fmt, spec.group_size, torch.float32))
