"""Inductor's lowering of `fp6::mm`.

mm         the lowering: a Triton template, fp6_mm.py.jinja, or a call of the operator    <- start here
split_k    which kernel adds up the parts of a split K
"""

from functools import cache
from pathlib import Path

_SOURCES = (".py", ".jinja", ".cpp", ".h", ".json")


@cache
def register() -> None:
    """Tell Inductor how to lower fp6::mm, once. Not at import: it imports Triton."""
    import torch

    from fp6_compile._compat.inductor import register_lowering
    from fp6_compile.lowerings.mm import lower_mm

    register_lowering(torch.ops.fp6.mm.default, type_promotion_kind=None)(lower_mm)


@cache
def source_hash() -> bytes:
    """A hash of every file of this package, for cache keys: Inductor's does not cover operators and lowerings of others."""
    from fp6_compile._compat.inductor import get_hash_for_files

    package = Path(__file__).parents[1]
    return get_hash_for_files(tuple(sorted(str(p) for p in package.rglob("*") if p.suffix in _SOURCES)))
