"""torch.distributed.checkpoint: packed models are saved and loaded, by one process and by two, in any sharding."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import PackedTensor
from tests.support.processes import group, in_two_processes

if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}
X = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()


def _model(seed=0, **how):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 128)).bfloat16().requires_grad_(False)
    fp6_compile.quantize_(model, **how)
    return model


def _whole(model, mesh):
    return model


def _fsdp(model, mesh):
    return fully_shard(model, mesh=mesh)


def _tensor_parallel(model, mesh):
    return parallelize_module(model, mesh, PLAN, src_data_rank=None)


def _check(model, **how):
    """That it is the model of seed 0."""
    for (name, got), expected in zip(model.state_dict().items(), _model(**how).state_dict().values(), strict=True):
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        assert torch.equal(got, expected), name


def _resharded(folder, mesh, save, load, **how):
    """Saved in one sharding, loaded in another."""
    dcp.save(fp6_compile.planes_state_dict(save(_model(**how), mesh)), checkpoint_id=folder)
    model = load(_model(seed=1, **how), mesh)
    state = fp6_compile.planes_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    fp6_compile.load_planes_state_dict(model, state)
    _check(model, **how)


def _same_sharding(folder, mesh):
    """As any other model, without help."""
    for name, shard in {"fsdp": _fsdp, "tp": _tensor_parallel}.items():
        dcp.save(shard(_model(), mesh).state_dict(), checkpoint_id=folder / name)
        model = shard(_model(seed=1), mesh)
        state = model.state_dict()
        dcp.load(state, checkpoint_id=folder / name)
        model.load_state_dict(state)
        _check(model)


def _full_state(mesh):
    """Every process gives the whole state, and takes its shards."""
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(_fsdp(_model(), mesh), options=options)
    assert isinstance(state["0.weight"], PackedTensor)
    model = _fsdp(_model(seed=1), mesh)
    set_model_state_dict(model, state, options=options)
    _check(model)


def _two(rank):
    mesh = init_device_mesh("cpu", (2,))
    folder = Path("checkpoints")
    ways = [_whole, _fsdp, _tensor_parallel]
    for i, how in enumerate([{}, {"group_size": 32}, {"format": "e2m2"}]):
        for save in ways:
            for load in ways:
                _resharded(folder / f"{i}{save.__name__}{load.__name__}", mesh, save, load, **how)
    _same_sharding(folder, mesh)
    _full_state(mesh)


@pytest.mark.slow
def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_two_processes(_two, tmp_path)


@pytest.mark.parametrize("how", [{}, {"group_size": 32}, {"format": "e2m2"}], ids=str)
def test_one_process(how, tmp_path):
    with group(tmp_path):
        _resharded(tmp_path / "checkpoint", init_device_mesh("cpu", (1,)), _whole, _fsdp, **how)


def test_without_a_process_group(tmp_path):
    model = _model()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    other = _model(seed=1)
    dcp.load(other.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    _check(other)


def test_the_planes_are_those_of_a_folder(tmp_path):
    """Names, shapes and bytes of fp6_compile.save."""
    from safetensors import safe_open

    model = _model(group_size=32)
    fp6_compile.save(model, tmp_path)
    state = fp6_compile.planes_state_dict(model)
    assert state.keys() == {
        f"{i}.{name}" for i in (0, 2) for name in ("weight_w4", "weight_w2", "weight_scale", "bias")
    }
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in state.items())


def test_what_is_missing_is_named():
    model = _model()
    before = model[0].weight.clone()
    state = fp6_compile.planes_state_dict(_model(seed=1))
    del state["0.weight_w2"]
    with pytest.raises(ValueError, match=r"state: lacks 0\.weight_w2; planes_state_dict\(model\) has"):
        fp6_compile.load_planes_state_dict(model, state)
    assert torch.equal(model[0].weight, before)


def test_another_format_is_refused():
    model = _model(format="e2m3")
    with pytest.raises(Exception, match="shape|planes|size"):
        fp6_compile.load_planes_state_dict(model, fp6_compile.planes_state_dict(_model(group_size=32)))
