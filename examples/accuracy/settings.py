"""The rows of the study: a format, a group size and an algorithm, as data.

What a row's weights are stored in is a *grid*: a `Format` of floating-point codes, or an `Integer` of even ones. Both
have `bits`, `max`, `encode` and `decode`, which is all that scales and algorithms ask for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp6_compile.formats import Format


@dataclass(frozen=True)
class Integer:
    """Symmetric integers -max..max of `bits` bits; the code of value v is v + max (uint8)."""

    name: str
    bits: int

    @property
    def max(self) -> float:
        """The largest value: 7 for four bits, 127 for eight."""
        return float(2 ** (self.bits - 1) - 1)

    def encode(self, values: Tensor) -> Tensor:
        """The nearest codes, ties to even; magnitudes above `max` saturate."""
        return (values.round().clamp(-self.max, self.max) + self.max).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes, float32."""
        return codes.float() - self.max


GRIDS: dict[str, Format | Integer] = {
    **{name: Format(name, int(name[1]), int(name[3])) for name in ("e4m3", "e3m2", "e2m3", "e3m1", "e2m2", "e2m1")},
    **{name: Integer(name, int(name[3])) for name in ("int8", "int6", "int4")},
}
# "auto" takes, layer by layer, the one with the least error of the weight.
SIX_BITS = ("e3m2", "e2m3")


@dataclass(frozen=True)
class Setting:
    """One row. `group` None is per channel; `calibration` is the kind of text that statistics come from."""

    format: str = "fp16"
    group: int | None = None
    algorithm: str = "rtn"
    calibration: str | None = None
    target_bits: float | None = None

    @property
    def label(self) -> str:
        """For people, and the key of the row: `e2m3 g64 gptq (code)`."""
        if self.format == "fp16":
            return "fp16"
        group = "channel" if self.group is None else f"g{self.group}"
        target = f" {self.target_bits:g} bits" if self.target_bits else ""
        text = f" ({self.calibration})" if self.calibration else ""
        return f"{self.format}{target} {group} {self.algorithm}{text}"


def full() -> list[Setting]:
    """The rows of the study."""
    plain = [Setting(), Setting("e4m3"), Setting("int8")]
    six = [
        Setting(name, group, algorithm)
        for name in (*SIX_BITS, "auto")
        for group in (None, 128, 64)
        for algorithm in ("rtn", "mse")
    ]
    fewer = [Setting(name, group) for name in ("e2m2", "e3m1", "e2m1", "int4") for group in (None, 64)]
    return [*plain, *six, *fewer]


def quick() -> list[Setting]:
    """Few rows of each kind, for tests."""
    return [Setting(), Setting("e3m2"), Setting("e2m3"), Setting("auto", 64, "mse"), Setting("int4")]
