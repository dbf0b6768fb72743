"""What Triton's interpreter gets wrong or lacks (3.6, 3.7 and 3.9 alike), put right.

It keeps a bf16 tensor as its raw uint16 bits. Loads, stores and bitcasts are right, arithmetic is not: `tl.dot` and `+`
compute with the integers, and a cast to bf16 truncates where the hardware rounds to nearest even. Here bf16 is widened
to fp32 before any arithmetic and rounded after it. A scalar int1 that meets a block becomes int8, which Triton 3.9 refuses
as a mask. And libdevice is a library of machine code, which an interpreter cannot call: its functions are taken from
torch by name.

Imported only where TRITON_INTERPRET=1 (interpreter.py); `test_deviceless_harness.py` pins that the reasons still hold.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """A bf16 handle as an fp32 one (exact); anything else as it is."""
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(handle: TensorHandle) -> TensorHandle:
    """An fp32 handle as a bf16 one, to nearest even as every GPU does."""
    rounded = torch.from_numpy(np.ascontiguousarray(handle.data, dtype=np.float32)).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def _in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's elementwise method, computing in fp32 where an operand is bf16."""

    def wrapped(self: Any, *args: Any) -> Any:
        if not any(map(_is_bf16, args)):
            return method(self, *args)
        result = method(self, *map(_widen, args))
        if result.data.dtype == np.bool_:  # a comparison
            return TensorHandle(result.data, tl.int1)
        return _round(result)

    return wrapped


def _cast(method: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's cast, by way of fp32 where source or destination is bf16."""

    def wrapped(self: Any, source: TensorHandle, dst_type: Any, *rest: Any) -> Any:
        source = _widen(source)
        if dst_type.scalar != tl.bfloat16:
            return source if source.dtype.scalar == dst_type.scalar else method(self, source, dst_type, *rest)
        return _round(source)

    return wrapped


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> TensorHandle:
    """fp32 products and sums, which is what the tensor cores do with 16-bit operands."""
    a, b = _widen(a), _widen(b)
    return TensorHandle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _splat_keeps_bool(method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, ret_ty: Any, arg: TensorHandle) -> TensorHandle:
        result = method(self, ret_ty, arg)
        return TensorHandle(result.data.astype(arg.data.dtype), result.dtype)

    return wrapped


_TORCH_NAMES = {"rint": "round", "nearbyint": "round", "fabs": "abs"}


class Libdevice:
    """`libdevice.exp(x)` is `torch.exp` of the interpreted tensor, and so on for every name that torch has."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(torch, _TORCH_NAMES.get(name, name))

        def call(*args: Any) -> tl.tensor:
            result = function(*map(_to_torch, args)).numpy()
            shaped = max((arg for arg in args if isinstance(arg, tl.tensor)), key=lambda arg: arg.numel.value)
            scalar = tl.int1 if result.dtype == np.bool_ else shaped.dtype
            shape = shaped.type.get_block_shapes() if shaped.type.is_block() else None
            return tl.tensor(TensorHandle(result, scalar), tl.block_type(scalar, shape) if shape else scalar)

        return call


def _to_torch(argument: Any) -> Any:
    if isinstance(argument, tl.tensor):
        return torch.from_numpy(np.ascontiguousarray(argument.handle.data))
    return getattr(argument, "value", argument)  # a constexpr or a number


_patch_language = interpreter._patch_lang


@functools.cache
def _patch_language_once(fn: Any) -> types.SimpleNamespace:
    """Triton's own patching of `tl`, without undoing it after each launch and redoing it on each device call.

    A reduction calls its combine function once per element, and the patching took nine tenths of the time.
    """
    _patch_language(fn)
    # Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses; later versions squeeze it as well.
    tl.core.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
    return types.SimpleNamespace(restore=lambda: None)


def apply() -> None:
    """Put the interpreter of this process right."""
    interpreter._patch_lang = _patch_language_once
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma"):
        setattr(InterpreterBuilder, name, _in_fp32(getattr(InterpreterBuilder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, _cast(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = _create_dot
    InterpreterBuilder.create_splat = _splat_keeps_bool(InterpreterBuilder.create_splat)
