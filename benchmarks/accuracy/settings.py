"""The rows of the study, each a format, a group size and an algorithm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.accuracy.grids import Integer, nupes
from fp6_compile.calibration.algorithms import (
    GPTQ,
    RTN,
    Algorithm,
    BiasCorrection,
    Clip,
    LearnedRounding,
    LoRC,
    PowerOfTwo,
    Search,
    Weighted,
)
from fp6_compile.formats import Format
from fp6_compile.quantize import Grid

# E4M3 here has no NaN: its largest number is 480, not 448.
NAMES = ("e4m3", "e2m4", "e3m2", "e2m3", "e3m1", "e2m2", "e2m1")
FORMATS = {name: Format(name, int(name[1]), int(name[3])) for name in NAMES}
GRIDS: dict[str, Grid] = {**FORMATS, "int8": Integer(8), "int6": Integer(6), "int4": Integer(4)}
# What "auto" chooses from, layer by layer: among six bits, and for a target size.
SIX_BITS = ("e2m3", "e3m2")
MIXED = ("e2m1", "e2m2", "e3m1", *SIX_BITS, "e2m4")

# As many scales as quantize_(scale="mse") tries, from 0.7 to 1.3 times absmax.
_CLIP, _WEIGHTED = Clip(20, 0.7, 1.3), Weighted(20, 0.7, 1.3)
ALGORITHMS: dict[str, Algorithm] = {
    "rtn": RTN(),
    "mse": _CLIP,
    "lorc": LoRC(_CLIP, rank=8),
    "pow2": PowerOfTwo(RTN()),
    "nupes": nupes(6, _CLIP),
    "weighted": _WEIGHTED,
    "bias": BiasCorrection(_CLIP),
    "rounding": LearnedRounding(_WEIGHTED),
    "gptq-rtn": GPTQ(RTN()),  # on absmax scales, as the papers'
    "gptq": GPTQ(_WEIGHTED),
    "lorc-gptq": LoRC(GPTQ(_WEIGHTED), rank=8, weighted=True),
}


@dataclass(frozen=True)
class Setting:
    """One row. `group` None is per channel; `calibration` is the text that statistics come from.

    That is "own", more of what the subject is measured on, "other", another kind of text, or "noise". With `target_bits`,
    "auto" mixes formats to that size: by the weights' errors alone, or, with calibration, by measured sensitivities.
    """

    format: str = "fp16"
    group: int | None = None
    algorithm: str = "rtn"
    calibration: str | None = None
    target_bits: float | None = None

    @property
    def label(self) -> str:
        """For people, and the key of the row: `e2m3 g64 gptq (own)`."""
        if self.format == "fp16":
            return "fp16"
        group = "channel" if self.group is None else f"g{self.group}"
        target = f" {self.target_bits:g} bits" if self.target_bits else ""
        text = f" ({self.calibration})" if self.calibration else ""
        return f"{self.format}{target} {group} {self.algorithm}{text}"

    @property
    def method(self) -> Algorithm:
        """The algorithm of that name; "auto" tries both six-bit formats on every weight, as LLM-FP4 does."""
        base = ALGORITHMS[self.algorithm]
        if self.format != "auto" or self.target_bits:
            return base
        return Search(base, tuple(FORMATS[name] for name in SIX_BITS))

    @property
    def grid(self) -> Grid:
        """The format or grid that the algorithm is called with."""
        return GRIDS[SIX_BITS[0] if self.format in ("auto", "fp16") else self.format]


def _rows(formats: Iterable[str], groups: Iterable[int | None], *algorithms: str) -> list[Setting]:
    needs = {name: "own" if ALGORITHMS[name].needs else None for name in algorithms}
    return [Setting(f, g, name, text) for f in formats for g in groups for name, text in needs.items()]


def full() -> list[Setting]:
    """The rows of the study, the most important ones first."""
    six, groups = ["e3m2", "e2m3"], (None, 128, 64)
    every = ("rtn", "mse", "weighted", "gptq", "lorc")
    rows = [
        Setting(),
        *_rows(["e4m3", "int8"], [None], "rtn"),
        *_rows(six, [None], "rtn", "mse", "gptq"),
        *_rows(["int4"], [None, 64], "rtn", "gptq-rtn", "gptq"),
        *_rows(six, [64], "rtn", "mse", "gptq"),
        *_rows(["e2m2", "e3m1", "e2m1"], [None], "rtn"),
        *[Setting(name, None, "gptq", text) for name in ("e2m3", "int4") for text in ("other", "noise")],
        *_rows(["e2m2", "e2m1"], [None, 64], "gptq"),
        *_rows(six, groups, *every),
        *_rows(["auto"], [None, 64], "mse", "gptq"),
        *_rows(["e2m3"], [None], "lorc-gptq", "rounding", "bias", "pow2"),
        *_rows(["e2m2", "e3m1", "e2m1"], [64], "rtn"),
        *_rows(["int6"], [None], "rtn", "nupes"),
        *_rows(["auto"], groups, *every),
    ]
    rows[23:23] = mixtures()
    return list(dict.fromkeys(rows))


def mixtures() -> list[Setting]:
    """Rows with formats mixed to a size, without data and by measured sensitivity."""
    sizes, texts = (5.0, 5.5, 6.0, 6.5), (None, "own")
    calibrated = [Setting("auto", None, "gptq", "own", bits) for bits in (6.0, 5.0)]
    return calibrated + [Setting("auto", None, "mse", text, bits) for text in texts for bits in sizes]


def overfit() -> list[Setting]:
    """The rows that compare calibration on the kind of text that is measured with calibration on others."""
    texts, grids = ("own", "other", "noise"), (("e2m3", None), ("int4", None), ("int4", 64))
    gptq = [Setting(name, g, "gptq", text) for name, g in grids for text in texts]
    return [Setting(), *_rows(["e3m2", "e2m3", "int4"], [None], "rtn"), Setting("int4", 64), *gptq]


def writing() -> list[Setting]:
    """The rows for long texts that a model writes."""
    gptq = [Setting("e2m3", None, "gptq", "own"), Setting("int4", 64, "gptq", "own")]
    return [Setting(), *_rows(["e3m2", "e2m3", "int4", "e2m1"], [None], "rtn"), *gptq]


def quick() -> list[Setting]:
    """Few rows of each kind, for tests."""
    calibrated = Setting("e2m3", None, "bias", "own")
    return [Setting(), Setting("e3m2"), Setting("e2m3"), Setting("auto"), calibrated, Setting("int4")]
