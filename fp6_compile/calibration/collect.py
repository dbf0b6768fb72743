"""Statistics of the inputs of linears, while the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fp6_compile.calibration.algorithms import Needs, Statistics
from fp6_compile.packed.slots import Slot


@dataclass
class Shared:
    """Statistics of a tensor that several linears get, as q, k and v do. `norm`: the norm that computed it, if one did."""

    stats: Statistics
    latest: Tensor | None = None
    calls: int = 0
    norm: nn.Module | None = None
    linears: list[nn.Module] = field(default_factory=list)


class Collector:
    """Statistics of the inputs of the linears in `slots`: run the model in `with collector.hooks():`.

    Linears that get the same tensor at their first call share statistics from then on: a tensor that several of them get is
    counted once. So do linears that share a weight.
    """

    def __init__(self, slots: list[Slot], needs: Needs) -> None:
        self.needs = needs
        self._norms: dict[nn.Module, Tensor] = {}
        self._of: dict[int, Shared] = {}
        self._linears = [(slot, m) for slot in slots for m, name in slot.owners if name == "weight"]

    def __getitem__(self, slot: Slot) -> Statistics | None:
        """None for a linear that was never called, or only with tokens that have NaN or infinite values."""
        shared = self._of.get(id(slot))
        return shared.stats if shared is not None and shared.stats.count else None

    def left_out(self, slot: Slot) -> int:
        """How many tokens were left out because they have NaN or infinite values."""
        shared = self._of.get(id(slot))
        return shared.stats.left_out if shared is not None else 0

    def behind_norms(self) -> list[tuple[nn.Module, list[nn.Module], Shared]]:
        """(norm, linears that get its output, their statistics), in the order of the first call."""
        found = {id(shared): shared for shared in self._of.values()}
        return [(shared.norm, shared.linears, shared) for shared in found.values() if shared.norm is not None]

    @contextlib.contextmanager
    def hooks(self, modules: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Until the context ends, add the linears' inputs to the statistics, and note which of `modules` are their norms."""
        handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._hook(slot), with_kwargs=True) for slot, module in self._linears
        ]
        handles += [module.register_forward_hook(self._note_norm) for module in modules if _is_norm(module)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._norms.clear()
            for shared in self._of.values():
                shared.latest = None

    def _hook(self, slot: Slot) -> Any:
        def observe(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            shared = self._of.get(id(slot)) or self._first(x)
            self._of[id(slot)] = shared
            if module not in shared.linears:
                shared.linears.append(module)
            if shared.latest is not x:
                shared.stats.add(x)
                shared.latest = x
                shared.calls += 1

        return observe

    def _first(self, x: Tensor) -> Shared:
        for shared in self._of.values():
            if shared.latest is x and shared.calls == 1:
                return shared
        norm = next((norm for norm, out in self._norms.items() if out is x), None)
        return Shared(Statistics(x.shape[-1], self.needs >= Needs.HESSIAN, x.device), norm=norm)

    def _note_norm(self, module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            self._norms[module] = out


def _is_norm(module: nn.Module) -> bool:
    """Whether its only parameters are a weight [K] and perhaps a bias [K]."""
    parameters = dict(module.named_parameters())
    weight, bias = parameters.get("weight"), parameters.get("bias")
    known = parameters.keys() <= {"weight", "bias"} and weight is not None and weight.dim() == 1
    return known and (bias is None or bias.shape == weight.shape)  # type: ignore[union-attr]
