"""transformers' quantizer for six-bit weights: what `from_pretrained`, `save_pretrained` and `dequantize` ask it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile import integrations
from fp6_compile.checkpoint.metadata import quantization_config as described
from fp6_compile.checkpoint.packed_weight import PackedWeight
from fp6_compile.formats import get_format
from fp6_compile.integrations.transformers.config import Fp6Config
from fp6_compile.integrations.transformers.loading import Quantize, grow, read_folder, unpacking
from fp6_compile.integrations.transformers.names import HfQuantizer, forget_loading, has_adapters
from fp6_compile.integrations.transformers.plan import Plan
from fp6_compile.integrations.transformers.saving import Flattened
from fp6_compile.packed.quantize_model import quantize_
from fp6_compile.packed.slots import slots
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.report import log_report
from fp6_compile.storage.safetensors import Entry


class Fp6HfQuantizer(HfQuantizer):
    """Of one model. `stored` are the packed weights of the folder that is loaded, `entries` its tensors."""

    requires_calibration = False
    quantization_config: Fp6Config

    def __init__(self, quantization_config: Fp6Config, **kwargs: Any) -> None:
        # A copy: the user's may be for several models, and what becomes of this one is written into it.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.stored: dict[str, PackedWeight] = {}
        self.entries: Mapping[str, Entry] = {}
        self.plan: Plan | None = None
        self.refused: dict[str, str] = {}
        self.original_names = False
        self._device_map: Any = None
        integrations.install()  # methods of PreTrainedModel, which may not have been there when transformers was imported

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Called once with the user's device_map, and for "auto" again with what became of it."""
        self._device_map = device_map
        self._check_devices()

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether the loader passes the parameter to `get_quantize_ops`."""
        one_by_one = self.plan is not None and self.quantization_config.target_bits is None
        return one_by_one and self.plan is not None and param_name in self.plan.packed

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes, for device_map="auto"."""
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        how = self.quantization_config.quant_config(param_name.removesuffix(".weight"))
        bits = 6 if how.format == "auto" else get_format(how.format).bits
        groups = 1 if how.group_size is None else -(-param.shape[1] // how.group_size)
        return bits / 8 + 4 * groups / param.shape[1]

    def get_quantize_ops(self) -> Quantize:
        """What quantizes a parameter."""
        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """What loads the parameters of a packed folder."""
        return [unpacking(self)] if self.pre_quantized else []

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            manifest = read_folder(checkpoint_files, self.quantization_config)
            grow(model, manifest)
            self.stored, self.entries = dict(manifest.weights), manifest.entries
        else:
            self.plan = Plan(model, self.quantization_config, on_gpu=any(map(_is_gpu, self._devices())))
        self._check_devices()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        forget_loading(model)
        self.entries = {}  # and with them the files
        if self.plan is not None:
            self._finish(model, self.plan)
        return model

    def _finish(self, model: nn.Module, plan: Plan) -> None:
        """The report, and a configuration that says what became of each weight."""
        config = self.quantization_config
        if config.target_bits is None:
            log_report(plan.report(model, self.refused))
        else:
            wanted = plan.packed
            chosen = config.quant_config(filter_fn=lambda module, name: f"{name}.weight" in wanted)
            quantize_(model, chosen, target_bits=config.target_bits)
        self._describe(model, described(model))

    def _describe(self, model: Any, about: dict[str, Any]) -> None:
        self.quantization_config = model.config.quantization_config = Fp6Config(**about)

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, str]]:
        """What save_pretrained writes into every shard; config.json is written after it."""
        if has_adapters(model):
            return None, {}
        flattened = Flattened(model, self.original_names)
        self._describe(model, flattened.quantization_config)
        return flattened.tensors, flattened.metadata

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """`model` with ordinary weights, of the dtype that each was presented in unless another is given.

        They are trainable if all other parameters are: not beside adapters.
        """
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        trainable = all(p.requires_grad for p in model.parameters() if not isinstance(p, PackedTensor))
        for slot in slots(model):
            if isinstance(slot.tensor, PackedTensor):
                slot.put(slot.tensor.dequantize(wanted))
                slot.tensor.requires_grad_(trainable)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Trainer takes the model with adapters on it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """generate compiles the steps of a static cache."""
        return True

    def _devices(self) -> Iterable[Any]:
        return self._device_map.values() if isinstance(self._device_map, dict) else [self._device_map]

    def _check_devices(self) -> None:
        """Raises ValueError for a packed weight on disk: offloaded tensors are plain ones in files of their own."""
        if not isinstance(self._device_map, dict) or "disk" not in self._device_map.values():
            return
        for name in self.stored if self.plan is None else self.plan.packed:
            if _device(self._device_map, name) == "disk":
                raise ValueError(
                    f"fp6: device_map puts {name} on the disk, where packed weights cannot be. Quantize with "
                    "device_map='cpu', save_pretrained, and load that folder with max_memory for the packed model"
                )


def _device(device_map: dict[str, Any], name: str) -> Any:
    """Where the parameter goes: what the longest key that is a part of its name says."""
    keys = (key for key in device_map if not key or name == key or name.startswith(f"{key}."))
    return device_map[max(keys, key=len, default="")] if device_map else None


def _is_gpu(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")
