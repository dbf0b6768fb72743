"""Collectives of packed weights: each is that of their bit planes and scales, one after the other.

These are the ones with which DTensor distributes a weight (scatter, broadcast) and puts it together again (all-gather).
What arrives is exactly what was sent: nothing is quantized anew.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fp6_compile._compat.torch import functional_collectives
from fp6_compile.packed.dispatch import implements
from fp6_compile.packed.held import PackedBase
from fp6_compile.packed.sharding.parts import join_rows


@implements("c10d::scatter_")
def _scatter(func: Any, args: Any, kwargs: Any) -> Any:
    """scatter_(outputs, inputs of the root, ...)."""
    (output,), inputs, *how = args
    _check_alike(output, inputs[0] if inputs else [])
    for i, received in enumerate(_received(output)):
        sent = [[weight.tensors[i].contiguous() for weight in weights] for weights in inputs]
        work = _done(func([received], sent, *how, **kwargs))
        _put(output, i, received)
    return [output], work


@implements("c10d::broadcast_")
def _broadcast(func: Any, args: Any, kwargs: Any) -> Any:
    """broadcast_(tensors, ...): in place, in every process."""
    (weight,), *how = args
    for i, tensor in enumerate(_received(weight)):
        work = _done(func([tensor], *how, **kwargs))
        _put(weight, i, tensor)
    return [weight], work


@implements("_c10d_functional::all_gather_into_tensor")
def _all_gather(func: Any, args: Any, kwargs: Any) -> Tensor:
    """all_gather_into_tensor(weight, group_size, group): the weights of all, one above the other."""
    weight, size, group = args
    gathered = []
    for tensor in weight.tensors:
        whole = functional_collectives.wait_tensor(func(tensor.contiguous(), size, group, **kwargs))
        gathered.append(whole.chunk(size))
    *planes, scales = gathered
    return join_rows([type(weight)(parts, scale, weight.spec) for *parts, scale in zip(*planes, scales, strict=True)])


@implements("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")
def _wait(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Nothing is left to wait for: _all_gather has waited."""
    weight: Tensor = args[0]
    return weight


def _check_alike(output: Any, weights: list[Any]) -> None:
    if any(not isinstance(w, PackedBase) or w.spec != output.spec or w.shape != output.shape for w in weights):
        raise ValueError(f"fp6: {output!r} receives a packed weight of the same shape, format, layout and dtype only")


def _received(weight: PackedBase) -> list[Tensor]:
    """Contiguous tensors to receive into: those of the weight, or copies."""
    return [tensor.contiguous() for tensor in weight.tensors]


def _put(weight: PackedBase, i: int, received: Tensor) -> None:
    if weight.tensors[i].data_ptr() != received.data_ptr():
        weight.tensors[i].copy_(received)


def _done(result: Any) -> Any:
    """The work of a collective that has been waited for."""
    work = result[1]
    work.wait()
    return work
