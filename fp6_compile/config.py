"""The options of the backend: every key, its type and its default in one frozen dataclass, checked in one place."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

import torch

from fp6_compile.formats import DEFAULT, FORMATS
from fp6_compile.quantize import SCALES

log = logging.getLogger("fp6_compile")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# Per option: whether a value will do, and the words for what would have.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda v: isinstance(v, str) and v in (*FORMATS, "auto"), f"'auto' or one of {sorted(FORMATS)}"),
    "group_size": (lambda v: v is None or _positive(v), "a positive integer or None"),
    "scale": (lambda v: isinstance(v, str) and v in SCALES, f"one of {list(SCALES)}"),
    "skip": (
        lambda v: isinstance(v, (list, tuple)) and all(isinstance(glob, str) for glob in v),
        "a list of module-name globs",
    ),
    "min_features": (_positive, "a positive integer"),
    "float32": (lambda v: isinstance(v, bool), "True or False"),
    "strict": (lambda v: isinstance(v, bool), "True or False"),
    "mode": (lambda v: v is None or isinstance(v, str), "the name of a torch.compile mode"),
    "inductor": (lambda v: isinstance(v, Mapping), "a dictionary of torch._inductor.config settings"),
}


@dataclass(frozen=True)
class Options:
    """What `torch.compile(model, backend="fp6", options={...})` accepts.

    format: "e2m3" (half the error on ordinary weights), "e3m2" (the papers' format, robust to outliers), "auto" (for each
        weight the one of these two with less error; for weights that are merged, together), or another of `FORMATS`.
    group_size: inputs that share a scale, or None for one scale per output channel. On a GPU a multiple of 32.
    scale: "absmax", or "mse" to search the clipping ratio with the least squared error.
    skip: globs of module names to leave alone, for example ["lm_head", "*.down_proj"].
    min_features: weights with fewer inputs or outputs than this are left alone.
    float32: take float32 weights too. Off by default: such a model has not asked for 16-bit accuracy.
    strict: raise if a linear cannot be taken, instead of leaving it as it was.
    mode: a torch.compile mode ("reduce-overhead", "max-autotune", ...); torch refuses `mode=` beside `options=`.
    inductor: settings of torch._inductor.config for this compilation, for example {"max_autotune": True}.
    """

    format: str = DEFAULT
    group_size: int | None = None
    scale: str = "absmax"
    skip: tuple[str, ...] = ()
    min_features: int = 128
    float32: bool = False
    strict: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, mode: str | None, options: Mapping[str, Any] | None) -> Options:
        """Options from the two arguments of torch.compile.

        Raises ValueError naming the option, what was given and what is allowed.
        """
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ValueError(f"fp6: unknown option {unknown[0]!r}, known options are {known}")
        if mode is not None and given.setdefault("mode", mode) != mode:
            raise ValueError(f"fp6: mode={mode!r} and options['mode']={given['mode']!r} disagree")
        for key, value in given.items():
            allowed, words = _CHECKS[key]
            if not allowed(value):
                raise ValueError(f"fp6: option {key!r} got {value!r}, needs {words}")
        return cls(**{**given, "skip": tuple(given.get("skip", ()))})

    def describe(self) -> str:
        """What differs from the defaults, and always the format, for people."""
        changed = [f for f in fields(self) if getattr(self, f.name) not in (f.default, {})]
        return ", ".join([self.format, *(f"{f.name}={getattr(self, f.name)!r}" for f in changed if f.name != "format")])

    def skips(self, names: list[str]) -> str | None:
        """The first glob of `skip` that one of `names` matches."""
        return next((glob for glob in self.skip if any(fnmatchcase(name, glob) for name in names)), None)


def names_in(model: torch.nn.Module) -> Iterator[str]:
    """All names that a glob may match in a model: of modules, and of parameters, which need not be some module's weight."""
    yield from (name for name, _ in model.named_modules(remove_duplicate=False))
    parameters = model.named_parameters(remove_duplicate=False)
    yield from (name.removesuffix(".weight") for name, parameter in parameters if parameter.dim() > 1)


def warn_of_unmatched(options: Options, names: Iterable[str], where: str) -> list[str]:
    """The globs of `skip` that match none of `names`; each is logged as a warning, with the names that are most like it."""
    known = sorted({*names} - {""})
    missed = [glob for glob in options.skip if Options(skip=(glob,)).skips(known) is None]
    for glob in missed:
        close = difflib.get_close_matches(glob, known, 3) or difflib.get_close_matches(
            glob.rpartition(".")[2], {name.rpartition(".")[2] for name in known}, 3
        )
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        log.warning("fp6: skip: %r matches no module of %s%s", glob, where, hint)
    return missed
