"""Linear layers and the LM head: bit planes and scales from a folder, or of 16-bit weights; then `fp6::mm`.

A layer of vLLM holds several weights of the model side by side (q, k and v). If all have one format, they are one
multiplication; otherwise neighbours of one format are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp6_compile.config import QuantConfig
from fp6_compile.formats import get_format
from fp6_compile.integrations.vllm.compat import (
    LinearMethodBase,
    ModelWeightParameter,
    ParallelLMHead,
    initialize_online_processing,
    register_weight_loader_v2_supported_method,
    was_processed,
)
from fp6_compile.integrations.vllm.inductor import note_selftest
from fp6_compile.integrations.vllm.parameters import make_parameter
from fp6_compile.integrations.vllm.settings import Scheme, check_cut, groups, plane_columns
from fp6_compile.layouts.packing import plane_names
from fp6_compile.packed.tensor import PackedTensor


class _Weight(NamedTuple):
    """What fp6::mm needs of a layer: names of its parameters, and how to read them."""

    planes: tuple[str, ...]
    scale: str
    how: tuple[str, str, int | None]


class _Fp6LinearMethod(LinearMethodBase):
    """One for each layer. `name`: of the layer, in messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.weights: list[_Weight] = []

    def _register(self, layer: nn.Module, packed: Sequence[PackedTensor]) -> None:
        """The weights, side by side, become the layer's parameters."""
        self.weights = []
        for i, weight in enumerate(packed):
            spec, suffix = weight.spec, f"_{i}" if i else ""
            names = [f"weight_{name}{suffix}" for name in (*plane_names(get_format(spec.format)), "scale")]
            for name, tensor in zip(names, weight.tensors, strict=True):
                layer.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
            self.weights.append(_Weight(tuple(names[:-1]), names[-1], (spec.format, spec.layout, spec.group_size)))
            note_selftest(weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [*, K] @ W.T, [*, N] in x's dtype, plus bias."""
        parts = [
            torch.ops.fp6.mm(
                x, [getattr(layer, name) for name in weight.planes], getattr(layer, weight.scale), *weight.how
            )
            for weight in self.weights
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if bias is None else out + bias


@register_weight_loader_v2_supported_method
class PackedLinearMethod(_Fp6LinearMethod):
    """Of a folder. `schemes`: one for each weight of the layer."""

    def __init__(self, name: str, schemes: Sequence[Scheme]) -> None:
        super().__init__(name)
        self.schemes = schemes
        self.rows: list[int] = []

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Empty canonical bit planes and scales, for `weight_loader` to fill.

        Raises ValueError if tensor parallelism cuts groups, or the weights of the layer do not lie in the same planes.
        """
        k, n, loader = input_size_per_partition, sum(output_partition_sizes), attributes["weight_loader"]
        check_cut(self.name, self.schemes, input_size, k)
        whole, part = (plane_columns(self.name, self.schemes, inputs) for inputs in (input_size, k))
        for width, columns in whole.items():
            title = f"{self.name}.weight_w{width}"
            parameter = make_parameter(title, (n, part[width]), torch.uint8, columns, loader)
            layer.register_parameter(f"weight_w{width}", parameter)
        sizes = [groups(inputs, self.schemes[0].group_size) for inputs in (k, input_size)]
        scale = make_parameter(f"{self.name}.weight_scale", (n, sizes[0]), torch.float32, sizes[1], loader)
        layer.register_parameter("weight_scale", scale)
        self.k, self.dtype = k, params_dtype
        self.rows = output_partition_sizes if len(self.schemes) > 1 else [n]
        if len(self.rows) != len(self.schemes):
            raise ValueError(
                f"fp6: {self.name} has {len(self.rows)} parts in vLLM and {len(self.schemes)} in the folder"
            )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Into the layout of the device."""
        if was_processed(layer):
            return
        loaded = {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
        packed, start = [], 0
        for scheme, neighbours in groupby(zip(self.schemes, self.rows, strict=True), key=lambda pair: pair[0]):
            rows = slice(start, start + sum(count for _, count in neighbours))
            planes = [loaded[f"weight_{name}"][rows] for name in plane_names(get_format(scheme.format))]
            scale = loaded["weight_scale"][rows].T.contiguous()
            packed.append(PackedTensor.from_planes(planes, scale, scheme.format, scheme.group_size, self.k, self.dtype))
            start = rows.stop
        for name in loaded:
            if name.startswith("weight_"):
                delattr(layer, name)
        self._register(layer, packed)


@register_weight_loader_v2_supported_method
class OnlineLinearMethod(_Fp6LinearMethod):
    """Of 16-bit weights, which are quantized as soon as all of a layer are there."""

    uses_meta_device = True

    def __init__(self, name: str, scheme: Scheme, config: QuantConfig) -> None:
        super().__init__(name)
        self.scheme, self.config = scheme, config

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """A weight for `weight_loader` to fill; of linears on the meta device, so that never two of them exist.

        Raises ValueError if tensor parallelism cuts groups.
        """
        check_cut(self.name, [self.scheme] if self.scheme.group_size else [], input_size, input_size_per_partition)
        is_head = isinstance(
            layer, ParallelLMHead
        )  # its rows are padded, so that vLLM never counts all of them as loaded
        shape = sum(output_partition_sizes), input_size_per_partition
        data = torch.empty(shape, dtype=params_dtype, device=None if is_head else "meta")
        loader = attributes["weight_loader"]
        weight = ModelWeightParameter(data=data, output_dim=0, input_dim=1, weight_loader=loader)
        layer.register_parameter("weight", weight)
        if not is_head:
            initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Quantize. Raises ValueError for NaN and infinite values."""
        if was_processed(layer):
            return
        try:
            weight = layer.get_parameter("weight").data
            packed = PackedTensor.quantize(weight, *self.scheme, self.config.scale_method)
        except ValueError as error:
            raise ValueError(f"fp6: {self.name}: {error}") from error
        del layer.weight
        self._register(layer, [packed])
