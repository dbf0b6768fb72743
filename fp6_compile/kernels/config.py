"""The tile for a problem, and the constants that both launchers of the kernel pass: one place for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp6_compile.formats import Format
from fp6_compile.packing import BLOCK_K, SLAB


@dataclass(frozen=True)
class Config:
    """A tile of BLOCK_N weight rows by BLOCK_M rows of x."""

    BLOCK_N: int
    BLOCK_M: int
    num_warps: int
    num_stages: int


# Tiles by largest M; beyond the last, the last. The figures behind them: tests/test_kernels_machine.py.
#
# Two warps, because four make a warp group: Hopper then takes wgmma and Blackwell tcgen05 (up to Triton 3.7 not for 8
# columns, from 3.9 always). wgmma with its left operand in registers is miscompiled by ptxas 12.8 and 12.9; tcgen05 would
# send the weights through memory. Two warps take mma.sync everywhere.
_WIDE = {8: Config(64, 8, 2, 3), 16: Config(64, 16, 2, 3), 32: Config(64, 32, 2, 3), 64: Config(64, 64, 2, 3)}
# 64 columns by 32 rows would make both warps unpack all rows; two tiles of 32 columns cost no more and are twice as many.
_NARROW = {8: Config(32, 8, 2, 4), 16: Config(32, 16, 2, 4), 32: Config(32, 32, 2, 3)}
# Partial sums, for a scale per group, take as many registers again as the sums: with more columns than this they spill.
_WIDE_GROUPS = {8: _WIDE[8], 16: _WIDE[16], 32: Config(64, 32, 2, 2)}
_NARROW_GROUPS = {8: _NARROW[8], 16: _NARROW[16], 32: Config(32, 32, 2, 2)}
# No tensor core multiplies float32: its dot is unrolled into FMAs, so tiles are small.
_FP32 = {8: Config(32, 8, 4, 2), 16: Config(32, 16, 4, 2)}
# AMD: matrix instructions start at 16 columns, and 64 KB of shared memory hold two stages.
_HIP = {16: Config(64, 16, 4, 2), 32: Config(128, 32, 4, 2)}
# Programs that keep a large GPU busy (an H200 has 132 multiprocessors); a grid below it takes narrow tiles.
_BUSY = 192


def config_for(
    m: int,
    n: int,
    k: int,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    hip: bool = torch.version.hip is not None,
) -> Config:
    """The tile for x [m, k] of `dtype` and a weight [n, k]. Pure: it asks no device, so a compile cache may keep it."""
    if dtype == torch.float32 or hip:
        return _at(_FP32 if dtype == torch.float32 else _HIP, m)
    wide = _at(_WIDE if group_size is None else _WIDE_GROUPS, m)
    # Groups of one slab, and of three, five, ...: eight partial sums a block, which ptxas likes to hold at once.
    crowded = group_size is not None and group_size % (2 * SLAB) != 0 and m > 16
    if -(-n // wide.BLOCK_N) * -(-m // wide.BLOCK_M) >= _BUSY and not crowded:
        return wide
    return _at(_NARROW if group_size is None else _NARROW_GROUPS, m)


def _at(tiles: dict[int, Config], m: int) -> Config:
    return next((tile for largest, tile in tiles.items() if m <= largest), tiles[max(tiles)])


def constexprs(config: Config, fmt: Format, group_size: int | None, k: int, use_asm: bool) -> dict[str, int | bool]:
    """The keyword constants of `mm.accumulate`; ints and bools only, so that a template can print them."""
    return {
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_M": config.BLOCK_M,
        "GROUP_SIZE": group_size or 0,
        "EVEN_K": k % BLOCK_K == 0,
        "EXPONENT_BITS": fmt.exponent_bits,
        "USE_ASM": use_asm,
    }


def supports(group_size: int | None) -> str | None:
    """Why the kernel cannot take `group_size`, or None when it can."""
    if group_size is None or (group_size > 0 and group_size % SLAB == 0):
        return None
    return f"group_size: got {group_size}, the GPU kernel needs a multiple of {SLAB} or None"
