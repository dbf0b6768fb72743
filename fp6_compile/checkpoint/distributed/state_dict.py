"""A model's state_dict in ordinary tensors, for torch.distributed.checkpoint: it loads them in any sharding.

A packed weight NAME [N, K] becomes what a checkpoint folder has of it (packed_weight.py): its canonical bit planes, NAME_w4
and NAME_w2 [N, bytes] for six bits, and NAME_scale [N, G] float32. Those of a DTensor are DTensors, sharded as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fp6_compile.checkpoint.packed_weight import PackedWeight
from fp6_compile.packed.tensor import PackedTensor


def planes_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()`, each packed weight NAME as NAME_w4, NAME_w2 (or others) [N, bytes] and NAME_scale [N, G].

    Raises ValueError for a DTensor whose shards along K are not of one size, or end inside a byte of the bit planes.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        packed = getattr(value, "_local_tensor", value)
        if not isinstance(packed, PackedTensor):
            state[name] = value
            continue
        own = PackedWeight.of(packed)
        tensors = dict(zip(own.tensors(name), own.stored(packed), strict=True))
        state |= tensors if packed is value else _distributed(name, value, tensors)
    return state


def load_planes_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `planes_state_dict` of a model with the same packed weights has returned, and a checkpoint has filled.

    Raises ValueError if a packed weight of the model is not in `state`; and what `model.load_state_dict` raises.
    """
    state = dict(state)
    for name, value in model.state_dict().items():
        packed = getattr(value, "_local_tensor", value)
        if not isinstance(packed, PackedTensor):
            continue
        own = PackedWeight.of(packed)
        if missing := own.tensors(name).keys() - state.keys():
            raise ValueError(f"state: lacks {', '.join(sorted(missing))}; planes_state_dict(model) has what is loaded")
        parts = (state.pop(part) for part in own.tensors(name))
        *planes, scale = (getattr(part, "_local_tensor", part) for part in parts)
        new = own.packed(planes, scale)
        state[name] = new if packed is value else _like(value, new, value.placements, value.shape)
    model.load_state_dict(state)


def _distributed(name: str, weight: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DTensors of the bit planes and scales of a DTensor `weight`, of which this process has `tensors`."""
    from torch.distributed.tensor import Replicate

    (n, k), mesh = weight.shape, weight.device_mesh
    spec = PackedWeight.of(weight._local_tensor).spec
    made = {}
    for part, (_, shape) in PackedWeight(spec._replace(k=k), n).tensors(name).items():
        # one scale for a whole row is that of all its shards
        is_whole = part.endswith("_scale") and spec.group_size is None
        placements = [Replicate() if is_whole and p.is_shard(1) else p for p in weight.placements]
        width = tensors[part].shape[1]
        for size, placement in zip(mesh.shape, placements, strict=True):
            width *= size if placement.is_shard(1) else 1
        if width != shape[1]:
            raise ValueError(
                f"fp6: {name}: shards of {spec.k} of its {k} inputs are not equal parts of its bit planes and groups; "
                "save model.state_dict(), and load it in the same sharding"
            )
        made[part] = _like(weight, tensors[part], placements, shape)
    return made


def _like(weight: Any, local: Tensor, placements: Any, shape: Any) -> Tensor:
    """The DTensor of `shape` that has `local` in this process, on the mesh of the DTensor `weight`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, weight.device_mesh, placements, run_check=False, shape=shape, stride=(shape[1], 1))
