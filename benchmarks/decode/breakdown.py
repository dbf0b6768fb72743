"""Where the time of a token goes: the matmuls of each linear, attention, and the rest.

An operator or kernel belongs to a linear if one of its inputs has the shape of that linear's weight, or of a tensor inside
that weight; to attention if its name contains the word, or an input has the shape of the cache. The profiler records shapes.
On a CPU it does not record the loops that Inductor generates: they are in the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.decode.model.weights import inner_tensors

Roles = dict[tuple[int, ...], str]
ATTENTION, REST, GAPS = "attention", "rest", "between kernels"


def roles(model: nn.Module, cache: Iterable[Tensor]) -> Roles:
    """The role of a tensor by its shape: the name of a linear, such as `qkv`, or `q_proj+o_proj` of two with one shape."""
    names: dict[tuple[int, ...], list[str]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            name = path.removesuffix(".base_layer").rpartition(".")[2]
            for tensor in (weight, *inner_tensors(weight)):
                names.setdefault(tuple(tensor.shape), []).append(name)
    # A scale [1, N] has the same shape for all linears of N outputs.
    found = {shape: "+".join(dict.fromkeys(of)) for shape, of in names.items() if 1 not in shape}
    return {**{tuple(tensor.shape): ATTENTION for tensor in cache}, **found}


def split(events: Iterable[Any], known: Roles, *, cuda: bool) -> dict[str, float]:
    """Milliseconds by role, of the profiler's `events`."""
    sums: dict[str, float] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        us = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        if us:
            role = _role(event, known)
            sums[role] = sums.get(role, 0.0) + us / 1e3
    return sums


def _role(event: Any, known: Roles) -> str:
    """Of the event, or of the operator that it is a part of."""
    shapes = [tuple(shape) for shape in event.input_shapes or () if shape and isinstance(shape[0], int)]
    if "attention" in event.name:
        return ATTENTION
    if event.name in ("aten::mm", "aten::addmm"):
        shapes = [shape[::-1] for shape in shapes]  # the weight is [K, N]
    elif event.name == "fp6::mm" and len(shapes) > 1:
        shapes.append(
            (shapes[-1][-1], shapes[0][-1])
        )  # scale [G, N] and x [*, K]: the planes may be a list without shapes
    found = [known[shape] for shape in shapes if shape in known]
    linears = [role for role in found if role != ATTENTION]
    if found:
        return (linears or found)[0]
    return _role(event.cpu_parent, known) if event.cpu_parent is not None else REST


def measure(step: Callable[[], Any], known: Roles, device: str, steps: int = 1, calls: int = 8) -> dict[str, float]:
    """Milliseconds of a token by role, `step` being a call for `steps` tokens; what is in no event is the rest."""
    cuda = device == "cuda"
    with profile(activities=_activities(cuda), record_shapes=True) as profiler:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        seconds = time.perf_counter() - start
        if cuda:
            torch.cuda.synchronize()
    events = profiler.events()
    parts = {role: ms / calls / steps for role, ms in split(events or (), known, cuda=cuda).items()}
    if not cuda:
        total = seconds / calls / steps * 1e3
        parts[REST] = max(0.0, total - sum(ms for role, ms in parts.items() if role != REST))
    return {role: round(ms, 4) for role, ms in parts.items()}


def kernels(step: Callable[[], Any], steps: int = 1) -> float:
    """Kernels that a CUDA device runs for a token, those that a graph replays included; copies and fills are none."""
    with profile(activities=_activities(True)) as profiler:
        step()
        torch.cuda.synchronize()
    return count_kernels(profiler.events() or ()) / steps


def count_kernels(events: Iterable[Any]) -> int:
    """How many of the profiler's `events` are kernels of a device."""
    return sum(
        event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in events
    )


def _activities(cuda: bool) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
