"""Fake CUDA tensors that remember their values on the CPU.

A FakeTensor says "cuda" and has no data, which is enough to generate code. To *run* the generated module we need the
data of its inputs, and some of them are made on the way: a backend that packs weights at compile time feeds tensors
that no test ever held. So `ValuedFakeMode` computes each operation a second time on the CPU, beside the fake one.
Values stop at the compiler: Dynamo and AOTAutograd trace with fake modes of their own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map

T = TypeVar("T", torch.Tensor, torch.nn.Module)


class ValuedFakeMode(FakeTensorMode):
    """A FakeTensorMode whose tensors carry `cpu_value`, as long as every input of the operation had one."""

    compute_values = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on the fake tensors and, where their values are known, on the values."""
        if not self.compute_values:
            return super().__torch_dispatch__(func, types, args, kwargs)
        try:
            values = func(*tree_map(_to_value, args), **tree_map(_to_value, kwargs or {}))
        except Exception as error:  # no CPU kernel, or a value unknown: the fake result alone, and the reason
            values = error
        if isinstance(values, (bool, int, float)):  # .item(), which a FakeTensor alone cannot answer
            return values
        with self.without_values():  # what a decomposition does inside needs none
            outputs = super().__torch_dispatch__(func, types, args, kwargs)
        _attach(outputs, values)
        return outputs

    @contextlib.contextmanager
    def without_values(self) -> Iterator[None]:
        """Fake results only, for work whose numbers nobody will read."""
        before, self.compute_values = self.compute_values, False
        try:
            yield
        finally:
            self.compute_values = before


def _to_value(argument: Any) -> Any:
    if isinstance(argument, FakeTensor):
        return value_of(argument)
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    return argument


def _attach(outputs: Any, values: Any) -> None:
    """Give each fake output its value, or the exception that says why it has none."""
    single = isinstance(outputs, torch.Tensor)
    outputs = [outputs] if single else outputs if isinstance(outputs, (list, tuple)) else []
    known = values if isinstance(values, (list, tuple)) and not single else [values] * len(outputs)
    for output, value in zip(outputs, known, strict=True):
        if isinstance(output, FakeTensor):
            output.cpu_value = value


def value_of(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU tensor behind a fake CUDA tensor; a real tensor is its own value."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    value = getattr(tensor, "cpu_value", None)
    if isinstance(value, torch.Tensor):
        return value
    raise LookupError(f"the values of {tensor} are unknown") from value


def place(value: T, mode: FakeTensorMode) -> T:
    """`value` on the fake device: a tensor becomes a fake CUDA tensor, a module a copy with fake parameters.

    `module.to("cuda")` does not do here: it swaps tensors in place, which a fake mode's memo forbids. Parameters shared
    between modules stay shared. Marks of `torch._dynamo.mark_dynamic` are kept.
    """
    if isinstance(value, torch.nn.Module):
        with unset_fake_temporarily():  # or `detach` and `deepcopy` below would already give fake CPU tensors
            return _place_module(value, mode)
    if isinstance(value, FakeTensor):
        if value.is_cuda:
            return value
        value = value_of(value)
    with mode:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    fake.cpu_value = value
    vars(fake).update({name: mark for name, mark in vars(value).items() if name.startswith("_dynamo_")})
    return fake


def _place_module(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    placed: dict[int, torch.Tensor] = {}
    module = copy.deepcopy(module)
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                fake = placed.get(id(parameter))
                if fake is None:
                    fake = torch.nn.Parameter(place(parameter.detach(), mode), requires_grad=parameter.requires_grad)
                child._parameters[name] = placed[id(parameter)] = fake
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = placed.setdefault(id(buffer), place(buffer, mode))
    return module
