"""Freshness: a weight that changes after compilation is noticed, without a recompile."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fp6_compile
from fp6_compile.backend import weights
from tests.support.references import close, dequantized_

K, N = 256, 128


def _replace(model):
    model.weight = nn.Parameter(torch.randn(N, K).half() / 8)


def _swap_twice(model):
    """Two swaps between calls may bring the storage back to the address it had."""
    for _ in range(2):
        model.weight.data = model.weight.data + 0.25


def _optimizer_step(model):
    model.weight.grad = torch.ones_like(model.weight)
    torch.optim.SGD(model.parameters(), lr=0.5).step()


CHANGES = {
    "copy_": lambda model: model.weight.copy_(torch.randn(N, K) / 8),
    "load_state_dict": lambda model: model.load_state_dict(nn.Linear(K, N).half().state_dict()),
    "load_state_dict, assign": lambda model: model.load_state_dict(nn.Linear(K, N).half().state_dict(), assign=True),
    "optimizer step": _optimizer_step,
    "data swap": lambda model: setattr(model.weight, "data", torch.randn(N, K).half()),
    "two data swaps": _swap_twice,
    "new parameter": _replace,
    "index put": lambda model: model.weight.index_put_((torch.tensor([3]),), torch.tensor(9.0).half()),
    "in inference mode": lambda model: _in_inference_mode(model),
}


@torch.inference_mode()
def _in_inference_mode(model):
    model.weight.add_(0.5)


def _reference(model, x):
    copy = nn.Linear(K, N).half()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        return dequantized_(copy, ["weight"])(x)


@pytest.fixture(params=[False, True], ids=["new tensors", "in place"])
def in_place(request, monkeypatch):
    """As on a CPU, and as on a GPU, where addresses must stay."""
    monkeypatch.setattr(weights.Planes, "is_in_place", request.param)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return request.param


def _addresses(parameter):
    (planes,) = weights.planes_of(parameter)
    return [tensor.data_ptr() for tensor in planes.packing.tensors]


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_noticed(change, in_place, captured):
    model, x = nn.Linear(K, N).half().requires_grad_(False), torch.randn(3, K).half()
    compiled = torch.compile(model, backend="fp6")
    close(compiled(x), _reference(model, x))
    old, (before,) = model.weight, weights.planes_of(model.weight)
    old_tensors = before.packing.tensors  # held, so that new tensors have other addresses
    buffers = _addresses(model.weight)

    CHANGES[change](model)
    model.requires_grad_(False)  # a new parameter requires grad, which is a guard of Dynamo's
    gc.collect()
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = compiled(x)
    close(actual, _reference(model, x))
    assert (_addresses(model.weight) == buffers) == (in_place and model.weight is old)
    again = {"weights_refreshed": 1} if model.weight is old else {"weights_packed": 2}
    assert counters["fp6"] == {"linears_quantized": 1, "weights_packed": 1, "mm": 1} | again
    compiled(x)
    assert counters["fp6"] == {"linears_quantized": 1, "weights_packed": 1, "mm": 1} | again
    del old_tensors


def test_new_storage_at_the_old_address_is_noticed(captured):
    """Two `p.data = ...` between calls, as two LoRA merges make, can end where the first storage was."""
    memory = np.random.default_rng(0).standard_normal((N, K)).astype(np.float16)
    model, x = nn.Linear(K, N).half().requires_grad_(False), torch.randn(3, K).half()
    model.weight.data = torch.from_numpy(memory)
    compiled = torch.compile(model, backend="fp6")
    compiled(x)
    before = (model.weight.data_ptr(), model.weight._version)
    model.weight.data = torch.zeros(N, K).half()
    memory *= -2
    model.weight.data = torch.from_numpy(memory)
    assert (model.weight.data_ptr(), model.weight._version) == before
    close(compiled(x), _reference(model, x))


def test_new_parameter_on_the_old_storage_is_noticed(captured):
    """Versions are counted by parameter: another one's may have the number that the old one's had."""
    model, x = nn.Linear(K, N).half().requires_grad_(False), torch.randn(3, K).half()
    model.weight.mul_(1)
    compiled = torch.compile(model, backend="fp6")
    compiled(x)
    version = model.weight._version
    model.weight = nn.Parameter(model.weight.data, requires_grad=False)
    while model.weight._version < version:
        model.weight.mul_(-2)
    assert model.weight._version == version
    close(compiled(x), _reference(model, x))


def test_refresh_after_a_write_that_leaves_no_trace(captured):
    """`p.data.mul_()` bumps no version and moves no storage; the user says so."""
    model, x = nn.Linear(K, N).half().requires_grad_(False), torch.randn(3, K).half()
    compiled = torch.compile(model, backend="fp6")
    compiled(x)
    model.weight.data.mul_(-1.5)
    fp6_compile.mark_weights_changed(model)
    close(compiled(x), _reference(model, x))
    compiled(x)
    assert counters["fp6"]["weights_refreshed"] == 1


def test_unchanged_weight_is_not_touched(captured):
    model, x = nn.Linear(K, N).half(), torch.randn(3, K).half()
    compiled = torch.compile(model, backend="fp6")
    with torch.no_grad():
        for _ in range(5):
            compiled(x)
    assert counters["fp6"]["weights_refreshed"] == 0


def test_old_parameter_still_alive_keeps_its_planes(captured):
    model, x = nn.Linear(K, N).half().requires_grad_(False), torch.randn(3, K).half()
    compiled = torch.compile(model, backend="fp6")
    before = compiled(x)
    old = model.weight
    _replace(model)
    model.requires_grad_(False)
    close(compiled(x), _reference(model, x))
    model.weight = old
    torch.testing.assert_close(compiled(x), before, rtol=0, atol=0)
    assert counters["fp6"]["weights_packed"] == 2
    assert counters["fp6"]["weights_refreshed"] == 0


def test_two_graphs_share_planes_and_freshness(captured):
    """A recompile for a new shape packs nothing, and a change is caught up with once for both graphs."""
    model = nn.Linear(K, N).half().requires_grad_(False)
    compiled = torch.compile(model, backend="fp6", dynamic=False)
    x, y = torch.randn(3, K).half(), torch.randn(5, K).half()
    compiled(x), compiled(y)
    assert counters["fp6"]["weights_packed"] == 1
    assert len(captured.graphs) == 2
    model.weight.mul_(2)
    close(compiled(x), _reference(model, x))
    close(compiled(y), _reference(model, y))
    assert counters["fp6"]["weights_refreshed"] == 1


def test_nan_after_compilation_is_an_error_and_changes_nothing(captured):
    model, x = nn.Linear(K, N).half().requires_grad_(False), torch.randn(3, K).half()
    compiled = torch.compile(model, backend="fp6")
    before = compiled(x)
    saved = model.weight.clone()
    model.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="fp6: cannot quantize weight: weight: 1 of 32768 values are NaN or infinite"):
        compiled(x)
    model.weight.copy_(saved)
    torch.testing.assert_close(compiled(x), before, rtol=0, atol=0)


def test_transposed_weight_is_refreshed(captured):
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(K, N).half(), requires_grad=False)

        def forward(self, x):
            return x @ self.weight

    model, x = Conv1D(), torch.randn(3, K).half()
    compiled = torch.compile(model, backend="fp6")
    compiled(x)
    model.weight.mul_(3)
    actual = compiled(x)
    with torch.no_grad():
        close(actual, dequantized_(model, ["weight^T"])(x))


def test_the_float_weight_can_be_freed(captured):
    """Neither the planes nor the compiled function keep the float weight alive."""
    model, x = nn.Linear(K, N).half().requires_grad_(False), torch.randn(3, K).half()
    compiled = torch.compile(model, backend="fp6")
    compiled(x)
    parameter = weakref.ref(model.weight)
    _replace(model)
    model.requires_grad_(False)
    gc.collect()
    assert parameter() is None
    compiled(x)


def test_reset_drops_the_caches(captured):
    model, x = nn.Linear(K, N).half().requires_grad_(False), torch.randn(3, K).half()
    torch.compile(model, backend="fp6")(x)
    assert len(weights.planes_of(model.weight)) == 1
    torch._dynamo.reset()
    assert not weights.planes_of(model.weight)
    torch.compile(model, backend="fp6")(x)
    assert counters["fp6"]["weights_packed"] == 2


def test_grad_mode_is_part_of_the_bargain(captured):
    """Under grad mode the weight is left alone; without it, the same compiled module runs in six bits."""
    model, x = nn.Linear(K, N).half(), torch.randn(3, K).half()
    compiled = torch.compile(model, backend="fp6")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        close(compiled(x), _reference(model, x))
