"""How much a model suffers from an error in each weight, by which `quantize_(target_bits=...)` distributes bits.

One weight at a time is rounded to a coarse format, the caller's loss is measured, and the weight is put back. That is the
second-order sensitivity of HAWQ-V2 (arXiv 1911.03852) in the direction of the quantization error, without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fp6_compile.config import QuantConfig, names_in, warn_of_unmatched
from fp6_compile.formats import Format
from fp6_compile.packed.quantize_model import is_weight, skip_reason
from fp6_compile.packed.slots import slots
from fp6_compile.quantize import dequantize, quantize
from fp6_compile.report import progress

# Coarse, so that the loss rises by much more than its noise.
_PROBE = Format("e2m1", 2, 1)


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    loss: Callable[[], float],
    config: QuantConfig | None = None,
    **fields: Any,
) -> dict[str, float]:
    """The rise of `loss()` per unit of relative squared error, by the name of each linear that `quantize_` would quantize.

    Args:
        model: any module; each weight is changed in place while `loss` is called, and then put back.
        loss: a distance to the unchanged model on some inputs: KL divergence of logits, squared error of features.
        config: as for `quantize_`, or its fields as keyword arguments. It says which linears; formats and scales are not
            asked for.

    Raises ValueError for a bad option, TypeError for an unknown keyword argument.
    """
    config = QuantConfig.of(config, fields)
    warn_of_unmatched(config.skip, names_in(model), type(model).__name__)
    weights = [slot for slot in slots(model) if is_weight(slot, config) and skip_reason(slot, config, None) is None]
    base, found = loss(), {}
    for slot in progress(weights, "fp6: sensitivities"):
        weight, kept = slot.tensor, slot.tensor.detach().clone()
        rounded = dequantize(*quantize(kept, _PROBE), _PROBE, None, kept.dtype)
        error = (rounded - kept).float().square().sum() / kept.float().square().sum().clamp(min=1e-30)
        try:
            weight.copy_(rounded)
            found[slot.title] = max(loss() - base, 0.0) / max(float(error), 1e-30)
        finally:
            weight.copy_(kept)
    return found
