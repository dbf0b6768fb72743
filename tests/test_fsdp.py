"""FSDP2: fully_shard of models with packed weights, eager and compiled."""

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import PackedTensor
from tests.support.graphs import without_codegen
from tests.support.processes import group, in_two_processes

if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

X = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()


class Block(nn.Module):
    """Two linears of one input, which the backend would merge, and one of another."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(128, 192, bias=False), nn.Linear(128, 192, bias=False)
        self.down = nn.Linear(192, 128)

    def forward(self, x):
        return x + self.down(torch.relu(self.gate(x)) * self.up(x))


def _model(**how):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).bfloat16().requires_grad_(False)
    fp6_compile.quantize_(model, **how)
    return model


def _shard(model, mesh, **how):
    for block in model:
        fully_shard(block, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def _local(model):
    return model[0].gate.weight.to_local()


def _eager(mesh, **how):
    model, expected = _shard(_model(**how), mesh), _model(**how)
    for _ in range(3):  # memory is freed and filled anew
        assert torch.equal(model(X), expected(X))
    weight = model[0].gate.weight
    assert isinstance(weight, DTensor)
    assert weight.shape[0] == mesh.size() * _local(model).shape[0]
    assert torch.equal(weight.full_tensor(), expected[0].gate.weight)


def _compiled(mesh, **how):
    model, expected = _shard(_model(**how), mesh), _model(**how)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fp6")
    with without_codegen():
        for _ in range(3):
            torch.testing.assert_close(compiled(X), expected(X), atol=0.02, rtol=0.02)
    lines = [line for report in fp6_compile.reports() for line in report.linears]
    assert {line.note for line in lines} == {"packed already"}  # not merged: FSDP could not free what it does not know
    assert all(isinstance(m.weight, DTensor) for block in model for m in (block.gate, block.up, block.down))


def _gradients(mesh):
    """Of what comes before packed weights, whose memory is another's between forward and backward."""
    grads = []
    for model in (_model(), _shard(_model(), mesh)):
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def _mixed_precision(mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, cast_forward_inputs=True)
    y = _shard(_model(group_size=64), mesh, mp_policy=policy)(X)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, _model(group_size=64).half()(X.half()), atol=0.02, rtol=0.02)


def _uneven(mesh):
    model = nn.Linear(128, 129).bfloat16().requires_grad_(False)
    fp6_compile.quantize_(model)
    with pytest.raises(ValueError, match=r"cannot cut a packed weight \[129, 128\] .*ignored_params"):
        fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"cannot cut a packed weight \[192, 128\] into shards such as \[192, 64\]"):
        fully_shard(_model()[0], mesh=mesh, shard_placement_fn=lambda p: Shard(1))


def _with_tensor_parallelism(mesh):
    """A mesh of 1 x 2: rows and columns are another dimension's."""
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model, expected = _model(group_size=32), _model(group_size=32)
    plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model:
        parallelize_module(block, grid["tp"], plan)
    _shard(model, grid["dp"])
    for _ in range(2):
        torch.testing.assert_close(model(X), expected(X), atol=0.02, rtol=0.02)


def _all(rank):
    mesh = init_device_mesh("cpu", (2,))
    for how in ({}, {"group_size": 64}, {"format": "e2m2"}):
        _eager(mesh, **how)
        _compiled(mesh, **how)
    _gradients(mesh)
    _mixed_precision(mesh)
    _uneven(mesh)
    _with_tensor_parallelism(mesh)


@pytest.mark.slow
def test_two_processes(tmp_path):
    in_two_processes(_all, tmp_path)


@pytest.mark.parametrize("how", [{}, {"group_size": 64}, {"format": "e2m2", "group_size": 32}], ids=str)
def test_one_process(how, tmp_path):
    with group(tmp_path):
        _eager(init_device_mesh("cpu", (1,)), **how)


def test_one_process_compiled(tmp_path):
    with group(tmp_path):
        _compiled(init_device_mesh("cpu", (1,)), group_size=64)


def test_gradients_flow_through_shards(tmp_path):
    with group(tmp_path):
        _gradients(init_device_mesh("cpu", (1,)))


def test_a_flat_view_can_do_nothing():
    flat = PackedTensor.quantize(torch.randn(64, 128).half()).view(-1)
    assert flat.shape == (64 * 128,)
    with pytest.raises(NotImplementedError, match="is not defined for a packed weight in one dimension"):
        flat + 1
