"""Planes live as long as their parameters and no longer, and parameters are as free as if they had none."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import PackedTensor, quantize_
from fp6_compile.backend import weights
from tests.support.references import close
from tests.support.soak import count


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x):
        return self.b(self.a(x).relu())


def _packed_elements():
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype in (torch.uint8, torch.int16)]
    return sum(t.numel() for t in tensors if t.numel() > 10_000)


@pytest.mark.parametrize("packed", [False, True])
def test_planes_go_with_their_model(packed, captured):
    """Dynamo keeps the graph for the next model of the class."""
    before = _packed_elements()
    model, x = Siblings().half().requires_grad_(False), torch.randn(2, 256).half()
    if packed:
        quantize_(model)
    compiled = torch.compile(model, backend="fp6")
    with torch.no_grad():
        compiled(x)
    assert _packed_elements() > before
    del model, compiled
    assert _packed_elements() == before


class Siblings(Pair):
    def forward(self, x):
        return self.b(x) * self.a(x)


@pytest.mark.parametrize("make", [Pair, Siblings], ids=["alone", "merged"])
def test_packed_model_moves_and_casts_after_it_ran(make, captured):
    model = make().bfloat16().eval()
    quantize_(model)
    compiled, x = torch.compile(model, backend="fp6"), torch.randn(4, 256)
    with torch.no_grad():
        compiled(x.bfloat16())
        for dtype in (torch.float16, torch.bfloat16):
            model.to(dtype)
            close(compiled(x.to(dtype)), model(x.to(dtype)))
        model.to("meta")
    assert all(p.is_meta for p in model.parameters())


def test_parameters_swap_after_they_were_packed(captured):
    """torch's future way to convert a module, which refuses tensors that somebody has a weak reference to."""
    model, x = Pair().half().requires_grad_(False), torch.randn(4, 256)
    compiled = torch.compile(model, backend="fp6")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        compiled(x.half())
        model.bfloat16()
        model.half()
        model.a.weight.mul_(2)
        close(compiled(x.half()), _again(model)(x.half()), roundings=8)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _again(model):
    """A copy that was never compiled, with the bits that the compiled one has."""
    other = copy.deepcopy(model)
    quantize_(other)
    return other


def test_copies_and_pickles_have_no_planes(captured):
    model, x = Pair().half().requires_grad_(False), torch.randn(4, 256).half()
    compiled = torch.compile(model, backend="fp6")
    expected = compiled(x)
    file = io.BytesIO()
    torch.save(list(model.parameters()), file)
    file.seek(0)
    copies = [*torch.load(file, weights_only=True), *pickle.loads(pickle.dumps(model)).parameters()]
    for copied, parameter in zip(copies, [*model.parameters()] * 2, strict=True):
        assert torch.equal(copied, parameter)
        assert not weights.planes_of(copied)
    # A shallow copy is another tensor on the same storage.
    model.a.weight, old = copy.copy(model.a.weight), model.a.weight
    model.a.weight.mul_(-1)
    with pytest.raises(AssertionError):
        close(compiled(x), expected)
    model.a.weight = old.mul_(-1)
    close(compiled(x), expected)


def test_reports_are_bounded(captured):
    report = fp6_compile.Report((), "e3m2")
    for _ in range(2_000):
        fp6_compile.report.publish(report)
    assert len(fp6_compile.reports()) == 1_000


def _fused(optimizer, **how):
    return lambda parameters: optimizer(parameters, lr=0.5, fused=True, **how)


OPTIMIZERS = {
    "Adam": _fused(torch.optim.Adam),
    "AdamW": _fused(torch.optim.AdamW),
    "Adagrad": _fused(torch.optim.Adagrad),
    "SGD": _fused(torch.optim.SGD),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.5, foreach=True),
    "single": lambda parameters: torch.optim.AdamW(parameters, lr=0.5, foreach=False),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_step_is_noticed(make, captured):
    """Fused ones change values and no version."""
    model, x = nn.Linear(256, 128, bias=False), torch.randn(4, 256)
    compiled = torch.compile(model, backend="fp6", options={"include_float32": True})
    optimizer = make(model.parameters())
    with torch.no_grad():
        compiled(x)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        expected = x @ PackedTensor.quantize(model.weight).dequantize().T
        close(compiled(x), expected)
    assert fp6_compile.last_refresh() is not None


def test_step_without_a_gradient_refreshes_nothing(captured):
    model, x = nn.Linear(256, 128, bias=False), torch.randn(4, 256)
    compiled = torch.compile(model, backend="fp6", options={"include_float32": True})
    with torch.no_grad():
        compiled(x)
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        compiled(x)
    assert fp6_compile.last_refresh() is None


@pytest.mark.slow
def test_compile_and_reset_cycles_keep_no_memory():
    """Beside inductor's: by what live tensors hold, and by the objects that remain."""
    left = {}
    for backend in ("inductor", "fp6"):
        for cycle in range(count(200, 40)):
            if cycle == 20:
                before = _objects()
            model, x = Pair().half().requires_grad_(False), torch.randn(4, 256).half()
            with torch.no_grad():
                torch.compile(model, backend=backend)(x)
            torch._dynamo.reset()
            del model
        left[backend] = {kind: count - before[kind] for kind, count in _objects().items()}
    print(left)
    assert left["fp6"]["tensors"] <= left["inductor"]["tensors"] + 10
    assert left["fp6"]["objects"] <= 1.1 * left["inductor"]["objects"] + 1_000


def _objects():
    gc.collect()
    objects = gc.get_objects()
    return {"objects": len(objects), "tensors": sum(issubclass(type(o), torch.Tensor) for o in objects)}
