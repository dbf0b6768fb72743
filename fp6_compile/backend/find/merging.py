"""Which weights are packed side by side: those of linears that multiply the same input, such as q, k and v, or gate and up.

One matmul then reads them all: one launch instead of three, and a grid large enough for a GPU that each alone would not
fill. The graph keeps a row slice of the common weight in the place of each (graph.py), and the pass makes one matmul of
the several (passes.py).

Only linears of one module are merged. Others may read the same input far apart: the keys and values of all layers of a
decoder are made from one encoder's output, and merged they would all be kept in memory from the first layer on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from torch import Tensor

from fp6_compile.backend.find.linears import Weight, input_of
from fp6_compile.layouts.packing import CPU, gpu_layout, rows_per_index
from fp6_compile.layouts.spec import PackingSpec
from fp6_compile.packed.tensor import PackedTensor


@dataclass(frozen=True)
class Candidate:
    """A weight that can be quantized: its position among the graph's inputs, its readers, its value and its names.

    One that is packed already (a PackedTensor) can be merged with others of its kind.
    """

    position: int
    weight: Weight
    value: Tensor
    names: list[str]

    @property
    def orientations(self) -> list[bool]:
        """Which ways round it is read: False as [N, K], True as [K, N]."""
        return [transposed for transposed, users in self.weight.users.items() if users]

    @property
    def rows(self) -> int:
        """N, for a weight that is read one way round."""
        return self.value.shape[1 if self.orientations == [True] else 0]

    @property
    def packed(self) -> PackingSpec | None:
        """How it is packed, if it is already."""
        return self.value.spec if isinstance(self.value, PackedTensor) else None

    @property
    def granularity(self) -> int:
        """Rows that one index of its bit planes holds, of six bits: at no other width it holds more."""
        if self.packed:
            return rows_per_index(self.packed.layout)
        return rows_per_index(CPU if self.value.device.type == "cpu" else gpu_layout(self.value.dtype))


def groups(candidates: Iterable[Candidate]) -> list[list[Candidate]]:
    """The candidates, in lists of those that are packed side by side; most lists have one."""
    by_input: dict[Hashable, list[Candidate]] = {}
    for candidate in candidates:
        by_input.setdefault(_key(candidate), []).append(candidate)
    return [group for together in by_input.values() for group in _aligned(together)]


def _key(candidate: Candidate) -> Hashable:
    """Equal for weights that can be multiplied as one."""
    (transposed, *both), matmuls = candidate.orientations, candidate.weight.matmuls
    x = input_of(candidate.weight) if len(matmuls) == 1 and not both else None
    if x is None:
        return candidate.position
    # PEFT puts a linear into a module of its own, beside its adapter.
    value, module = candidate.value, candidate.names[0].removesuffix(".base_layer").rpartition(".")[0]
    # By the same function, so that it becomes the same views of x in every linear.
    k, how = value.shape[0 if transposed else 1], (value.dtype, value.device, candidate.packed)
    return x, matmuls[0].target, module, transposed, k, *how


def _aligned(together: list[Candidate]) -> list[list[Candidate]]:
    """One group in which every weight starts at an index of its own; weights that would prevent it stay alone."""
    granularity = together[0].granularity
    whole = [candidate for candidate in together if candidate.rows % granularity == 0]
    odd = [candidate for candidate in together if candidate.rows % granularity != 0]
    return [group for group in ([*whole, *odd[:1]], *([candidate] for candidate in odd[1:])) if group]
