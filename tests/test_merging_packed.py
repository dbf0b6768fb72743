"""Weights that are packed already are merged like others: in one place, in no more memory, and still each its own tensor."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import fp6_compile
from fp6_compile import PackedTensor, quantize_
from tests.support.models import DIM, Attention, Heads

SIZES = (128, 256, 132)


def _model(*sizes, group_size=None, dtype=torch.float16):
    model = Heads(*(sizes or SIZES), bias=True).to(dtype)
    quantize_(model, group_size=group_size)
    return model


def _bytes(model):
    """Of all planes and scales, each storage once."""
    weights = [p for p in model.parameters() if isinstance(p, PackedTensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for w in weights for t in _tensors(w)}
    return sum(storages.values())


def _tensors(weight):
    return [*weight.planes, weight.scale]


@pytest.mark.parametrize(("group_size", "dtype"), [(None, torch.float16), (64, torch.bfloat16)])
def test_one_launch_and_no_more_memory(group_size, dtype, captured):
    """The planes are moved side by side; eager calls, copies and other backends see the weights as they were."""
    model, x = _model(group_size=group_size, dtype=dtype), torch.randn(5, DIM).to(dtype)
    before, size = [[t.clone() for t in _tensors(head.weight)] for head in model.heads], _bytes(model)
    with torch.no_grad():
        expected = model(x)
        actual = torch.compile(model, backend="fp6")(x)
        assert captured.matmuls() == 1
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected, rtol=0, atol=0)
    gc.collect()
    scales = sum(head.weight.scale.nbytes for head in model.heads)
    first, *others = [head.weight.planes[0].untyped_storage().data_ptr() for head in model.heads]
    assert {first} == set(others)
    # Scales of groups are held twice: 4 bytes for every 64 weights.
    assert _bytes(model) == size
    assert (group_size is None) == (model.heads[0].weight.scale.untyped_storage().nbytes() == scales)
    for head, tensors in zip(model.heads, before, strict=True):
        for now, then in zip(_tensors(head.weight), tensors, strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=0)
            assert now.stride() == then.stride()


def test_report(captured):
    model = Attention().half()
    quantize_(model)
    with torch.no_grad():
        torch.compile(model, backend="fp6", fullgraph=True)(torch.randn(1, 2, DIM).half())
    q, k, _, o = fp6_compile.last_report().linears
    assert (q.name, q.note, o.note) == ("q", "packed already; merged with k, v", "packed already")
    assert k.bytes_after == 128 * DIM * 6 // 8 + 128 * 4
    assert (counters["fp6"]["weights_packed"], counters["fp6"]["merged"]) == (0, 2)


def test_through_inductor():
    model, x = _model(), torch.randn(5, DIM).half()
    with torch.no_grad(), fresh_cache():
        torch.testing.assert_close(torch.compile(model, backend="fp6")(x), model(x), rtol=1e-3, atol=1e-3)
    assert counters["fp6"]["merged"] == 2


def _new(model):
    model.heads[1].weight = _model().heads[1].weight


CHANGES = {
    "copy_": lambda model: model.heads[0].weight.copy_(_model().heads[0].weight),
    "load_state_dict": lambda model: model.load_state_dict(_model().state_dict()),
    "load_state_dict, assign": lambda model: model.load_state_dict(_model().state_dict(), assign=True),
    "new parameter": _new,
    "refresh": lambda model: fp6_compile.mark_weights_changed(model),
}


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("change", CHANGES)
def test_change_is_noticed(change, group_size, captured, monkeypatch):
    """Without a recompile; the new weight's planes move in with the others', and their old place is free."""
    model, x = _model(group_size=group_size), torch.randn(3, DIM).half()
    monkeypatch.setitem(globals(), "_model", lambda make=_model: make(group_size=group_size))
    compiled = torch.compile(model, backend="fp6")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        compiled(x)
        size = _bytes(model)
        CHANGES[change](model)
        expected = model(x)
        gc.collect()
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    assert len(captured.graphs) == 1
    assert _bytes(model) == size
    assert len({head.weight.planes[0].untyped_storage().data_ptr() for head in model.heads}) == 1


def test_only_weights_packed_alike(captured):
    """Other groups, other formats, and weights made in inference mode, whose changes nobody could notice, stay alone."""
    model, x = nn.Module(), torch.randn(3, DIM).half()
    model.heads = nn.ModuleList([nn.Linear(DIM, 128, bias=False).half() for _ in range(4)])
    quantize_(model.heads[0])
    quantize_(model.heads[1], group_size=64)
    quantize_(model.heads[2], format="e3m2")
    with torch.inference_mode():
        quantize_(model.heads[3])
    model.forward = lambda x: [head(x) for head in model.heads]
    with torch.no_grad():
        expected = model.forward(x)
        actual = torch.compile(model, backend="fp6")(x)
    assert captured.matmuls() == 4
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_saved_after_it_was_merged(tmp_path, captured):
    model, x = _model(), torch.randn(3, DIM).half()
    with torch.no_grad():
        expected = torch.compile(model, backend="fp6")(x)
        fp6_compile.save(model, tmp_path / "folder")
        loaded = Heads(*SIZES, bias=True).half()
        fp6_compile.load(loaded, tmp_path / "folder")
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
