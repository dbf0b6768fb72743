"""`calibrate_`: `quantize_` with an algorithm, block by block.

For each block: run it on the activations that the blocks before it, already quantized, return for the calibration inputs;
collect statistics; quantize its linears; run it again for the next block. Linears outside of the blocks come last. The peak
of memory is the packed model, one block with its statistics, and the activations between two blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fp6_compile.calibration.algorithms import RTN, Algorithm, Needs, Search
from fp6_compile.calibration.chain import Chain, find_blocks, quiet
from fp6_compile.calibration.collect import Collector
from fp6_compile.calibration.equalize import equalize_
from fp6_compile.calibration.layer import quantize_linear, restore
from fp6_compile.calibration.state import Done, State, digest, text_digest
from fp6_compile.config import QuantConfig, names_in, warn_of_unmatched
from fp6_compile.formats import AUTO, DEFAULT, FORMATS, get_format
from fp6_compile.packed.quantize_model import Values, is_weight, keep, skip_reason, target_device
from fp6_compile.packed.slots import Slot, slots
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.quantize import Grid
from fp6_compile.report import LinearReport, Report, log_report, progress


def calibrate_(
    model: nn.Module,
    inputs: Iterable[Any] = (),
    config: QuantConfig | None = None,
    *,
    algorithm: Algorithm | None = None,
    format: str | Grid | None = None,
    device: torch.device | str | None = None,
    source: str | os.PathLike[str] | None = None,
    blocks: str | None = None,
    equalize: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    **fields: Any,
) -> Report:
    """Replace the weight of every nn.Linear of `model` by a PackedTensor whose codes `algorithm` chooses by the inputs.

    Args:
        model: any module; in FP16 or BF16, best.
        inputs: of the model: tensors, tuples of arguments or mappings of keywords, on the model's device. They are held
            until the end. Not needed by algorithms without statistics (RTN, Clip).
        algorithm: one of fp6_compile.calibration.algorithms; None is RTN, and the same as quantize_.
        config: which linears are quantized, and how, or its fields as keyword arguments. The algorithm chooses the scales:
            scale_method stays "absmax".
        format: as in `config`, or another grid of numbers. Of one that is none of the package's formats, the dequantized
            weights are put into the model, for evaluation.
        device, source: as for `quantize_`: with `source` and empty parameters, blocks are read when their turn comes.
        blocks: the name of the module whose children are the blocks; None takes the longest nn.ModuleList, "" none: the
            whole model at once.
        equalize: SmoothQuant's migration strength (0.5 there): before a block is quantized, its norms are equalized with the
            linears behind them, where that leaves the block's output as it is.
        resume: a folder for finished blocks: a calibration that was killed goes on after the last of them, and ends with
            the same bits. Blocks that are damaged, or were made from other weights, are computed anew, with a warning. Not
            used without inputs.

    Returns:
        Which linears were quantized, which were skipped and why; notes on linears that were never called (they are
        quantized as without data) and on tokens that were left out for NaN. It is logged, too.

    Raises:
        ValueError: a bad option, no such device; no inputs where the algorithm needs some; a model that is no chain of
            blocks; `resume` is a folder of another calibration. The model is then as it was, but for tensors that were read
            from `source`.
    """
    algorithm = algorithm or RTN()
    if equalize is not None and not 0 <= equalize <= 1:
        raise ValueError(f"equalize: got {equalize!r}, needs a number from 0 to 1, or None")
    if format is not None:
        fields["format"] = format if isinstance(format, str) else DEFAULT
    config = QuantConfig.of(config, fields)
    if config.scale_method != "absmax":
        raise ValueError(f"scale_method: got {config.scale_method!r}, needs 'absmax': the algorithm chooses the scales")
    grid: Grid = get_format(AUTO[0] if config.format == "auto" else config.format)
    if config.format == "auto":
        algorithm = Search(algorithm, tuple(FORMATS[name] for name in AUTO))
    if format is not None and not isinstance(format, str):
        grid = format
    run = _Run(getattr(model, "_orig_mod", model), algorithm, grid, config, device, source, equalize)
    warn_of_unmatched(config.skip, names_in(run.model), type(run.model).__name__)
    found = find_blocks(run.model, blocks)
    with quiet(run.model):
        if algorithm.needs == Needs.NOTHING and equalize is None:
            run.without_data(found)
        else:
            run.with_data(found, inputs, resume)
    lines = tuple(run.lines[slot.names[0]] for slot in run.slots if slot.names[0] in run.lines)
    report = Report(lines, grid.name if {line.format for line in lines} <= {grid.name, None} else "auto")
    log_report(report)
    return report


class _Run:
    """One calibration: its options, which are the same for all blocks, and the report so far."""

    def __init__(
        self,
        model: nn.Module,
        algorithm: Algorithm,
        grid: Grid,
        config: QuantConfig,
        device: torch.device | str | None,
        source: str | os.PathLike[str] | None,
        equalize: float | None,
    ) -> None:
        self.model, self.algorithm, self.grid, self.config = model, algorithm, grid, config
        target = target_device(device, source)
        self.slots = slots(model)
        self.values = Values(self.slots, source, target)
        self.reasons = {id(s): skip_reason(s, config, target) for s in self.slots if is_weight(s, config)}
        self.equalize = equalize
        self.lines: dict[str, LinearReport] = {}

    def without_data(self, blocks: list[nn.Module]) -> None:
        """Quantize all linears."""
        parts, rest = self._split(blocks)
        for part in progress([*parts, rest], "fp6: packing"):
            self._quantize(part, None)

    def with_data(self, blocks: list[nn.Module], inputs: Iterable[Any], resume: str | os.PathLike[str] | None) -> None:
        """Quantize the blocks one by one, and then the other linears."""
        parts, rest = self._split(blocks)
        for slot in rest + (parts[0] if parts else []):
            self._fetch(slot)
        chain = Chain(self.model, blocks, inputs)
        state = State(resume, self._about(chain) if resume is not None else {})
        state.enter((slot.names, self.values.of(slot)) for slot in rest)
        for index, part in enumerate(progress(parts, "fp6: calibrating")):
            state.enter((slot.names, self.values.of(slot)) for slot in part)
            done = state.load(index)
            for slot in part:
                if done is None or slot.names[0] not in done.tensors:
                    self._fetch(slot)
            if done is None:
                collector = self._collector(part)
                with collector.hooks(blocks[index].modules() if self.equalize is not None else ()):
                    chain.observe(index)
                equalized = {} if self.equalize is None else equalize_(chain, index, part, collector, self.equalize)
                done = self._quantize(part, collector)
                state.save(index, Done(equalized | done.tensors, done.lines))
            else:
                restore(self.model, part, done.tensors)
                self.lines |= done.lines
            chain.advance(index)
        collector = self._collector(rest)
        with collector.hooks():
            chain.rest()
        self._quantize(rest, collector)

    def _about(self, chain: Chain) -> dict[str, str]:
        """What must be the same for a calibration to be resumed."""
        shapes = (f"{name} {list(p.shape)} {p.dtype}" for name, p in self.model.named_parameters())
        skipped = [slot.names[0] for slot in self.slots if self.reasons.get(id(slot)) is not None]
        return {
            "algorithm": repr(self.algorithm),
            "options": repr((self.grid, self.config, skipped, self.equalize)),
            "model": text_digest(shapes),
            "inputs": digest((chain.inputs, chain.hidden)),
        }

    def _split(self, blocks: list[nn.Module]) -> tuple[list[list[Slot]], list[Slot]]:
        """The slots of each block, and all others. A slot that several blocks share belongs to the first of them."""
        of = {id(module): index for index, block in reversed([*enumerate(blocks)]) for module in block.modules()}
        parts: list[list[Slot]] = [[] for _ in blocks]
        rest: list[Slot] = []
        for slot in self.slots:
            inside = [of[id(module)] for module, _ in slot.owners if id(module) in of]
            whole = len(inside) == len(slot.owners)
            (parts[min(inside)] if whole else rest).append(slot)
        return parts, rest

    def _fetch(self, slot: Slot) -> None:
        """Read the slot's value from `source`, or move it to `device`."""
        keep(slot, self.values.of(slot))

    def _is_quantized(self, slot: Slot) -> bool:
        """Whether the algorithm will be called for it."""
        return self.reasons.get(id(slot), "") is None and not isinstance(slot.tensor, PackedTensor)

    def _collector(self, part: list[Slot]) -> Collector:
        return Collector([slot for slot in part if self._is_quantized(slot)], self.algorithm.needs)

    def _quantize(self, part: list[Slot], collector: Collector | None) -> Done:
        done = Done({}, {})
        for slot in part:
            if collector is None:
                self._fetch(slot)
            if id(slot) in self.reasons:
                how = self.algorithm, self.grid, self.config.group_size, collector
                done.lines[slot.names[0]], new = quantize_linear(slot, self.reasons[id(slot)], *how)
                done.tensors.update(new)
        self.lines |= done.lines
        _trim()
        return done


def _trim() -> None:
    """Give freed memory back to the system where the C library keeps it (glibc: some 40 MB more with every block)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
