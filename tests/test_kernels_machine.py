"""The kernel as machine code, without a GPU: registers, spills, which matrix instruction, instructions per weight.

The figures are static counts of the hot loop's instructions over the weights that one thread unpacks in it. An H200 at its
memory roofline has 5.8 issue slots and 2.9 slots of the integer pipe a weight; the bars below keep to about half of both.
"""

import functools
import re

import pytest
import torch

from fp6_compile.formats import FORMATS, Format
from fp6_compile.kernels import mm
from fp6_compile.kernels.config import Device, config_for, constexprs
from fp6_compile.packing import BLOCK_K
from tests.deviceless.machine import Compiled, compile_kernel
from tests.test_kernels import BF16, F16, F32, show

E3M2, E2M3 = FORMATS["e3m2"], FORMATS["e2m3"]
M_BUCKETS = (8, 16, 32, 64)
TYPES = {F16: "*fp16", BF16: "*bf16", F32: "*fp32"}


WIDE, NARROW = 1 << 16, 1 << 12  # rows of a weight that fill a GPU with wide tiles, and that do not


@functools.cache
def compiled(
    target: str, m: int, n: int, fmt: Format, dtype: torch.dtype, group: int | None = None, k: int = 4096
) -> tuple[Compiled, int]:
    """The eager kernel for `target`, and the weights that a thread unpacks in an iteration."""
    nvidia = target.startswith("sm")
    tile = config_for(m, n, k, group, dtype, Device(target))
    constants = constexprs(tile, fmt, group, k, use_asm=nvidia)
    types = {"X": TYPES[dtype], "W4": "*i16", "W2": "*i16", "SCALE": "*fp32", "OUT": TYPES[dtype]}
    types |= {"PARTS": "*fp32", "LOCKS": "*i32"}
    types |= dict.fromkeys(("M", "N", "K", "stride_xm"), "i32")
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    aligned = ["X", "W4", "W2", "SCALE", "OUT", "PARTS", "LOCKS", "N", "K", "stride_xm"]
    result = compile_kernel(mm.mm_kernel, types, constants, target, divisible_by_16=aligned, **options)
    return result, tile.BLOCK_N * BLOCK_K // (tile.num_warps * (32 if nvidia else 64))


def per_weight(code: Compiled, weights: int) -> float:
    return len(code.hot_loop) / weights


# Every tile on sm_90, with the cheapest unpack and the dearest; elsewhere a choice.
CASES = (
    [
        ("sm_90", m, n, *kind)
        for m in M_BUCKETS
        for n in (WIDE, NARROW)
        for kind in ((E3M2, F16, None), (E2M3, BF16, None))
    ]
    + [("sm_90", m, WIDE, *kind) for m in M_BUCKETS for kind in ((E3M2, BF16, None), (E2M3, F16, None))]
    + [("sm_90", m, n, E2M3, BF16, 64) for m in (8, 16, 32) for n in (WIDE, NARROW)]
    + [("sm_90", m, WIDE, E2M3, BF16, 32) for m in (8, 16, 32)]
    + [(f"sm_{sm}", m, WIDE, E3M2, F16, None) for sm in (80, 89, 100, 120) for m in (8, 16, 64)]
    + [(f"sm_{sm}", m, NARROW, E2M3, BF16, None) for sm in (80, 100, 120) for m in (16, 64)]
    + [(f"sm_{sm}", 64, WIDE, E2M3, BF16, group) for sm in (80, 100) for group in (32, 64)]
)


@pytest.mark.parametrize(("target", "m", "n", "fmt", "dtype", "group"), CASES, ids=show)
def test_mma_sync_and_no_spills(target, m, n, fmt, dtype, group):
    """Never wgmma or tcgen05: with the left operand in registers they read it after ptxas 12.8 has reused the register.

    ptxas aims at register counts where more warps fit (80, 168), and saves a few addresses to get there: that is the
    little stack allowed here. A tile that is too large spills its sums, and hundreds of bytes.
    """
    code, _ = compiled(target, m, n, fmt, dtype, group)
    assert code.mma == "HMMA"
    assert set(re.findall(r"versionMajor = (\d+)", code.ttgir)) == {"2"}
    assert not re.search(r"warp_group_dot|tc_gen5", code.ttgir)
    assert code.stack_bytes <= 24
    assert code.hot_loop.count("STL") + code.hot_loop.count("LDL") <= 0.02 * len(code.hot_loop)


# Instructions a weight. Of these E3M2's unpack is 1.3, and 1.8 in BF16; E2M3's 1.8 and 2.3; the MMAs are m / 64.
BARS = {(E3M2, F16): 2.2, (E3M2, BF16): 2.9, (E2M3, F16): 2.6, (E2M3, BF16): 3.1}


@pytest.mark.parametrize(("fmt", "dtype"), BARS, ids=show)
@pytest.mark.parametrize("m", [8, 16])
def test_instructions_per_weight(m, fmt, dtype):
    code, weights = compiled("sm_90", m, WIDE, fmt, dtype)
    assert per_weight(code, weights) <= BARS[fmt, dtype]
    assert code.hot_loop.pipes()["ALU"] / weights <= 1.45


@pytest.mark.parametrize("m", M_BUCKETS)
def test_weights_stay_in_registers(m):
    """They are loaded by asynchronous copies, and nothing in the loop writes shared memory or permutes bytes."""
    code, _ = compiled("sm_90", m, WIDE, E3M2, F16)
    assert code.hot_loop.count("PRMT") == 0
    assert code.hot_loop.count("STS") == code.hot_loop.count("STSM") == code.hot_loop.count("SHFL") == 0
    assert code.hot_loop.count("LDGSTS") > 0


def test_odd_k_masks_x_only():
    """A K tail costs comparisons, for x; the weights of the padded block are loaded as ever."""
    code, weights = compiled("sm_90", 8, WIDE, E3M2, F16, None, 400)
    assert code.mma == "HMMA"
    assert per_weight(code, weights) <= 2.7


def test_float32_uses_no_tensor_core():
    """TF32 would round x and the products' sum to 10 bits."""
    code, _ = compiled("sm_90", 16, WIDE, E3M2, F32)
    assert code.mma is None
    assert (code.stack_bytes, *code.spill_bytes) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=show)
def test_amd(dtype):
    """The twin, on the matrix cores."""
    code, _ = compiled("gfx942", 32, WIDE, E3M2, dtype)
    assert "v_mfma" in code.mma
    assert code.spill_bytes == (0, 0)
    assert code.shared_bytes <= 64 << 10


def main() -> None:
    """Print the figures of every case, as a table."""
    print("target   m     n  format  x         group  regs   smem  instr/w   ALU   FMA   MEM   MMA  stack")
    for case in [*CASES, *(("gfx942", m, WIDE, E3M2, dtype, None) for m in (16, 32) for dtype in (F16, BF16))]:
        code, weights = compiled(*case)
        pipes = {name: count / weights for name, count in code.hot_loop.pipes().items()}
        figures = "".join(f"{pipes.get(name, 0):6.2f}" for name in ("ALU", "FMA", "MEM", "MMA"))
        target, m, n, fmt, dtype, group = case
        print(
            f"{target:7}{m:3} {n:5}  {fmt.name:6}  {show(dtype):8}  {group!s:5} {code.registers:5} {code.shared_bytes:6}"
            f"  {per_weight(code, weights):7.2f}{figures}  {code.stack_bytes}"
        )


if __name__ == "__main__":
    main()
