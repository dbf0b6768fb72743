"""One Triton kernel compiled for a named target, with figures from the compiler's output and the machine code.

    compiled = compile_kernel(kernel, {"x": "*fp16", "y": "*fp16", "n": "i32"}, {"BLOCK": 128}, "sm_90")
    compiled.registers, compiled.spill_bytes, compiled.shared_bytes, compiled.mma
    compiled.hot_loop.count("HMMA"), compiled.hot_loop.pipes()

Triton needs no driver to compile for a target it is told, and its wheel carries the NVIDIA disassembler. These are static
figures: counts of instructions, not of cycles.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {f"sm_{sm}": GPUTarget("cuda", sm, 32) for sm in (80, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

# An opcode without its modifiers belongs to the first pipe whose pattern it matches in full.
_PIPES = {
    "MMA": r"[HQIBD]G?MMA|UTC\w*MMA|v_mfma_\w+",
    "MEM": r"LD\w*|ST\w*|ATOM\w*|RED|SHFL|UTMA\w*|UBLKCP|(ds|global|buffer|flat|scratch)_\w+",
    "UNI": r"U[A-Z]\w*|R2UR|S2UR|s_\w+",
    "FMA": r"IMAD|FFMA2?|FMUL2?|FADD2?|HFMA2|HMUL2|HADD2|v_(pk_)?(fma|mul|add|fmac)_f\w+",
    "ALU": r"LOP3|SHF|PRMT|V?I?ADD3?|IADD3|VIADD\w*|LEA|SEL|FSEL|ISETP|FSETP|PLOP3|P2R|R2P|[FHV]?I?MNMX\w*|I?ABS"
    r"|F2FP|I2FP|[FI]2[FI]|BMSK|SGXT|POPC|FLO|MOV|CS2R|v_\w+",
}
_LOCAL_WIDTH = {"64": 8, "128": 16}  # STL and LDL move 4 bytes unless their modifiers say otherwise


@dataclass(frozen=True)
class Code:
    """Consecutive instructions, as text that begins with the opcode; `first` and `last` are positions in the listing."""

    instructions: tuple[str, ...]
    first: int
    last: int

    def __len__(self) -> int:
        return len(self.instructions)

    @functools.cached_property
    def opcodes(self) -> collections.Counter[str]:
        """How often each opcode occurs, modifiers included."""
        return collections.Counter(text.split()[0] for text in self.instructions)

    def count(self, prefix: str) -> int:
        """How many instructions have an opcode that is `prefix` or `prefix` with modifiers."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(rf"{re.escape(prefix)}(\.|_|$)", opcode))

    def pipes(self) -> collections.Counter[str]:
        """Instructions by the pipe that issues them: MMA, MEM, ALU, FMA, UNI (uniform or scalar), OTHER."""
        counts: collections.Counter[str] = collections.Counter()
        for opcode, n in self.opcodes.items():
            counts[_pipe(opcode.split(".")[0])] += n
        return counts


@functools.cache
def _pipe(opcode: str) -> str:
    return next((pipe for pipe, pattern in _PIPES.items() if re.fullmatch(pattern, opcode)), "OTHER")


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled by Triton for one target."""

    target: str
    asm: Mapping[str, Any]
    shared_bytes: int
    registers: int  # per thread; on AMD the vector registers
    stack_bytes: int  # per thread, local memory beyond the registers
    text: str  # the disassembly
    code: Code
    loops: tuple[Code, ...]

    @property
    def ttgir(self) -> str:
        """The kernel in Triton's GPU dialect, which shows layouts and round trips through shared memory."""
        return self.asm["ttgir"]

    @functools.cached_property
    def mma(self) -> str | None:
        """The matrix instruction used: HMMA (mma.sync), HGMMA (wgmma), UTCHMMA (tcgen05) ..., None without one."""
        kinds = {opcode.split(".")[0] for opcode in self.code.opcodes if _pipe(opcode.split(".")[0]) == "MMA"}
        return "+".join(sorted(kinds)) or None

    @property
    def spill_bytes(self) -> tuple[int, int]:
        """Bytes stored to and loaded from local memory by the instructions of one thread."""
        return _local_bytes(self.code, "STL", "scratch_store"), _local_bytes(self.code, "LDL", "scratch_load")

    @functools.cached_property
    def hot_loop(self) -> Code:
        """The largest innermost loop with a matrix instruction; without any, the largest loop, or all the code."""
        with_mma = [loop for loop in self.loops if loop.pipes()["MMA"]]
        innermost = [loop for loop in with_mma if not any(_inside(other, loop) for other in with_mma)]
        return max(innermost or self.loops or [self.code], key=len)


