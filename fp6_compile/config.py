"""How a model is quantized: `QuantConfig`, which all entry points accept, and the backend's `Options`, which extend it.

A new option is written in two places: here, as a field with its check, and where it is used. Keyword arguments, the
backend's `options`, error messages, cache keys and descriptions follow from the field. A weight's reasons to stay
unquantized that all entry points share are here, too; each entry point adds its own.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp6_compile.formats import DEFAULT, FORMATS
from fp6_compile.quantize import SCALES

log = logging.getLogger("fp6_compile")

_OLD_NAMES = {"scale": "scale_method", "float32": "include_float32"}


def _needs(words: str, allows: Callable[[Any], bool]) -> dict[str, Any]:
    """The check of a field: whether a value is allowed, and the words for what is."""
    return {"words": words, "allows": allows}


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_globs(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(glob, str) for glob in value)


_BOOL = _needs("True or False", lambda v: isinstance(v, bool))
_COUNT = _needs("a positive integer", _is_positive)
_GROUP_SIZE = _needs("a positive integer or None", lambda v: v is None or _is_positive(v))
_GLOBS = _needs("a list of module-name globs", _are_globs)
_FILTER = _needs("a function of (module, name) or None", lambda v: v is None or callable(v))
_SCALE = _needs(f"one of {list(SCALES)}", lambda v: isinstance(v, str) and v in SCALES)
_FORMAT = _needs(f"'auto' or one of {sorted(FORMATS)}", lambda v: isinstance(v, str) and (v == "auto" or v in FORMATS))
_MODE = _needs("the name of a torch.compile mode", lambda v: v is None or isinstance(v, str))
_INDUCTOR = _needs("a dictionary of torch._inductor.config settings", lambda v: isinstance(v, Mapping))


@dataclass(frozen=True)
class QuantConfig:
    """Which linears are quantized, and how: for `quantize_`, `calibrate_`, `sensitivities` and the backend's `options`.

    format: "e2m3" (half the error on ordinary weights), "e3m2" (the papers' format, robust to outliers), "auto" (for each
        weight the one of these two with less error; for weights that are merged, together), or another of `FORMATS`.
    group_size: inputs that share a scale, or None for one scale per output channel. On a GPU a multiple of 32.
    scale_method: "absmax", or "mse" to search the clipping ratio with the least squared error.
    skip: globs of module names that are not quantized, for example ["lm_head", "*.down_proj"].
    filter_fn: called as filter_fn(module, name) with every module that has the weight and its fully qualified name ("" for
        the model itself), as in torchao; the weight is quantized if all calls return True. An embedding is not asked about
        a weight that it shares with another module. The backend sees the modules of the model that is being called; a
        weight that it finds in none of them is skipped.
    min_features: weights with fewer inputs or outputs than this are not quantized.
    include_float32: quantize float32 weights too. Off by default: such a model has not asked for 16-bit accuracy.

    Raises ValueError, naming the field, what was given and what is allowed.

    Cache keys contain the repr. It leaves out filter_fn, which has no stable one and needs none: what filter_fn decides
    is in the compiled graph, which is in the key itself. A compilation calls filter_fn anew, and a cached one is only found
    for the same decisions.
    """

    format: str = field(default=DEFAULT, metadata=_FORMAT)
    group_size: int | None = field(default=None, metadata=_GROUP_SIZE)
    scale_method: str = field(default="absmax", metadata=_SCALE)
    skip: Sequence[str] = field(default=(), metadata=_GLOBS)
    filter_fn: Callable[[nn.Module, str], bool] | None = field(default=None, repr=False, metadata=_FILTER)
    min_features: int = field(default=128, metadata=_COUNT)
    include_float32: bool = field(default=False, metadata=_BOOL)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not f.metadata["allows"](value):
                raise ValueError(f"fp6: option {f.name!r} got {value!r}, needs {f.metadata['words']}")
        object.__setattr__(self, "skip", tuple(self.skip))

    @classmethod
    def of(cls, config: QuantConfig | None, keywords: Mapping[str, Any]) -> QuantConfig:
        """`config`, or what a function's keyword arguments say instead.

        Raises ValueError for both at once, for what is no QuantConfig, and as the constructor does; TypeError for an
        unknown keyword.
        """
        if config is None:
            return cls(**_renamed(keywords))
        if not isinstance(config, QuantConfig):
            raise ValueError(f"config: got {config!r}, needs a QuantConfig or None")
        if keywords:
            raise ValueError(f"config: got a QuantConfig and {next(iter(keywords))}= beside it, needs one or the other")
        return config

    def describe(self) -> str:
        """What differs from the defaults, and always the format, for people."""
        changed = [f for f in fields(self) if f.name != "format" and getattr(self, f.name) not in (f.default, {})]
        return ", ".join([self.format, *(f"{f.name}={_text(getattr(self, f.name))}" for f in changed)])

    def skips(self, names: Iterable[str]) -> str | None:
        """The first glob of `skip` that one of `names` matches."""
        known = list(names)
        return next((glob for glob in self.skip if any(fnmatchcase(name, glob) for name in known)), None)


@dataclass(frozen=True)
class Options(QuantConfig):
    """What `torch.compile(model, backend="fp6", options={...})` accepts: the fields of QuantConfig, and

    strict: raise if a linear cannot be quantized, instead of leaving it as it was.
    mode: a torch.compile mode ("reduce-overhead", "max-autotune", ...); torch refuses `mode=` beside `options=`.
    inductor: settings of torch._inductor.config for this compilation, for example {"max_autotune": True}.
    """

    strict: bool = field(default=False, metadata=_BOOL)
    mode: str | None = field(default=None, metadata=_MODE)
    inductor: Mapping[str, Any] = field(default_factory=dict, metadata=_INDUCTOR)

    @classmethod
    def parse(cls, mode: str | None, options: Mapping[str, Any] | None) -> Options:
        """Options from the two arguments of torch.compile.

        Raises ValueError naming the option, what was given and what is allowed.
        """
        given = _renamed(options or {})
        known = [f.name for f in fields(cls)]
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ValueError(f"fp6: unknown option {unknown[0]!r}, known options are {known}")
        if mode is not None and given.setdefault("mode", mode) != mode:
            raise ValueError(f"fp6: mode={mode!r} and options['mode']={given['mode']!r} disagree")
        return cls(**given)


def _renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with the names of today; those of version 0.1 are accepted with a warning."""
    found = dict(given)
    for old, new in _OLD_NAMES.items():
        if old in found:
            if new in found:
                raise ValueError(f"fp6: option {old!r} is the old name of {new!r}: got both")
            message = f"fp6: option {old!r} is called {new!r} now"
            warnings.warn(message, DeprecationWarning, stacklevel=4)  # whoever calls quantize_ and the like
            found[new] = found.pop(old)
    return found


