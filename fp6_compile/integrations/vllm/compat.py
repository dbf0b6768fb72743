"""Every name of vLLM that the package uses. None of them is promised: a new vLLM is a change to this file.

Seen in vLLM 0.32. What vLLM calls of ours are the methods of QuantizationConfig, LinearMethodBase and InductorPass.
"""

from importlib.metadata import packages_distributions, version
from typing import Any

TESTED = "0.32"


def _installed() -> str:
    found = (dist for name, dist in packages_distributions().items() if name == "vllm")
    return ", ".join(f"{name} {version(name)}" for names in found for name in sorted({*names})) or "none"


try:
    from vllm.compilation.passes.inductor_pass import InductorPass
    from vllm.config import get_current_vllm_config
    from vllm.logger import init_logger
    from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        ReplicatedLinear,
        UnquantizedLinearMethod,
        register_weight_loader_v2_supported_method,
    )
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
    from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
    from vllm.platforms import current_platform
except ImportError as error:
    raise ImportError(f"fp6_compile is tested with vLLM {TESTED}, here is {_installed()}: {error}") from error

__all__ = [
    "ChannelQuantScaleParameter",
    "InductorPass",
    "LinearBase",
    "LinearMethodBase",
    "ModelWeightParameter",
    "ParallelLMHead",
    "QuantizationConfig",
    "ReplicatedLinear",
    "RoutedExperts",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "current_platform",
    "has_tied_head",
    "inductor_settings",
    "init_logger",
    "initialize_online_processing",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
    "was_processed",
]


def inductor_settings() -> tuple[dict[str, Any], str]:
    """Inductor's settings of the model that is being made, and the one of them that is a pass of the user's."""
    return get_current_vllm_config().compilation_config.inductor_compile_config, current_platform.pass_key


def has_tied_head() -> bool:
    """Whether the model that is being made shares its head's weight with the embedding."""
    return bool(getattr(get_current_vllm_config().model_config.hf_text_config, "tie_word_embeddings", False))


def was_processed(layer: Any) -> bool:
    """Whether the layer's weights have been processed since they were loaded; from now on they have.

    vLLM processes a layer when its last weight has come, and again, with all others, at the end. It resets the mark by its
    name before it loads anew.
    """
    before: bool = getattr(layer, "_already_called_process_weights_after_loading", False)
    layer._already_called_process_weights_after_loading = True
    return before
