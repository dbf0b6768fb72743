"""`calibrate_`: `quantize_` with an algorithm, block by block.

For each block: run it on the calibration inputs as the blocks before, quantized, leave them; gather statistics; quantize its
linears; run it again for the next. Linears outside of the blocks come last. The peak is the packed model, one block and its
statistics, and the activations of the calibration set between two blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile.algorithms import RTN, Algorithm, Needs, Quantized
from fp6_compile.calibration.chain import Chain, find_blocks, quiet
from fp6_compile.calibration.collect import Collector
from fp6_compile.config import Options
from fp6_compile.formats import FORMATS, get_format
from fp6_compile.lowrank import FACTORS, grow
from fp6_compile.model import Place, Values, is_weight, keep, places, refusal
from fp6_compile.packing import PLANES, pack
from fp6_compile.quantize import Grid
from fp6_compile.report import LinearReport, Report, log_report, progress
from fp6_compile.storage import folder_entries
from fp6_compile.tensor import PackedTensor


def calibrate_(
    model: nn.Module,
    inputs: Iterable[Any] = (),
    *,
    algorithm: Algorithm | None = None,
    format: str | Grid = "e3m2",
    group_size: int | None = None,
    skip: Iterable[str] = (),
    min_features: int = 128,
    float32: bool = False,
    device: torch.device | str | None = None,
    source: str | os.PathLike[str] | None = None,
    blocks: str | None = None,
) -> Report:
    """Replace the weight of every nn.Linear of `model` by a PackedTensor that `algorithm` made, from what the model does.

    Args:
        model: any module; in FP16 or BF16, best.
        inputs: of the model: tensors, tuples of arguments or mappings of keywords, on the model's device. They are held
            until the end. Not needed by algorithms without statistics (RTN, Clip).
        algorithm: of fp6_compile.algorithms; None is RTN, and the same as quantize_.
        format: a name, or a grid. Of a grid that is no format of the backend, the dequantized weights are put into the
            model, for evaluation.
        group_size, skip, min_features, float32: as in config.Options.
        device, source: as for `quantize_`: with `source` and empty parameters, blocks are read when their turn comes.
        blocks: the name of the module whose children are the blocks; None takes the longest nn.ModuleList, "" none: the
            whole model at once.

    Returns:
        What was quantized, what was left alone and why; notes on linears that were never called (they are quantized as
        without data) and on tokens that were left out for NaN. It is logged, too.

    Raises:
        ValueError: a bad option; no inputs where the algorithm needs some; a model that is no chain of blocks. The model is
            then as it was, but for tensors that were read from `source`.
    """
    algorithm = algorithm or RTN()
    grid = get_format(format) if isinstance(format, str) else format
    given = {"group_size": group_size, "skip": list(skip), "min_features": min_features, "float32": float32}
    options = Options.parse(None, given)
    run = _Run(getattr(model, "_orig_mod", model), algorithm, grid, options, device, source)
    with quiet(run.model):
        run.all(find_blocks(run.model, blocks), inputs)
    report = Report(tuple(run.lines[id(place)] for place in run.places if id(place) in run.lines), grid.name)
    log_report(report)
    return report


class _Run:
    """One calibration: what is the same for all blocks, and the report so far."""

    def __init__(
        self,
        model: nn.Module,
        algorithm: Algorithm,
        grid: Grid,
        options: Options,
        device: torch.device | str | None,
        source: str | os.PathLike[str] | None,
    ) -> None:
        self.model, self.algorithm, self.grid, self.options = model, algorithm, grid, options
        self.target = (
            torch.device(device) if device is not None else torch.device("cpu") if source is not None else None
        )
        self.places = places(model)
        self.values = Values(self.places, {} if source is None else folder_entries(source), self.target)
        self.refusals = {id(p): refusal(p, options, self.target) for p in self.places if is_weight(p, options)}
        self.lines: dict[int, LinearReport] = {}

    def all(self, blocks: list[nn.Module], inputs: Iterable[Any]) -> None:
        """Quantize the blocks, one by one, and then the rest."""
        parts, rest = self._split(blocks)
        if self.algorithm.needs == Needs.NOTHING:
            for part in progress([*parts, rest], "fp6: packing"):
                self._quantize(part, None)
            return
        for place in rest + (parts[0] if parts else []):
            self._fetch(place)
        chain = Chain(self.model, blocks, inputs)
        for index, part in enumerate(progress(parts, "fp6: calibrating")):
            for place in part:
                self._fetch(place)
            collector = self._collector(part)
            with collector.hooks():
                for _ in chain.run(index):
                    pass
            self._quantize(part, collector)
            chain.advance(index)
        collector = self._collector(rest)
        with collector.hooks():
            chain.rest()
        self._quantize(rest, collector)

    def _split(self, blocks: list[nn.Module]) -> tuple[list[list[Place]], list[Place]]:
        """The places of each block, and the rest; one that several share belongs to the first."""
        of = {id(module): index for index, block in reversed([*enumerate(blocks)]) for module in block.modules()}
        parts: list[list[Place]] = [[] for _ in blocks]
        rest: list[Place] = []
        for place in self.places:
            inside = [of[id(module)] for module, _ in place.owners if id(module) in of]
            whole = len(inside) == len(place.owners)
            (parts[min(inside)] if whole else rest).append(place)
        return parts, rest

    def _fetch(self, place: Place) -> None:
        """Bring the place's value to where it is to be."""
        keep(place, self.values.of(place))

    def _taken(self, place: Place) -> bool:
        return self.refusals.get(id(place), ("",)) is None and not isinstance(place.tensor, PackedTensor)

    def _collector(self, part: list[Place]) -> Collector:
        return Collector([place for place in part if self._taken(place)], self.algorithm.needs)

    def _quantize(self, part: list[Place], collector: Collector | None) -> None:
        for place in part:
            if collector is None:
                self._fetch(place)
            if id(place) in self.refusals:
                self.lines[id(place)] = self._line(place, collector)

    def _add(self, place: Place, found: Quantized) -> None:
        """Give every linear that has the weight its factors and its bias."""
        for module, _ in place.owners:
            for attribute, factor in zip(FACTORS, found.low_rank or (), strict=False):
                grow(module, attribute, factor)
            if found.shift is not None:
                bias = getattr(module, "bias", None)
                shifted = found.shift if bias is None else bias.float() + found.shift
                grow(module, "bias", shifted.to(place.tensor.dtype))

    def _line(self, place: Place, collector: Collector | None) -> LinearReport:
        """Quantize a weight if it is to be; its line of the report."""
        tensor = place.tensor
        about = place.title, tuple(tensor.shape), tensor.dtype, tensor.nbytes
        if isinstance(tensor, PackedTensor):
            return LinearReport(*about, tensor.packed_bytes, note="packed already")
        if reason := self.refusals[id(place)]:
            return LinearReport(*about, tensor.nbytes, reason[0])
        try:
            stats = None if collector is None else collector[place]
            found = self.algorithm(tensor.detach(), self.grid, self.options.group_size, stats)
        except ValueError as error:
            return LinearReport(*about, tensor.nbytes, str(error))
        place.put(_weight(found, tensor.dtype))
        self._add(place, found)
        return LinearReport(*about, found.bytes, note=_note(place, collector))


def _weight(found: Quantized, dtype: torch.dtype) -> Tensor:
    """What goes into the layer: packed, or dequantized if the backend does not know the grid."""
    name = found.grid.name
    if FORMATS.get(name) != found.grid or found.offset is not None:
        return found.dequantize(dtype)
    planes = pack(found.codes, FORMATS[name], PLANES)
    return PackedTensor.from_planes(planes, found.scale, name, found.group_size, found.codes.shape[1], dtype)


def _note(place: Place, collector: Collector | None) -> str | None:
    if collector is None:
        return None
    lost = collector.left_out(place)
    if collector[place] is None:
        why = "all its inputs are NaN or infinite" if lost else "never called"
        return f"{why}: quantized without data"
    return f"{lost} tokens with NaN or infinite values left out" if lost else None
