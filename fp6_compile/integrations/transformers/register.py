"""Makes transformers know `Fp6Config` and its quantizer, and save and dequantize what `quantize_` made.

transformers only warns of a quantization method that it does not know, and then gives random values to all packed weights.
So this is called whenever transformers is imported (fp6_compile.integrations), and not by the user.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from wrapt import FunctionWrapper, wrap_function_wrapper

from fp6_compile.packed.tensor import PackedTensor


def add_quantizer(auto: ModuleType) -> None:
    """Register with `transformers.quantizers.auto`, once; not before it is whole: its imports may be what imports torch."""
    if not hasattr(auto, "get_hf_quantizer") or "fp6" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    try:
        from fp6_compile.integrations.transformers.config import Fp6Config
        from fp6_compile.integrations.transformers.quantizer import Fp6HfQuantizer
    except Exception as error:  # a transformers without the names that these need
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING["fp6"] = _Unusable(error)
        raise
    auto.register_quantization_config("fp6")(Fp6Config)
    auto.register_quantizer("fp6")(Fp6HfQuantizer)
    wrap_function_wrapper(auto, "AutoHfQuantizer.merge_quantization_configs", _merge)


class _Unusable:
    """In the place of Fp6Config: loading a packed folder is an error, and not a model of random values."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"fp6: packed models cannot be loaded with this transformers: {self.error!r}") from self.error


def wrap_methods(modeling_utils: ModuleType | None = None) -> None:
    """Wrap methods of PreTrainedModel, once it is there."""
    model: Any = getattr(modeling_utils or sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if model is None or isinstance(vars(model)["save_pretrained"], FunctionWrapper):
        return
    from transformers import configuration_utils
    from transformers.quantizers import auto

    add_quantizer(auto)
    wrap_function_wrapper(configuration_utils, "PreTrainedConfig.from_dict", _from_dict)
    wrap_function_wrapper(model, "save_pretrained", _save_pretrained)
    wrap_function_wrapper(model, "dequantize", _dequantize)


def _merge(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """What config.json says of a packed model holds; of the user's config, `dequantize` does."""

    def merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        asked = quantization_config_from_args
        about = dict(quantization_config)
        if about.get("quant_method") != "fp6" or getattr(asked, "quant_method", None) != "fp6":
            return wrapped(quantization_config, asked)
        is_plain = {**asked.to_dict(), "dequantize": False} == {**type(asked)().to_dict(), "dequantize": False}
        merged = wrapped(quantization_config, None if is_plain else asked)  # warns of what it ignores
        merged.dequantize = asked.dequantize
        return merged

    return merge(*args, **kwargs)


def _from_dict(wrapped: Any, cls: Any, args: Any, kwargs: Any) -> Any:
    """quantization_config=None is no argument: it would make transformers forget that the folder is packed."""
    about = args[0].get("quantization_config") if args and isinstance(args[0], dict) else None
    if isinstance(about, dict) and about.get("quant_method") == "fp6" and kwargs.get("quantization_config", 0) is None:
        kwargs = {key: value for key, value in kwargs.items() if key != "quantization_config"}
    return wrapped(*args, **kwargs)


def _save_pretrained(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    from fp6_compile.checkpoint.save_model import remove_leftovers
    from fp6_compile.integrations.transformers.names import has_adapters
    from fp6_compile.integrations.transformers.saving import sort_metadata, without_renaming

    quantizer = _quantizer_of(model)
    if quantizer is None or has_adapters(model):
        return wrapped(*args, **kwargs)
    quantizer.original_names, bound = without_renaming(wrapped, args, kwargs)
    done = wrapped(*bound.args, **bound.kwargs)
    if bound.arguments.get("is_main_process", True):
        folder = Path(bound.arguments["save_directory"])
        remove_leftovers(folder)
        sort_metadata(folder)
    return done


def _dequantize(wrapped: Any, model: Any, args: Any, kwargs: Any) -> Any:
    _quantizer_of(model)
    return wrapped(*args, **kwargs)


def _quantizer_of(model: Any) -> Any:
    """The model's Fp6HfQuantizer; one is made for a model that `quantize_`, `calibrate_` or `load` packed."""
    from fp6_compile.integrations.transformers.config import Fp6Config
    from fp6_compile.integrations.transformers.quantizer import Fp6HfQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None and any(isinstance(parameter, PackedTensor) for parameter in model.parameters()):
        quantizer = model.hf_quantizer = Fp6HfQuantizer(Fp6Config())
    return quantizer if isinstance(quantizer, Fp6HfQuantizer) else None
