"""The blocks of a model, run one at a time, with the activations between them kept.

A decoder is a chain: block i + 1 gets what block i returned, and arguments that no block changes (masks, rotary angles). The
model runs once over the inputs, with all blocks but the first replaced by stubs that record their arguments: the weights of
those need not even be in memory. From then on each block is called alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class _Stop(BaseException):
    """The last block was called: the rest of the model need not run."""


def find_blocks(model: nn.Module, name: str | None = None) -> list[nn.Module]:
    """The members of the longest nn.ModuleList (the first, if several are as long), or of the module called `name`.

    "" means no blocks: the whole model at once. Raises ValueError if there is no such module, or it has no children.
    """
    if name == "":
        return []
    if name is not None:
        found = dict(model.named_modules()).get(name)
        if found is None or not list(found.children()):
            raise ValueError(f"blocks: got {name!r}, needs the name of a module with blocks in it, or ''")
        return list(found.children())
    return max((list(m) for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=[])


def call(model: nn.Module, batch: Any) -> Any:
    """Call the model with one input: a tensor, a tuple or list of arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if hasattr(batch, "keys"):
        return model(**{key: batch[key] for key in batch.keys()})  # noqa: SIM118  (transformers' BatchEncoding)
    raise ValueError(
        f"inputs: got a {type(batch).__name__}, needs tensors, tuples of arguments or mappings of keywords"
    )


class Chain:
    """The arguments of each block, for every batch.

    `hidden[b]` is the activation of batch b that the next block gets. Without blocks, only `rest` is of use.

    Raises ValueError if there are no inputs, or the model does not call its blocks one after the other, once each.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], inputs: Iterable[Any]) -> None:
        self.model, self.blocks = model, blocks
        self.inputs = list(inputs)
        if not self.inputs:
            raise ValueError("inputs: got none, needs at least one input of the model")
        self.hidden: list[Tensor] = []
        self._calls: list[list[tuple[tuple, dict]]] = []
        self._wrap: Callable[[Tensor], Any] = lambda hidden: hidden
        if blocks:
            for batch in self.inputs:
                self._capture(batch)

    def run(self, index: int) -> Iterator[Tensor]:
        """The outputs of a block for every batch, in order."""
        for hidden, calls in zip(self.hidden, self._calls, strict=True):
            args, kwargs = _insert(calls[index], hidden)
            yield _hidden_of(self.blocks[index](*args, **kwargs))

    def observe(self, index: int) -> None:
        """Run a block only for its hooks."""
        for _ in self.run(index):
            pass

    def advance(self, index: int) -> None:
        """Run a block, and keep its output as the input of the next."""
        for batch, out in enumerate(self.run(index)):
            self.hidden[batch] = out

    def rest(self) -> None:
        """Run the model around the blocks, which pass on what the last block returned."""
        for batch, inputs in enumerate(self.inputs):
            if not self.blocks:
                call(self.model, inputs)
                continue
            last = len(self.blocks) - 1

            def stub(index: int, *args: Any, batch: int = batch, last: int = last, **kwargs: Any) -> Any:
                return self._wrap(self.hidden[batch] if index == last else _hidden_in(args, kwargs))

            with _stubs(self.blocks, stub):
                call(self.model, inputs)

    def _capture(self, batch: Any) -> None:
        calls: list[tuple[tuple, dict]] = []
        first = self.blocks[0].forward
        returned: Tensor | None = None

        def stub(index: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal returned
            hidden = _hidden_in(args, kwargs)
            if index != len(calls) or (returned is not None and hidden is not returned):
                raise ValueError(
                    f"blocks: block {index} is not called with what block {len(calls) - 1} returned; "
                    "name other blocks, or '' to take the whole model at once"
                )
            calls.append(_without_hidden(args, kwargs))
            if index == 0:
                self.hidden.append(hidden)
                out = first(*args, **kwargs)
                returned = _hidden_of(out)
                self._wrap = _wrapper(out)
            if index == len(self.blocks) - 1:
                raise _Stop
            return self._wrap(returned)  # type: ignore[arg-type]

        with _stubs(self.blocks, stub), contextlib.suppress(_Stop):
            call(self.model, batch)
        if len(calls) != len(self.blocks):
            raise ValueError(
                f"blocks: the model calls {len(calls)} of its {len(self.blocks)} blocks; name others, or ''"
            )
        self._calls.append(calls)


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients and without transformers' key-value cache, until the context ends."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    model.eval()
    if caches:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if caches:
            config.use_cache = caches  # type: ignore[union-attr]


@contextlib.contextmanager
def _stubs(blocks: list[nn.Module], stub: Callable[..., Any]) -> Iterator[None]:
    """Replace each block's forward by `stub(index, *args, **kwargs)`, until the context ends."""

    def bind(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: stub(index, *args, **kwargs)

    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = bind(index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _hidden_key(args: tuple, kwargs: dict) -> int | str:
    """Which argument the activation is: 0, the first one, or "hidden_states"."""
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    raise ValueError("blocks: a block is called without a tensor first; name other blocks, or ''")


def _hidden_in(args: tuple, kwargs: dict) -> Tensor:
    key = _hidden_key(args, kwargs)
    return args[0] if key == 0 else kwargs[key]


def _without_hidden(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if _hidden_key(args, kwargs) == 0:
        return (None, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": None}


def _insert(called: tuple[tuple, dict], hidden: Tensor) -> tuple[tuple, dict]:
    args, kwargs = called
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


def _hidden_of(out: Any) -> Tensor:
    """The activation in a block's output: the output itself, or its first item."""
    hidden = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"blocks: a block returns a {type(out).__name__}, needs a tensor or a tuple that begins with one"
        )
    return hidden


def _wrapper(out: Any) -> Callable[[Tensor], Any]:
    """A function that turns an activation into a block's output of the form of `out`."""
    if isinstance(out, Tensor):
        return lambda hidden: hidden
    others = tuple(out[1:])
    return lambda hidden: (hidden, *others)
