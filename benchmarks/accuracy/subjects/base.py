"""A subject of the study: a model, its linears, inputs to calibrate on, and a comparison with itself in sixteen bits.

A subject is measured in float32 with dequantized weights: the effect of quantization, without that of a kernel's arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp6_compile import sensitivities


class Measured(NamedTuple):
    """Figures of one row, and `losses` [units] with `weights` [units]: the main loss by document or sentence."""

    figures: dict[str, float]
    losses: Tensor
    weights: Tensor


class Subject(ABC):
    """A model in float32 with its 16-bit weights; `reference` is called before any of them changes."""

    name: str
    size: str  # how much is measured; rows of another size are other rows
    model: nn.Module
    loss: str  # the name of the main loss

    def linears(self) -> dict[str, nn.Linear]:
        """The linears that are quantized, as `quantize_` chooses them: no weights shared with an embedding."""
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and id(module.weight) not in embeddings and min(module.weight.shape) >= 128
        }

    @abstractmethod
    def reference(self) -> None:
        """Keep what later measures are compared with."""

    @abstractmethod
    def measure(self) -> Measured:
        """The figures with the weights that the model has now."""

    @abstractmethod
    def calibration(self, kind: str) -> Iterator[dict[str, Any]]:
        """Inputs of the model's forward, as keyword arguments; none of them is measured on."""

    @abstractmethod
    def outputs(self, inputs: dict[str, Any]) -> Tensor:
        """The outputs of the model for such inputs, for `distance`."""

    @abstractmethod
    def distance(self, expected: Tensor, outputs: Tensor) -> float:
        """The main loss of outputs, given those of the unchanged model."""

    @cached_property
    def sensitivity(self) -> dict[str, float]:
        """The sensitivity of each layer, measured on two batches of calibration inputs."""
        batches = list(islice(self.calibration("own"), 2))
        expected = [self.outputs(inputs) for inputs in batches]

        def loss() -> float:
            pairs = zip(expected, batches, strict=True)
            return sum(self.distance(was, self.outputs(inputs)) for was, inputs in pairs)

        return sensitivities(self.model, loss, include_float32=True)


def half_precision(model: nn.Module) -> nn.Module:
    """The model in float32 with weights rounded to FP16: the reference is the model that is deployed."""
    return model.half().float().eval().requires_grad_(False)


def spread(count: int, wanted: int) -> range:
    """At most `wanted` indices of `count`, evenly spaced."""
    return range(0, count, max(1, -(-count // wanted)))


def pad_to(tokens: Tensor, length: int, value: int) -> Tensor:
    """Tokens [T] with `value` after them, [length]."""
    return torch.nn.functional.pad(tokens, (0, length - len(tokens)), value=value)
