"""DTensors of packed weights: distributed, put together again, and multiplied with; eager and compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fp6_compile
from fp6_compile import PackedTensor
from tests.support.graphs import without_codegen
from tests.support.processes import group, in_two_processes
from tests.support.references import close

if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

# Shards of 100 and 99 rows, which are packed in tiles of 4; e2m2 has other bit planes; without groups, too.
WEIGHTS = [(200, 512, "e2m3", 64), (198, 512, "e3m2", None), (199, 256, "e2m2", 32), (64, 4096, "e2m3", 128)]


def _packed(seed, n, k, format, group_size):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).half()
    return PackedTensor.quantize(weight, format, group_size=group_size)


def _model(group_size, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 512)).half().requires_grad_(False)
    fp6_compile.quantize_(model, group_size=group_size)
    return model


def _distribute(rank):
    """Every process has another weight: all get that of the first, and it comes back as it was."""
    mesh = init_device_mesh("cpu", (2,))
    for weight in WEIGHTS:
        first = _packed(0, *weight)
        for dim in (0, 1):
            shards = distribute_tensor(_packed(rank, *weight), mesh, [Shard(dim)])
            assert torch.equal(shards.to_local(), first.chunk(2, dim)[rank])
            whole = shards.full_tensor()
            assert isinstance(whole, PackedTensor)
            assert torch.equal(whole, first)
            other = shards.redistribute(placements=[Shard(1 - dim)])
            assert torch.equal(other.to_local(), first.chunk(2, 1 - dim)[rank])
        copies = distribute_tensor(_packed(rank, *weight), mesh, [Replicate()])
        assert torch.equal(copies.to_local(), first)
        assert torch.equal(copies.redistribute(placements=[Shard(0)]).to_local(), first.chunk(2)[rank])


def _shard_and_multiply(rank):
    """A shard is the packing of the shard, and products are those of the whole."""
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


def _parallelize(rank):
    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).half()
    for group_size in (64, None):
        expected = _model(group_size)(x)
        for model, how in ((_model(group_size), {"src_data_rank": None}), (_model(group_size, seed=rank), {})):
            parallelize_module(model, mesh, plan, **how)
            assert tuple(model[0].weight.to_local().shape) == (128, 512)
            assert tuple(model[2].weight.to_local().shape) == (512, 128)
            close(model(x), expected, roundings=8)
        with without_codegen():
            y = torch.compile(model, backend="fp6", fullgraph=True)(x)
        assert [line.note for line in fp6_compile.last_report().linears] == ["packed already"] * 2
        close(y, expected, roundings=8)


def _groups(rank):
    """A shard that would end within a group, in every process."""
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match=r"inputs 0 to 96 of .* cut a group: .* a multiple of group_size=64"):
        distribute_tensor(_packed(0, 64, 192, "e2m3", 64), mesh, [Shard(1)])


def _all(rank):
    _distribute(rank)
    _shard_and_multiply(rank)
    _parallelize(rank)
    _groups(rank)


@pytest.mark.slow
def test_two_processes(tmp_path):
    in_two_processes(_all, tmp_path)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_one_process_distributes_and_gathers(weight, dim, tmp_path):
    with group(tmp_path):
        packed = _packed(0, *weight)
        sharded = distribute_tensor(packed.clone(), init_device_mesh("cpu", (1,)), [Shard(dim)])
        assert torch.equal(sharded.full_tensor(), packed)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_pieces_are_joined_to_what_was_cut(weight, dim):
    packed = _packed(0, *weight)
    size = packed.shape[dim] // 2 // 32 * 32
    pieces = packed.split([size, packed.shape[dim] - size], dim)
    assert torch.equal(torch.cat(pieces, dim), packed)
    transposed = torch.cat([piece.t() for piece in pieces], 1 - dim)
    assert torch.equal(transposed.t(), packed)


def test_pieces_that_do_not_belong_together_are_refused():
    a, b = _packed(0, 64, 128, "e2m3", None), _packed(1, 64, 128, "e2m3", None)
    assert torch.equal(torch.cat([a, b]).dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    with pytest.raises(ValueError, match="joined along K only if their rows have the same scales"):
        torch.cat([a, b], 1)
    with pytest.raises(ValueError, match="of one format, group_size and dtype"):
        torch.cat([a, _packed(1, 64, 128, "e3m2", None)])
    with pytest.raises(ValueError, match="cannot be joined"):
        torch.cat([a, _packed(1, 64, 64, "e2m3", None)])
    with pytest.raises(ValueError, match="end with a whole group of 96"):
        torch.cat([_packed(0, 64, 128, "e2m3", 96)] * 2, 1)


@pytest.mark.parametrize("group_size", [None, 96])
def test_padding_adds_zeros(group_size):
    packed = _packed(0, 30, 128, "e2m3", group_size)
    padded = F.pad(packed, (0, 70, 0, 3))
    assert padded.shape == (33, 198)
    assert torch.equal(padded.dequantize(), F.pad(packed.dequantize(), (0, 70, 0, 3)))
    assert torch.equal(F.pad(packed.t(), (0, 3, 0, 70)).t(), padded)
    with pytest.raises(NotImplementedError, match="padded with zeros, at the end"):
        F.pad(packed, (1, 0))
