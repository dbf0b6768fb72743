"""The tile for a problem, and the constants that both launchers of the kernel pass: one place for each."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fp6_compile.formats import Format
from fp6_compile.layouts.gpu_tiles import BLOCK_K, CHUNK

T = TypeVar("T")


@dataclass(frozen=True)
class Device:
    """What the choice of a tile depends on besides the problem.

    arch: "sm_90" and the like, "gfx942", or "" where it is not known. multiprocessors: how many, or compute units.
    wgmma: whether Hopper's asynchronous matrix instruction may be used (selftest.py). name: the key of its measured tiles.
    """

    arch: str = ""
    multiprocessors: int = 132
    wgmma: bool = False
    name: str = ""


@dataclass(frozen=True)
class Config:
    """A tile of BLOCK_N weight rows by BLOCK_M rows of x, shared by SPLIT_K programs; JOIN chunks of weights a dot."""

    BLOCK_N: int
    BLOCK_M: int
    num_warps: int
    num_stages: int
    SPLIT_K: int = 1
    JOIN: int = 1


# Tiles by largest M; beyond the last, the last. The figures behind them: `python -m benchmarks.sass`.
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
# More rows of x than these tiles are for. Hopper: dots of four chunks, each finished before the next unpack.
LARGEST_MMA_M = 64
_WGMMA = Config(128, 128, 8, 2, JOIN=4)
_WGMMA_GROUPS = Config(128, 64, 8, 2, JOIN=4)
_MANY_WARPS = Config(128, 128, 8, 2)  # where no instruction works on warp groups
_WITHOUT_WARP_GROUPS = ("sm_80", "sm_86", "sm_89", "sm_120")

# From this M on, ATen's matmul on a dequantized copy is the faster way: writing and reading that copy costs the same
# at any M, and ATen's kernel is faster by a little for every row of x. A model (docs/results/gpu.md), not yet a measurement.
_ATEN_FROM = {True: 1024, False: 256}  # by wgmma
_ATEN_FROM_GROUPS = {True: 512, False: 128}

# Warps a multiprocessor, all in flight at once, that hide the latency of memory and of unpacking.
_WARPS = 8
# And with how many a wide tile is better than twice as many narrow ones, by largest M. Every program reads x anew: with
# more than a few rows that traffic counts for more than an idle scheduler (benchmarks/linear/simulate.py). Tiles of more
# than 64 columns have eight warps, and one program fills a multiprocessor.
_WIDE_WARPS = {8: 4, LARGEST_MMA_M: 1, 2 * LARGEST_MMA_M: 6}
_MOST_PARTS = 16
# Counters that a launch of split tiles finds and leaves at zero, one a tile: only what does not fill the device is split.
LOCKS = 4096
# Parts are written and read once, 8 bytes an output, in the second-level cache: at most as many bytes as the weight has.
_PARTS_PER_INPUT = 0.75 / 8


def config_for(
    m: int,
    n: int,
    k: int,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float16,
    device: Device = Device(),
) -> Config | None:
    """The tile for x [m, k] of `dtype` and a weight [n, k]; None: dequantize, and use ATen's matmul.

    Pure: it asks no device, so a compile cache may keep it.
    """
    return candidates(m, n, k, group_size, dtype, device)[0]


@functools.lru_cache(maxsize=4096)
def candidates(
    m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, device: Device
) -> tuple[Config | None, ...]:
    """At most six choices worth timing, as `config_for`'s, which is the first."""
    wide, narrow = (_split(tile, m, n, k, device) for tile in _tiles(m, group_size, dtype, device))
    enough = _at(_WIDE_WARPS, m) * device.multiprocessors
    first, second = (wide, narrow) if _warps(wide, m, n) >= enough else (narrow, wide)
    tiles: list[Config | None] = [first]
    if second != first:
        tiles.append(second)
    tiles += [replace(first, SPLIT_K=parts) for parts in _other_parts(first, m, n, k, device)]
    if first.JOIN == 1:
        tiles.append(replace(first, num_stages=3 if first.num_stages == 4 else first.num_stages + 1))
    if dtype != torch.float32 and m > LARGEST_MMA_M:
        aten_from = (_ATEN_FROM if group_size is None else _ATEN_FROM_GROUPS)[device.wgmma]
        tiles = [None, *tiles] if m >= aten_from else [first, None, *tiles[1:]]
    return tuple(tiles[:6])