def _inside(inner: Code, outer: Code) -> bool:
    return inner is not outer and outer.first <= inner.first and inner.last <= outer.last


def _local_bytes(code: Code, nvidia: str, amd: str) -> int:
    total = 0
    for opcode, n in code.opcodes.items():
        base, *modifiers = opcode.split(".")
        if base == nvidia or opcode.startswith(amd):
            total += n * next((_LOCAL_WIDTH[m] for m in modifiers if m in _LOCAL_WIDTH), 4)
    return total


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str = "sm_90",
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible_by_16: Collection[str] | None = None,
    **options: Any,
) -> Compiled:
    """Compile `fn`, a @triton.jit function, for one of TARGETS.

    `signature` gives the Triton type of each argument that is not in `constexprs`. `divisible_by_16` names the arguments
    known to be multiples of 16; by default all pointers, as Inductor passes aligned tensors.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in fn.arg_names}
    aligned = [n for n, t in types.items() if t.startswith("*")] if divisible_by_16 is None else divisible_by_16
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names) if name in aligned}
    source = ASTSource(fn=fn, signature=types, constexprs=dict(constexprs), attrs=attrs)
    options |= {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_cubin if "cubin" in compiled.asm else _read_amdgcn
    return Compiled(target, compiled.asm, compiled.metadata.shared, *read(compiled.asm))


def _read_cubin(asm: Mapping[str, Any]) -> tuple[int, int, str, Code, tuple[Code, ...]]:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        arguments = ("-sass", "-res-usage")
        sass, usage = (
            subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in arguments
        )
    registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    # An instruction is "/*0a30*/  @!P0 BRA 0x5c0 ;"; the predicate is dropped, a branch back to an address is a loop.
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", sass, re.MULTILINE)
    index = {int(address, 16): i for i, (address, _) in enumerate(found)}
    texts = [text for _, text in found]
    targets = {i: re.search(r"^BRA\b.*\b0x([0-9a-f]+)", text) for i, text in enumerate(texts)}
    edges = [(index[int(match[1], 16)], i) for i, match in targets.items() if match]
    return registers, stack, sass, *_split(texts, edges)


def _read_amdgcn(asm: Mapping[str, Any]) -> tuple[int, int, str, Code, tuple[Code, ...]]:
    text = asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s+(\d+)", text)
    stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    labels: dict[str, int] = {}
    texts: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(texts)
        elif instruction := re.match(r"\s+([sv]_\w+|(?:ds|global|buffer|flat|scratch)_\w+)(.*)", line):
            texts.append(instruction[1] + instruction[2].split(";")[0])
    branches = {i: re.match(r"s_c?branch\w*\s+(\.LBB\w+)", text) for i, text in enumerate(texts)}
    edges = [(labels[match[1]], i) for i, match in branches.items() if match]
    return registers, stack, text, *_split(texts, edges)


def _number(pattern: str, text: str) -> int:
    """The first number that `pattern` captures. Raises ValueError where a compiler writes something else by now."""
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"the compiler's report has nothing like {pattern}")
    return int(found[1])


def _split(texts: Sequence[str], edges: Sequence[tuple[int, int]]) -> tuple[Code, tuple[Code, ...]]:
    """All the code, and one stretch for each branch that goes back."""
    # What follows the last exit is a branch to itself and padding to the size of a cache line: no work.
    end = next(i for i in reversed(range(len(texts))) if not texts[i].startswith(("NOP", "BRA")))
    back = sorted((start, branch) for start, branch in edges if start < branch)
    return _code(texts, 0, end), tuple(_code(texts, start, branch) for start, branch in back)


def _code(texts: Sequence[str], first: int, last: int) -> Code:
    kept = (text for text in texts[first : last + 1] if text.split()[0] not in ("NOP", "s_nop"))
    return Code(tuple(kept), first, last)
