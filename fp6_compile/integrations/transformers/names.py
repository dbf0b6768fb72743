"""Names of transformers that its documentation does not promise; all are in 5.0 to 5.24.

An HfQuantizer's methods and the classes of core_model_loading are written for quantizers inside of transformers. Everything
that this package needs of them, beside the methods that quantizer.py overrides, is imported or done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, revert_weight_conversion
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

__all__ = [
    "ConversionOps",
    "HfQuantizer",
    "SourceConverter",
    "forget_loading",
    "get_module_from_name",
    "has_adapters",
    "ignored_on_save",
    "kept_in_float32",
    "should_convert_module",
    "stored_names",
    "tied_names",
]


class SourceConverter(WeightConverter):
    """A WeightConverter whose operation is told what the collected tensors are called in the files.

    A tensor's name in the model may be another: transformers adds and removes prefixes, and renames old models' modules.
    """

    __slots__ = ()

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; `sources` of the operation are the names in the files."""
        operation: Any = self.operations[0]
        operation.sources = sorted(self.layer_targets[layer_name])
        return super().convert(layer_name, *args, **kwargs)


def forget_loading(model: nn.Module) -> None:
    """Saving does not undo what SourceConverters did while loading."""
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        model._weight_conversions = [one for one in used if not isinstance(one, SourceConverter)]  # type: ignore[assignment]


def stored_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` as files have them: renamed, merged or split as in the checkpoints that transformers reads."""
    done: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return done


def tied_names(model: nn.Module) -> dict[str, str]:
    """For each parameter that transformers ties to another: the other."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def has_adapters(model: nn.Module) -> bool:
    """Whether save_pretrained writes adapters only (`model.add_adapter`)."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def ignored_on_save(model: nn.Module) -> set[str]:
    """Tensors that save_pretrained leaves out."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def kept_in_float32(model: nn.Module) -> list[str]:
    """Modules whose parameters stay in float32."""
    return list(getattr(model, "_keep_in_fp32_modules", None) or ())
