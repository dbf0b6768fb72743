"""The unpack, exactly: its PTX under a small emulator, and its plain Triton twin interpreted, on the same words."""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.testing import assert_close

from fp6_compile.formats import FORMATS
from fp6_compile.kernels.triton.config import format_constants
from fp6_compile.kernels.triton.ptx import ptx
from fp6_compile.kernels.triton.unpack import unpack
from fp6_compile.layouts.gpu_tiles import GPU_LAYOUTS, LANES, words
from fp6_compile.layouts.packing import unpack as unpack_codes
from tests.deviceless.pool import interpreted

CASES = [pytest.param(FORMATS[name], dtype, id=f"{name}-{str(dtype)[6:]}") for name, dtype in LANES]


OTHERS = [
    pytest.param(fmt, dtype, id=f"{fmt.name}-{str(dtype)[6:]}")
    for fmt in FORMATS.values()
    for dtype in GPU_LAYOUTS
    if (fmt.name, dtype) not in LANES and fmt.exponent_bits < 5
]


def _words(seed: int, fmt=FORMATS["e3m2"], span: int = 2**16) -> torch.Tensor:
    """[words, ...] int16: random ones; each word in turn has every value of 16 bits (of `span`) with random neighbours."""
    count = sum(words(fmt))
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(-(2**15), 2**15, (count, 4 * span), dtype=torch.int32, generator=generator)
    for i in range(count):
        made[i, i * span : (i + 1) * span] = torch.arange(span) * (2**16 // span) - 2**15
    if 1 in fmt.planes:
        made[-1] &= 0xFF
    return made.to(torch.int16)


def _expected(made: torch.Tensor, fmt, dtype) -> torch.Tensor:
    """[8, words]: the decoded codes, bias-shifted in FP16, as they are in BF16."""
    planes, first = [], 0
    for width, count in zip(fmt.planes, words(fmt), strict=True):
        plane = (
            made[first : first + count].view(count, -1, 16, 32).movedim(0, 1)[:, None]
        )  # [N/16, K/256 = 1, words, 16, 32]
        plane = plane if count > 1 else plane[:, :, 0]
        planes.append(plane.to(torch.uint8) if width == 1 else plane)
        first += count
    codes = unpack_codes(planes, fmt, GPU_LAYOUTS[dtype], planes[0].shape[0] * 16, 256)
    values = fmt.decode(codes) / (fmt.exponent_rescale(dtype) if dtype == torch.float16 else 1)
    return values.to(dtype).view(-1, 8, 32).movedim(1, 0).flatten(1)


def _run_ptx(text: str, operands: list[np.ndarray]) -> list[np.ndarray]:
    """$0..$7 after `text`, given $8, $9, ... (uint32, two words each). Unknown instructions raise."""
    registers = {f"${8 + i}": operand for i, operand in enumerate(operands)}

    def value(name: str) -> np.ndarray:
        return np.uint32(int(name, 0)) if name[0].isdigit() else registers[name]

    for opcode, arguments in re.findall(r"(?<![\w.])([a-z][\w.]*) ([^;]*);", text):
        to, *sources = arguments.split(", ")
        registers[to] = _OPCODES[opcode](*map(value, sources))
    return [registers[f"${i}"] for i in range(8)]


def _lop3(a, b, c, table):
    """Bit i of the table is the result where the bits of a, b and c spell i."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _fma_bf16x2(a, b, c):
    """Both halves in float64, where the product of two bf16 is exact; the test asks for results that bf16 holds exactly."""
    halves = []
    for shift in (0, 16):
        x, y, z = ((word >> shift << 16).astype(np.uint32).view(np.float32).astype(np.float64) for word in (a, b, c))
        result = torch.from_numpy(x * y + z).to(torch.bfloat16)
        assert np.array_equal(result.double().numpy(), x * y + z)
        halves.append(result.view(torch.int16).numpy().view(np.uint16).astype(np.uint32))
    return halves[0] | halves[1] << 16


_OPCODES = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, n: a << n,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "fma.rn.bf16x2": lambda a, b, c: _fma_bf16x2(np.atleast_1d(a), np.atleast_1d(b), np.atleast_1d(c)),
}


@pytest.mark.parametrize(("fmt", "dtype"), CASES)
def test_ptx_is_exact_on_every_word(fmt, dtype):
    words = _words(0)
    pairs = [word.numpy().view(np.uint32) for word in words]
    got = np.stack(_run_ptx(ptx(fmt, dtype), pairs)).view(np.int16)
    # Bits, not values: -0 is a code of its own.
    assert_close(torch.from_numpy(got), _expected(words, fmt, dtype).view(torch.int16), rtol=0, atol=0)


@pytest.mark.parametrize(("fmt", "dtype"), OTHERS)
def test_ptx_of_every_other_format(fmt, dtype):
    words = _words(0, fmt, 2**12)
    got = np.stack(_run_ptx(ptx(fmt, dtype), [word.numpy().view(np.uint32) for word in words])).view(np.int16)
    assert_close(torch.from_numpy(got), _expected(words, fmt, dtype).view(torch.int16), rtol=0, atol=0)


@pytest.mark.parametrize(("fmt", "dtype"), CASES)
def test_instructions_per_16_weights(fmt, dtype):
    """`mov` is not counted: ptxas copies no register, and keeps the constants outside the loop."""
    expected = 21 + 8 * (fmt.name == "e2m3") + 8 * (dtype == torch.bfloat16)
    assert len(re.findall(r"\b(?:shl|shr|and|lop3|fma)\.", ptx(fmt, dtype))) == expected


@triton.jit
def _unpack_kernel(
    IN,
    OUT,
    COUNT,
    WORDS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    BF16: tl.constexpr,
    USE_ASM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = ()
    for w in tl.static_range(WORDS):
        words += (tl.load(IN + w * COUNT + i),)
    tiles = unpack(words, EXPONENT_BITS, MANTISSA_BITS, BF16, USE_ASM)
    for j in tl.static_range(8):
        tl.store(OUT + j * COUNT + i, tiles[j])


def unpacked(made: torch.Tensor, fmt, dtype: torch.dtype, use_asm: bool) -> torch.Tensor:
    """[8, words] of `dtype` from words [..., words], by the kernel's own `unpack`."""
    count, total = made.shape
    out = torch.empty(8, total, dtype=dtype, device=made.device)
    # The interpreter takes its time for each operation, not for each element.
    block = 1024 if made.is_cuda else min(total, 2**16)
    constants = {"WORDS": count, "BF16": dtype == torch.bfloat16, "USE_ASM": use_asm, **format_constants(fmt)}
    _unpack_kernel[(total // block,)](made, out, total, **constants, BLOCK=block)
    return out


@pytest.mark.parametrize(("fmt", "dtype"), CASES)
def test_twin_is_exact_on_every_word(fmt, dtype):
    words = _words(1)
    got = interpreted(unpacked, words, fmt, dtype, False)
    assert_close(got.view(torch.int16), _expected(words, fmt, dtype).view(torch.int16), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", GPU_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["e2m2", "e4m3", "e3m3"])
def test_twin_of_other_widths(name, dtype):
    fmt = FORMATS[name]
    words = _words(1, fmt, 2**10)
    got = interpreted(unpacked, words, fmt, dtype, False)
    assert_close(got.view(torch.int16), _expected(words, fmt, dtype).view(torch.int16), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("use_asm", [True, False])
@pytest.mark.parametrize(("fmt", "dtype"), CASES + OTHERS)
def test_unpack_on_the_device(fmt, dtype, use_asm):
    words = _words(2, fmt)
    got = unpacked(words.cuda(), fmt, dtype, use_asm).cpu()
    assert_close(got.view(torch.int16), _expected(words, fmt, dtype).view(torch.int16), rtol=0, atol=0)
