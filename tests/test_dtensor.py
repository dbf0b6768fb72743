"""Tensor parallelism: two processes over gloo, weights that are sharded after packing or packed after sharding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
import fp6_compile
from fp6_compile import PackedTensor
from tests.support.graphs import without_codegen
from tests.support.references import close

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
weight, x = torch.randn(200, 512).half(), torch.randn(3, 512).half()

for dim in (0, 1):
    packed = PackedTensor.quantize(weight, "e2m3", group_size=64)
    sharded = distribute_tensor(packed, mesh, [Shard(dim)], src_data_rank=None)
    own = PackedTensor.quantize(weight.chunk(2, dim)[rank], "e2m3", group_size=64)
    local = sharded.to_local()
    assert local.spec == own.spec
    for mine, theirs in zip((*local.planes, local.scale), (*own.planes, own.scale), strict=True):
        assert torch.equal(mine, theirs)
    inputs = distribute_tensor(x, mesh, [Replicate() if dim == 0 else Shard(1)])
    close(F.linear(inputs, sharded).full_tensor(), F.linear(x, packed))

# One scale per channel: a shard of inputs keeps its row's scale, so the product is still that of the whole.
packed = PackedTensor.quantize(weight)
sharded = distribute_tensor(packed, mesh, [Shard(1)], src_data_rank=None)
assert torch.equal(sharded.to_local().dequantize(), packed.dequantize().chunk(2, 1)[rank])

model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 512)).half().requires_grad_(False)
fp6_compile.quantize_(model, group_size=64)
expected = model(x)
parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}, src_data_rank=None)
assert tuple(model[0].weight.to_local().shape) == (128, 512)
assert tuple(model[2].weight.to_local().shape) == (512, 128)
close(model(x), expected, roundings=8)
with without_codegen():
    y = torch.compile(model, backend="fp6", fullgraph=True)(x)
assert [line.note for line in fp6_compile.last_report().linears] == ["packed already"] * 2
close(y, expected, roundings=8)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    command = [sys.executable, "-c", SCRIPT]
    root = Path(__file__).parent.parent
    how = {"cwd": root, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], **how) for rank in (0, 1)]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