def _text(value: object) -> str:
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)


class SkipReason(NamedTuple):
    """Why a weight is not quantized. `by_request`: the configuration asks for it, so that `strict` has no objection."""

    text: str
    by_request: bool


# Whether a reason to skip a weight holds, and its text.
Check = tuple[bool, str]


def skipped_by_name(
    config: QuantConfig, names: Iterable[str], modules: Sequence[tuple[nn.Module, str]]
) -> SkipReason | None:
    """Whether `skip` or `filter_fn` leave out a weight that is called `names` and that `modules` have."""
    if glob := config.skips(names):
        return SkipReason(f"skipped by {glob!r}", True)
    others = [(module, name) for module, name in modules if not isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    asked = others or modules
    if config.filter_fn is not None and not (asked and all(config.filter_fn(*one) for one in asked)):
        return SkipReason("skipped by filter_fn", True)
    return None


def skipped_by_kind(
    config: QuantConfig, weight: Tensor, no_kernel: str | None, first: Iterable[Check], then: Iterable[Check] = ()
) -> SkipReason | None:
    """Whether a weight's dtype, its size or the lack of a kernel for `group_size` (`no_kernel`) are in the way.

    `first` and `then` are the caller's own checks, before and after that of the dtype.
    """
    wanted = (torch.float16, torch.bfloat16, *([torch.float32] if config.include_float32 else []))
    checks = [
        *first,
        (weight.dtype not in (*wanted, torch.float32), f"{weight.dtype} weight"),
        (weight.dtype not in wanted, "float32 weight, and include_float32=True was not given"),
        *then,
        (no_kernel is not None, str(no_kernel)),
    ]
    if text := next((text for holds, text in checks if holds), None):
        return SkipReason(text, False)
    if min(weight.shape) < config.min_features:
        return SkipReason(f"fewer than {config.min_features} inputs or outputs (min_features)", True)
    return None


def names_in(model: nn.Module) -> Iterator[str]:
    """All names that a glob may match in a model: of modules, and of parameters, which need not be some module's weight."""
    yield from (name for name, _ in model.named_modules(remove_duplicate=False))
    parameters = model.named_parameters(remove_duplicate=False)
    yield from (name.removesuffix(".weight") for name, parameter in parameters if parameter.dim() > 1)


def warn_of_unmatched(globs: Sequence[str], names: Iterable[str], where: str) -> list[str]:
    """Those of `globs`, of `skip`, that match none of `names`; each is logged as a warning, with the most similar names."""
    known = sorted({*names} - {""})
    missed = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in known)]
    for glob in missed:
        close = difflib.get_close_matches(glob, known, 3) or difflib.get_close_matches(
            glob.rpartition(".")[2], {name.rpartition(".")[2] for name in known}, 3
        )
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        log.warning("fp6: skip: %r matches no module of %s%s", glob, where, hint)
    return missed
