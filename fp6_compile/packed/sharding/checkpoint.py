"""A model's state_dict in ordinary tensors, for torch.distributed.checkpoint: it loads them in any sharding.

A packed weight NAME [N, K] becomes its canonical bit planes (layouts/packing.py), NAME_w4 and NAME_w2 [N, bytes] for six
bits, and NAME_scale [N, G] float32, the names and shapes of a checkpoint folder. Those of a DTensor are DTensors, sharded
as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import PLANES, canonical_shapes, plane_names
from fp6_compile.packed.held import PackedBase


def planes_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()`, each packed weight NAME as NAME_w4, NAME_w2 (or others) [N, bytes] and NAME_scale [N, G].

    Raises ValueError for a DTensor whose shards along K are not of one size, or end inside a byte of the bit planes.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        packed = getattr(value, "_local_tensor", value)
        if not isinstance(packed, PackedBase):
            state[name] = value
            continue
        *planes, scale = packed.repack(PLANES).tensors
        for part, tensor in zip(_parts(packed), (*planes, scale.t().contiguous()), strict=True):
            state[f"{name}_{part}"] = tensor if packed is value else _distributed(name, value, part, tensor)
    return state


def load_planes_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `planes_state_dict` of a model with the same packed weights has returned, and a checkpoint has filled.

    Raises ValueError if a packed weight of the model is not in `state`; and what `model.load_state_dict` raises.
    """
    state = dict(state)
    for name, value in model.state_dict().items():
        packed = getattr(value, "_local_tensor", value)
        if isinstance(packed, PackedBase):
            names = [f"{name}_{part}" for part in _parts(packed)]
            if missing := [part for part in names if part not in state]:
                raise ValueError(
                    f"state: lacks {', '.join(missing)}; planes_state_dict(model) has what is to be loaded"
                )
            *planes, scale = (getattr(state[part], "_local_tensor", state[part]) for part in names)
            state = {key: tensor for key, tensor in state.items() if key not in names}
            new = type(packed)(planes, scale.t().contiguous(), packed.spec._replace(layout=PLANES))
            state[name] = new if packed is value else _like(value, new, value.placements, value.shape)
    model.load_state_dict(state)


def _parts(packed: PackedBase) -> list[str]:
    return [*plane_names(get_format(packed.spec.format)), "scale"]


def _distributed(name: str, weight: Any, part: str, local: Tensor) -> Tensor:
    """The bit plane or scale of a DTensor `weight`, of which this process has `local`."""
    spec, (n, k) = weight._local_tensor.spec, weight.shape
    width = 1 if spec.group_size is None else -(-k // spec.group_size)
    if part != "scale":
        fmt = get_format(spec.format)
        width = dict(zip(plane_names(fmt), canonical_shapes(fmt, n, k), strict=True))[part][1]
    # one scale for a whole row is that of all its shards
    is_whole = part == "scale" and spec.group_size is None
    placements = [_replicate() if is_whole and p.is_shard(1) else p for p in weight.placements]
    shards = [mesh for mesh, p in zip(weight.device_mesh.shape, placements, strict=True) if p.is_shard(1)]
    if shards and local.shape[1] * torch.Size(shards).numel() != width:
        raise ValueError(
            f"fp6: {name}: shards of {spec.k} of {k} inputs are not equal parts of its bit planes and groups; save "
            "model.state_dict(), and load it in the same sharding"
        )
    return _like(weight, local, placements, torch.Size([n, width]))


def _like(weight: Any, local: Tensor, placements: Sequence[Any], shape: torch.Size) -> Tensor:
    from torch.distributed.tensor import DTensor

    how: dict[str, Any] = {"run_check": False, "shape": shape, "stride": (shape[1], 1)}
    return DTensor.from_local(local, weight.device_mesh, placements, **how)


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()
