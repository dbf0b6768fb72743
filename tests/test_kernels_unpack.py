"""The unpack, exactly: its PTX under a small emulator, and its plain Triton twin interpreted, on the same words."""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.testing import assert_close

from fp6_compile.formats import FORMATS
from fp6_compile.kernels.unpack import ptx, unpack
from fp6_compile.packing import LANES, SLABS
from fp6_compile.packing import unpack as unpack_codes
from tests.deviceless.pool import interpreted

CASES = [pytest.param(FORMATS[name], dtype, id=f"{name}-{str(dtype)[6:]}") for name, dtype in LANES]


def _words(seed: int) -> torch.Tensor:
    """[3, 512 * 512] int16: random A0, A1, B; in each word in turn, every value of 16 bits with random neighbours."""
    words = torch.randint(
        -(2**15), 2**15, (3, 4 * 2**16), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)
    )
    for i in range(3):
        words[i, i * 2**16 : (i + 1) * 2**16] = torch.arange(2**16) - 2**15
    return words.to(torch.int16)


def _expected(words: torch.Tensor, fmt, dtype) -> torch.Tensor:
    """[8, words]: the decoded codes, bias-shifted in FP16, as they are in BF16."""
    w4 = words[:2].view(2, -1, 16, 32).movedim(0, 1)[:, None].contiguous()  # [N/16, K/256 = 1, 2, 16, 32]
    w2 = words[2].view(-1, 1, 16, 32)
    codes = unpack_codes((w4, w2), fmt, SLABS[dtype], w4.shape[0] * 16, 256)
    values = fmt.decode(codes) / (fmt.lift(dtype) if dtype == torch.float16 else 1)
    return values.to(dtype).view(-1, 8, 32).movedim(1, 0).flatten(1)


def _run_ptx(text: str, operands: list[np.ndarray]) -> list[np.ndarray]:
    """$0..$7 after `text`, given $8, $9 and $10 (uint32, two words each). Unknown instructions raise."""
    registers = dict(zip(("$8", "$9", "$10"), operands, strict=True))

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


@pytest.mark.parametrize(("fmt", "dtype"), CASES)
def test_instructions_per_16_weights(fmt, dtype):
    """`mov` is not counted: ptxas copies no register, and keeps the constants outside the loop."""
    expected = 21 + 8 * (fmt.name == "e2m3") + 8 * (dtype == torch.bfloat16)
    assert len(re.findall(r"\b(?:shl|shr|and|lop3|fma)\.", ptx(fmt, dtype))) == expected


@triton.jit
def _unpack_kernel(A0, A1, B, OUT, WORDS, EXPONENT_BITS: tl.constexpr, BF16: tl.constexpr, USE_ASM: tl.constexpr):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tiles = unpack(tl.load(A0 + i), tl.load(A1 + i), tl.load(B + i), EXPONENT_BITS, BF16, USE_ASM)
    for j in tl.static_range(8):
        tl.store(OUT + j * WORDS + i, tiles[j])


def unpacked(words: torch.Tensor, fmt, dtype: torch.dtype, use_asm: bool) -> torch.Tensor:
    """[8, words] of `dtype` from words [3, words], by the kernel's own `unpack`."""
    out = torch.empty(8, words.shape[1], dtype=dtype, device=words.device)
    constants = {"EXPONENT_BITS": fmt.exponent_bits, "BF16": dtype == torch.bfloat16, "USE_ASM": use_asm}
    _unpack_kernel[(words.shape[1] // 1024,)](words[0], words[1], words[2], out, words.shape[1], **constants)
    return out


@pytest.mark.parametrize(("fmt", "dtype"), CASES)
def test_twin_is_exact_on_every_word(fmt, dtype):
    words = _words(1)
    got = interpreted(unpacked, words, fmt, dtype, False)
    assert_close(got.view(torch.int16), _expected(words, fmt, dtype).view(torch.int16), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("use_asm", [True, False])
@pytest.mark.parametrize(("fmt", "dtype"), CASES)
def test_unpack_on_the_device(fmt, dtype, use_asm):
    words = _words(2)
    got = unpacked(words.cuda(), fmt, dtype, use_asm).cpu()
    assert_close(got.view(torch.int16), _expected(words, fmt, dtype).view(torch.int16), rtol=0, atol=0)
