"""`Fp6Config`: how `from_pretrained` quantizes, and what config.json of a packed folder says."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from fp6_compile.config import QuantConfig

try:
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("fp6: Fp6Config needs transformers: pip install 'fp6_compile[transformers]'") from error

QUANT_METHOD = "fp6"
VERSION = 2
# What config.json of a packed folder says, in this order.
_STORED = ("quant_method", "version", "format", "group_size", "modules_to_not_convert", "module_formats")
_OF_QUANT_CONFIG = ("format", "group_size", "scale_method", "min_features", "include_float32")


class Fp6Config(QuantizationConfigMixin):
    """How `from_pretrained(..., quantization_config=Fp6Config())` quantizes a model while it loads, or loads a packed one.

    Args:
        format: "e2m3", "e3m2", "auto" (the better one of these for each weight), or another of fp6_compile.formats.FORMATS.
        group_size: inputs that share a scale, or None for one scale per output channel. On a GPU a multiple of 32.
        scale_method: "absmax", or "mse" to search the clipping ratio with the least squared error.
        min_features: weights with fewer inputs or outputs than this stay as they are.
        include_float32: quantize the weights of a float32 model too. On, unlike `quantize_`'s: this config is a request.
        modules_to_not_convert: names of modules whose linears stay as they are: a name also covers what is below the module,
            and the end of longer names; regular expressions are allowed. None is transformers' own choice: the output
            embedding ("lm_head"), weights tied to others, and the module of the last parameter. [] is none.
        target_bits: with format="auto", formats of 4 to 8 bits are mixed so that the model's error is least at this many
            bits a weight, scales counted. All weights must be known before the first is packed: the peak of memory is then
            that of the 16-bit model.
        module_formats: exceptions, by full module name:
            {"model.layers.0.mlp.down_proj": {"format": "e3m2", "group_size": 64}}.
        dequantize: load a packed folder as an ordinary 16-bit model.
        version: of the folder's format.

    Raises ValueError, naming the field, what was given and what is allowed.
    """

    quant_method: Any

    def __init__(
        self,
        format: str = "e2m3",
        group_size: int | None = None,
        scale_method: str = "absmax",
        min_features: int = 128,
        include_float32: bool = True,
        modules_to_not_convert: Sequence[str] | None = None,
        target_bits: float | None = None,
        module_formats: Mapping[str, Mapping[str, Any]] | None = None,
        dequantize: bool = False,
        version: int = VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method, self.version = quant_method, version
        self.format, self.group_size, self.scale_method = format, group_size, scale_method
        self.min_features, self.include_float32, self.target_bits = min_features, include_float32, target_bits
        self.modules_to_not_convert = None if modules_to_not_convert is None else _names(modules_to_not_convert)
        self.module_formats = {} if module_formats is None else module_formats
        self.dequantize = dequantize
        if unknown:
            raise ValueError(
                f"fp6: Fp6Config has no field {next(iter(unknown))!r}, its fields are {sorted(vars(self))}"
            )
        self.post_init()

    def post_init(self) -> None:
        """Check all fields."""
        self.quant_config()
        self._check_module_formats()
        bits = self.target_bits
        if bits is not None and (type(bits) not in (int, float) or self.format != "auto" or self.module_formats):
            needs = "a number, beside format='auto' and no module_formats"
            raise ValueError(f"fp6: target_bits got {bits!r} with format={self.format!r}, needs {needs}")
        if not isinstance(self.dequantize, bool):
            raise ValueError(f"fp6: dequantize got {self.dequantize!r}, needs True or False")
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"fp6: quant_method got {self.quant_method!r}, needs {QUANT_METHOD!r}")
        if self.version != VERSION:
            raise ValueError(
                f"fp6: version got {self.version!r}, this fp6_compile knows {VERSION}; "
                "use the fp6_compile that wrote the folder, or quantize the model anew"
            )

    def _check_module_formats(self) -> None:
        if not isinstance(self.module_formats, Mapping):
            raise ValueError(f"fp6: module_formats got {self.module_formats!r}, needs a dictionary by module name")
        for module, about in self.module_formats.items():
            if not isinstance(about, Mapping) or not about or about.keys() - {"format", "group_size"}:
                needs = "a dictionary of 'format' and 'group_size'"
                raise ValueError(f"fp6: module_formats[{module!r}] got {about!r}, needs {needs}")
            self.quant_config(module)

    def quant_config(self, module: str | None = None, **others: Any) -> QuantConfig:
        """How a linear is quantized: the named one, or those without an exception. `others` are fields of QuantConfig."""
        fields = {name: getattr(self, name) for name in _OF_QUANT_CONFIG}
        exception = {} if module is None else self.module_formats.get(module, {})
        return QuantConfig(**{**fields, **exception, **others})

    def to_dict(self) -> dict[str, Any]:
        """What config.json says of a packed folder; and of a request, what differs from the defaults."""
        defaults = vars(type(self)())
        stored = {name: getattr(self, name) for name in _STORED}
        others = {
            name: value for name, value in vars(self).items() if name not in stored and value != defaults.get(name)
        }
        return copy.deepcopy({**stored, **others})


def _names(given: Any) -> list[str]:
    if not isinstance(given, (list, tuple, set)) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"fp6: modules_to_not_convert got {given!r}, needs a list of module names or None")
    return list(given)
