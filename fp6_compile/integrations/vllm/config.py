"""The quantization method "fp6" of vLLM: which method each layer gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fp6_compile.integrations.vllm.compat import (
    LinearBase,
    ParallelLMHead,
    QuantizationConfig,
    ReplicatedLinear,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
    current_platform,
    has_tied_head,
    init_logger,
)
from fp6_compile.integrations.vllm.inductor import install_pass
from fp6_compile.integrations.vllm.linear import OnlineLinearMethod, PackedLinearMethod
from fp6_compile.integrations.vllm.settings import Scheme, Settings, shard_names
from fp6_compile.kernels.triton.config import supports

log = init_logger("vllm.fp6")  # vLLM shows the loggers below its own

# Linears that choose experts: small, and every error of theirs sends tokens elsewhere.
_ROUTERS = ("gate", "router", "shared_expert_gate")


class Fp6Config(QuantizationConfig):
    """Packed linears and heads; everything else in 16 bits: embeddings, tied heads, experts and their routers."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings or Settings()

    def __repr__(self) -> str:
        return f"Fp6Config({'packed' if self.settings.packed else 'online'}, {self.settings.config.describe()})"

    def get_name(self) -> str:
        """What `quantization=` and "quant_method" call it."""
        return "fp6"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of activations, and so of the model."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: cp.async and BF16 MMA."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: it is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Fp6Config:
        """From "quantization_config" in config.json or hf_overrides. Raises ValueError as Settings.parse does."""
        return cls(Settings.parse(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names of the folder become those of vLLM's model."""
        skip = tuple(hf_to_vllm_mapper.apply_list(list(self.settings.skip)))
        by_name = hf_to_vllm_mapper.apply_dict(dict(self.settings.by_name))
        self.settings = replace(self.settings, skip=skip, by_name=by_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of the layer that is called `prefix` in vLLM's model; None for what always stays in 16 bits.

        Raises ValueError if only some of its weights are packed, and for a group size that the GPU kernel does not take.
        """
        if isinstance(layer, RoutedExperts):
            log.info_once("fp6: experts stay in 16 bits; linears around them are packed")
            return UnquantizedFusedMoEMethod(layer.moe_config)
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        schemes = self._schemes(layer, prefix)
        if schemes is None:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        no_kernel = supports(schemes[0].group_size) if current_platform.is_cuda() else None
        if no_kernel is not None:
            raise ValueError(f"fp6: {prefix}: {no_kernel}")
        install_pass()
        if self.settings.packed:
            return PackedLinearMethod(prefix, schemes)
        return OnlineLinearMethod(prefix, schemes[0], self.settings.config)

    def _schemes(self, layer: Any, prefix: str) -> list[Scheme] | None:
        if isinstance(layer, ParallelLMHead) and (
            has_tied_head() or not (self.settings.packed or self.settings.lm_head)
        ):
            return None
        if not self.settings.packed:
            is_router = isinstance(layer, ReplicatedLinear) and prefix.rpartition(".")[2] in _ROUTERS
            if is_router or min(layer.input_size, layer.output_size) < self.settings.config.min_features:
                return None
        schemes = self.settings.schemes(shard_names(prefix, self.packed_modules_mapping))
        if schemes and not self.settings.packed and len(set(schemes)) > 1:
            raise ValueError(f"fp6: module_formats: the weights of {prefix} are quantized together, got {schemes}")
        return schemes
