"""SHA-256 of what the package computes and writes, to show that a change of its structure changes no bit.

    python -m benchmarks.fingerprint before.json                    on the old commit
    python -m benchmarks.fingerprint after.json --against before.json

Hashed are codes, scales, every layout, dequantized weights, eager and compiled outputs, checkpoint files, what they load
into, and what each calibration algorithm finds. Outputs are compared on one machine and one torch: sums depend on both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fp6_compile
from fp6_compile import PackedTensor
from fp6_compile.calibration.algorithms import GPTQ, RTN, BiasCorrection, Clip, LearnedRounding, LoRC, Weighted
from fp6_compile.formats import FORMATS, get_format
from fp6_compile.layouts import LAYOUTS

_SETTINGS = [("e2m3", None, "absmax"), ("e3m2", 64, "absmax"), ("auto", 32, "mse"), ("e2m1", None, "absmax")]


class _Block(nn.Module):
    """Attention's projections and a SwiGLU: merged q, k, v and gate, up; fused epilogues; a square and tall weights."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=bias) for bias in (True, False, False))
        self.gate, self.up, self.down = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(-2, -3) for part in (self.q, self.k, self.v))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def _model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(_Block(256, 640) for _ in range(2))).to(dtype).eval().requires_grad_(False)


def _hash(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def packing() -> Iterator[tuple[str, str]]:
    """Codes, scales, layouts and dequantized weights of every format."""
    torch.manual_seed(1)
    weight = torch.randn(200, 328)
    for name in FORMATS:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for group_size in (None, 32):
                packed = PackedTensor.quantize(weight.to(dtype), name, group_size)
                key = f"packing {name} {dtype} {group_size}"
                yield key, _hash([packed.codes(), packed.scale, packed.dequantize(), *packed.planes])
    for name in FORMATS:
        packed = PackedTensor.quantize(weight.half(), name)
        layouts = LAYOUTS if get_format(name).bits == 6 else LAYOUTS[:-1]
        for position, layout in enumerate(layouts):
            yield f"layout {name} {position}", _hash(packed.repack(layout).planes)


def outputs() -> Iterator[tuple[str, str]]:
    """What models compute: compiled from 16-bit weights, packed and eager, packed and compiled."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        torch.manual_seed(2)
        xs = [torch.randn(*shape, 256).to(dtype) for shape in ((1, 1), (2, 9), (1, 130))]
        for format, group_size, scale in _SETTINGS:
            key = f"outputs {dtype} {format} {group_size}"
            options: dict[str, Any] = {
                "format": format,
                "group_size": group_size,
                "scale_method": scale,
                "include_float32": True,
            }
            torch._dynamo.reset()
            compiled = torch.compile(_model(dtype), backend="fp6", options=options)
            packed = _model(dtype)
            fp6_compile.quantize_(
                packed, format=format, group_size=group_size, scale_method=scale, include_float32=True
            )
            with torch.no_grad():
                yield f"{key} compiled", _hash([compiled(x) for x in xs])
                yield f"{key} packed", _hash([packed(x) for x in xs])
                torch._dynamo.reset()
                yield f"{key} packed, compiled", _hash(map(torch.compile(packed, backend="fp6"), xs))


def checkpoints() -> Iterator[tuple[str, str]]:
    """Files that are saved, and the model that they are loaded into."""
    for format, group_size, scale in _SETTINGS:
        model, empty = _model(torch.bfloat16), _model(torch.bfloat16).to("meta")
        fp6_compile.quantize_(model, format=format, group_size=group_size, scale_method=scale)
        with tempfile.TemporaryDirectory() as folder:
            fp6_compile.save(model, folder, shard_bytes=300_000)
            for path in sorted(Path(folder).iterdir()):
                yield f"file {format} {path.name}", hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            fp6_compile.load(empty, folder)
        values = (p.dequantize() if isinstance(p, PackedTensor) else p for p in empty.parameters())
        yield f"loaded {format}", _hash(values)


def calibration() -> Iterator[tuple[str, str]]:
    """What each algorithm makes of a model."""
    torch.manual_seed(3)
    inputs = [torch.randn(2, 16, 256) for _ in range(3)]
    for algorithm in (RTN(), Clip(), Weighted(), GPTQ(), LoRC(GPTQ()), BiasCorrection(), LearnedRounding(steps=20)):
        model = _model(torch.float32)
        fp6_compile.calibrate_(model, inputs, algorithm=algorithm, group_size=64, include_float32=True)
        values = [p.dequantize() if isinstance(p, PackedTensor) else p for p in model.parameters()]
        yield f"calibration {algorithm!r}", _hash(values)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fingerprint", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="hashes of another commit: exit code 1 where one differs")
    args = parser.parse_args()
    found = dict(item for part in (packing, outputs, checkpoints, calibration) for item in part())
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} hashes in {args.out}")
    if args.against is not None:
        known = json.loads(args.against.read_text())
        different = [key for key in known.keys() | found.keys() if known.get(key) != found.get(key)]
        print(f"{len(different)} differ from {args.against}", *sorted(different), sep="\n  ")
        raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
