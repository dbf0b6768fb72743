"""How a packed weight is read: the one description that tensors, the backend and checkpoints share."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PackingSpec(NamedTuple):
    """All there is to a packed weight [N, K] beside its tensors: N is that of its scales.

    format: of the codes ("e2m3").
    layout: of the bit planes (packing.LAYOUTS).
    group_size: inputs that share a scale; None for a whole row.
    k: inputs, padding left out.
    dtype: what the weight is presented in: dequantized to, and multiplied with.
    transposed: whether it stands for a tensor [K, N].

    A NamedTuple, because it is the metadata of a tensor subclass: Dynamo compares it in guards, AOTAutograd hashes and
    pickles it, and one graph serves all weights of an equal one. Pickles of PackedTensors hold its fields in this order:
    new ones go to the end and have defaults.

    What says more than this holds a PackingSpec: the backend's PlanesKey, a checkpoint's PackedWeight. QuantConfig does not:
    it is what a user asks for ("auto", say), before there are weights and devices.
    """

    format: str
    layout: str
    group_size: int | None
    k: int
    dtype: torch.dtype
    transposed: bool = False
