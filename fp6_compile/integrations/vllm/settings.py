"""What "quantization_config" says: which layer of vLLM has which formats, and how tensor parallelism may cut them.

    {"quant_method": "fp6", "version": 2, "format": "e2m3", "group_size": null,
     "modules_to_not_convert": ["lm_head"], "module_formats": {"model.layers.0.mlp.down_proj": {"format": "e3m2"}}}

With "version" it describes a folder of packed weights. Without, it is what a user asks of 16-bit weights: the fields of
QuantConfig that vLLM can honour, and the names above, where `modules_to_not_convert` may have globs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from fp6_compile.checkpoint.metadata import VERSION
from fp6_compile.config import QuantConfig
from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import canonical_shapes

_OPTIONS = ("format", "group_size", "scale_method", "min_features")
_KNOWN = ("quant_method", "modules_to_not_convert", "module_formats", "lm_head", *_OPTIONS)


class Scheme(NamedTuple):
    """How a weight is quantized: the format of its codes, and the inputs that share a scale (None: all of a row)."""

    format: str
    group_size: int | None

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of its planes."""
        return get_format(self.format).planes


@dataclass(frozen=True)
class Settings:
    """`quantization_config`, checked.

    config: the default of all weights; of 16-bit ones, how they are quantized.
    packed: whether a folder of packed weights is described.
    skip: names of linears that are not packed; globs.
    by_name: the weights that differ from the default.
    lm_head: whether the head of a 16-bit folder is quantized.
    """

    config: QuantConfig = field(default_factory=QuantConfig)
    packed: bool = False
    skip: tuple[str, ...] = ()
    by_name: Mapping[str, Scheme] = field(default_factory=dict)
    lm_head: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings:
        """From the dictionary. Raises ValueError, which names the field, what was given and what is allowed."""
        packed = "version" in given
        if packed and given["version"] != VERSION:
            raise ValueError(
                f"fp6: quantization_config has version {given['version']!r}, this fp6_compile reads {VERSION}: "
                "install one that is as new as the folder, or quantize the model again"
            )
        unknown = [name for name in given if name not in _KNOWN]
        if unknown and not packed:
            raise ValueError(f"fp6: unknown option {unknown[0]!r} in quantization_config, known are {list(_KNOWN)}")
        config = QuantConfig(**{name: given[name] for name in _OPTIONS if name in given})
        formats = {
            name: Scheme(one.get("format", config.format), one.get("group_size", config.group_size))
            for name, one in (given.get("module_formats") or {}).items()
        }
        for scheme in [Scheme(config.format, config.group_size), *formats.values()] if packed else formats.values():
            replace(config, format=scheme.format, group_size=scheme.group_size)
            get_format(scheme.format)  # no "auto" either
        skip = tuple(given.get("modules_to_not_convert") or ())
        return cls(config, packed, skip, formats, bool(given.get("lm_head", False)))

    def schemes(self, names: Sequence[str]) -> list[Scheme] | None:
        """One for each of `names`, the weights that a layer of vLLM consists of; None if it stays in 16 bits.

        Raises ValueError where some of them are packed and some are not.
        """
        default = Scheme(self.config.format, self.config.group_size)
        found = [None if self._skips(name) else self.by_name.get(name, default) for name in names]
        kept = [name for name, scheme in zip(names, found, strict=True) if scheme is None]
        if 0 < len(kept) < len(names):
            others = [name for name in names if name not in kept]
            raise ValueError(
                f"fp6: {kept[0]} is not packed and {others[0]} is, but vLLM multiplies by them at once: pack both (smaller "
                "min_features), or leave out both (skip, modules_to_not_convert)"
            )
        return None if kept else [scheme for scheme in found if scheme is not None]

    def _skips(self, name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in self.skip)


def shard_names(name: str, merged: Mapping[str, Sequence[str]]) -> list[str]:
    """The weights of a layer of vLLM, which `merged` says: q_proj, k_proj and v_proj of qkv_proj."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in merged.get(last, [last])]


def groups(k: int, group_size: int | None) -> int:
    """Scales of a row of `k` inputs."""
    return 1 if group_size is None else -(-k // group_size)


def plane_columns(name: str, schemes: Sequence[Scheme], k: int) -> dict[int, int]:
    """Bytes of a row of `k` inputs in each bit plane, by the plane's width, of weights that lie in the same planes.

    Raises ValueError if they do not fit: other group sizes, or rows that formats pad in different ways.
    """
    sizes = {scheme.group_size for scheme in schemes}
    if len(sizes) > 1:
        raise ValueError(
            f"fp6: the weights of {name} have group sizes {sorted(map(str, sizes))}, but vLLM loads them into one tensor: "
            "quantize them with one group_size"
        )
    found: dict[int, set[int]] = {}
    for scheme in schemes:
        shapes = canonical_shapes(get_format(scheme.format), 1, k)
        for width, (_, columns) in zip(scheme.widths, shapes, strict=True):
            found.setdefault(width, set()).add(columns)
    if any(len(columns) > 1 for columns in found.values()):
        formats = sorted({scheme.format for scheme in schemes})
        raise ValueError(f"fp6: the weights of {name} have formats {formats}, which pad {k} inputs in different ways")
    return {width: columns.pop() for width, columns in sorted(found.items(), reverse=True)}


def check_cut(name: str, schemes: Sequence[Scheme], k: int, part: int) -> None:
    """ValueError if tensor parallelism cuts `k` inputs into parts that are not whole groups and whole bytes."""
    if part == k:
        return
    for scheme in schemes:
        inputs = scheme.group_size or 8 // min(scheme.widths)
        bytes_fit = all(part * width % 8 == 0 for width in scheme.widths)
        if k % part or part % inputs or not bytes_fit:
            what = f"groups of {scheme.group_size}" if scheme.group_size else f"bytes of {inputs} codes"
            raise ValueError(
                f"fp6: tensor parallelism cuts the {k} inputs of {name} into {part}, which are not whole {what}: take "
                "another tensor_parallel_size, or quantize with a group_size that divides the part"
            )
