"""Inductor's lowering of `fp6::mm`: the only rooms that know torch._inductor's private names, gathered in _inductor.py."""

from functools import cache


@cache
def register() -> None:
    """Tell Inductor how to lower fp6::mm, once. Not at import: it imports Triton."""
    import torch

    from fp6_compile.lowerings._inductor import register_lowering
    from fp6_compile.lowerings.mm import lower_mm

    register_lowering(torch.ops.fp6.mm.default, type_promotion_kind=None)(lower_mm)
