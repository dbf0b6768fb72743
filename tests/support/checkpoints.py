"""Folders with checkpoints: how tests write them, sign them again after a change, and read them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import fp6_compile
from fp6_compile import PackedTensor
from fp6_compile.checkpoint import manifest
from fp6_compile.storage import safetensors as storage
from tests.support.models import Tower


def packed_tower(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    model = Tower().half().eval()
    fp6_compile.quantize_(model, group_size=64)
    return model


def empty_tower() -> Tower:
    with torch.device("meta"):
        return Tower().eval()


def sign(folder: Path, change=lambda index: None, *, files: list[Path] | None = None) -> None:
    """Write fp6.json anew, changed by `change`, with the hashes of the shards as they are."""
    shards = sorted(folder.glob("*.safetensors")) if files is None else files
    about = {s.name: {"bytes": s.stat().st_size, "sha256": storage.sha256(s)} for s in shards}
    index = json.loads(manifest.index_text(about))
    del index["sha256"]
    change(index)
    (folder / "fp6.json").write_text(json.dumps({**index, "sha256": manifest._digest(index)}))


def content(folder: Path) -> bytes:
    """All values of the tower that `folder` holds."""
    model = empty_tower()
    fp6_compile.load(model, folder)
    return b"".join(t.dequantize().numpy().tobytes() if isinstance(t, PackedTensor) else t.detach().numpy().tobytes()
                    for t in model.state_dict().values())  # fmt: skip


def mx_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Four codes to 24 bits, little end first, one by one: the specification, slowly."""
    rows = []
    for row in codes.tolist():
        words = [sum(code << 6 * i for i, code in enumerate(row[k : k + 4])) for k in range(0, len(row), 4)]
        rows.append([byte for word in words for byte in word.to_bytes(3, "little")])
    return torch.tensor(rows, dtype=torch.uint8)