def _tiles(m: int, group_size: int | None, dtype: torch.dtype, device: Device) -> tuple[Config, Config]:
    """A wide and a narrow tile; the same one twice where there is only one."""
    if dtype == torch.float32 or device.arch.startswith("gfx"):
        return (_at(_FP32 if dtype == torch.float32 else _HIP, m),) * 2
    if m > LARGEST_MMA_M and device.wgmma:
        return _WGMMA if group_size is None else _WGMMA_GROUPS, _WGMMA_GROUPS
    if m > LARGEST_MMA_M and group_size is None and device.arch in _WITHOUT_WARP_GROUPS:
        return _MANY_WARPS, _WIDE[64]
    if group_size is None:
        return _at(_WIDE, m), _at(_NARROW, m)
    narrow = _at(_NARROW_GROUPS, m)
    # Groups of one chunk, and of three, five, ...: eight partial sums a block, which ptxas likes to hold at once.
    crowded = group_size % (2 * CHUNK) != 0 and m > 16
    return (narrow if crowded else _at(_WIDE_GROUPS, m)), narrow


def _at(by_largest_m: dict[int, T], m: int) -> T:
    return next((value for largest, value in by_largest_m.items() if m <= largest), by_largest_m[max(by_largest_m)])


def _warps(config: Config, m: int, n: int) -> int:
    return -(-n // config.BLOCK_N) * -(-m // config.BLOCK_M) * config.SPLIT_K * config.num_warps


def _split(tile: Config, m: int, n: int, k: int, device: Device) -> Config:
    """The tile with K split so that the programs just fill the device, in one wave."""
    wanted = _WARPS * device.multiprocessors // _warps(tile, m, n)
    return replace(tile, SPLIT_K=_parts(wanted, m, k))


def _parts(wanted: int, m: int, k: int) -> int:
    """At most `wanted` parts of K, none empty, each of two blocks or more, so many as their sums' traffic allows."""
    blocks = -(-k // BLOCK_K)
    parts = max(1, min(wanted, blocks // 2, _MOST_PARTS, int(_PARTS_PER_INPUT * k / m)))
    return -(-blocks // -(-blocks // parts))


def _other_parts(config: Config, m: int, n: int, k: int, device: Device) -> list[int]:
    """Half as many parts, and twice as many unless the device is full already: as far as there are such."""
    full = _warps(config, m, n) >= _WARPS * device.multiprocessors
    others = [config.SPLIT_K // 2] if full else [config.SPLIT_K // 2, config.SPLIT_K * 2]
    return sorted({_parts(wanted, m, k) for wanted in others} - {config.SPLIT_K})


def constexprs(config: Config, fmt: Format, group_size: int | None, k: int, use_asm: bool) -> dict[str, int | bool]:
    """The keyword constants of `mm.accumulate`; ints and bools only, so that a template can print them."""
    return {
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_M": config.BLOCK_M,
        "SPLIT_K": config.SPLIT_K,
        "JOIN": config.JOIN,
        "GROUP_SIZE": group_size or 0,
        "EVEN_K": k % BLOCK_K == 0,
        **format_constants(fmt),
        "USE_ASM": use_asm,
    }


def format_constants(fmt: Format) -> dict[str, int]:
    """What the kernels know of a format."""
    return {"EXPONENT_BITS": fmt.exponent_bits, "MANTISSA_BITS": fmt.mantissa_bits}


def supports(group_size: int | None) -> str | None:
    """Why the kernel cannot take `group_size`, or None when it can."""
    if group_size is None or (group_size > 0 and group_size % CHUNK == 0):
        return None
    return f"group_size: got {group_size}, the GPU kernel needs a multiple of {CHUNK} or None"
