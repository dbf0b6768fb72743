"""Statistics of the inputs of linears, while the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fp6_compile.algorithms import Needs, Statistics
from fp6_compile.model import Place


@dataclass
class _Shared:
    """Linears that get the same tensor, as q, k and v do, share what is known of it."""

    stats: Statistics
    latest: Tensor | None = None
    calls: int = 0


class Collector:
    """Hooks on the linears of some places; `with Collector(...) as found:` and run the model.

    Linears whose first input is one and the same tensor share statistics from then on: those of all distinct inputs of any
    of them. So do linears that share a weight.
    """

    def __init__(self, places: list[Place], needs: Needs) -> None:
        self.needs = needs
        self._of: dict[int, _Shared] = {}
        self._linears = [(place, m) for place in places for m, name in place.owners if name == "weight"]

    def __getitem__(self, place: Place) -> Statistics | None:
        """None for a linear that was never called, or called with nothing but NaN."""
        shared = self._of.get(id(place))
        return shared.stats if shared is not None and shared.stats.count else None

    def left_out(self, place: Place) -> int:
        """Tokens that were left out, for NaN or infinite values."""
        shared = self._of.get(id(place))
        return shared.stats.left_out if shared is not None else 0

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """While open, what the linears are called with is added."""
        handles = [
            module.register_forward_pre_hook(self._hook(place), with_kwargs=True) for place, module in self._linears
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for shared in self._of.values():
                shared.latest = None

    def _hook(self, place: Place) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            shared = self._of.get(id(place)) or self._first(x)
            self._of[id(place)] = shared
            if shared.latest is not x:
                shared.stats.add(x)
                shared.latest = x
                shared.calls += 1

        return see

    def _first(self, x: Tensor) -> _Shared:
        for shared in self._of.values():
            if shared.latest is x and shared.calls == 1:
                return shared
        return _Shared(Statistics(x.shape[-1], self.needs >= Needs.HESSIAN, x.device))
