"""The backend on a CUDA device: real launches, CUDA graphs, freshness under them. Skipped, with the reason, elsewhere."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.models import SwiGLU
from tests.support.references import close, dequantized_

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DIM, HIDDEN = 512, 1408


def _model(dtype):
    return SwiGLU(DIM, HIDDEN).to(device=DEVICE, dtype=dtype).requires_grad_(False)


def _reference(model, x, fmt="e2m3", group_size=None):
    """The same model with dequantized weights, in float64."""
    copy = SwiGLU(DIM, HIDDEN).to(device=DEVICE, dtype=x.dtype).requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    dequantized_(copy, ["gate.weight", "up.weight", "down.weight"], fmt, group_size)
    return copy.double()(x.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("fmt", "group_size"), [("e3m2", None), ("e2m3", 64)])
@pytest.mark.parametrize("m", [1, 13, 40, 300])
def test_static_batch(m, fmt, group_size, dtype):
    model, x = _model(dtype), torch.randn(m, DIM, device=DEVICE, dtype=dtype)
    options = {"format": fmt, "group_size": group_size, "strict": True}
    actual = torch.compile(model, backend="fp6", dynamic=False, options=options)(x)
    close(actual, _reference(model, x, fmt, group_size))


def test_symbolic_batch():
    model = _model(torch.float16)
    compiled = torch.compile(model, backend="fp6", dynamic=True)
    compiled(torch.randn(5, DIM, device=DEVICE).half())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (1, 2, 9, 33, 64, 65, 513):
            x = torch.randn(m, DIM, device=DEVICE).half() if m > 1 else torch.randn(3, DIM, device=DEVICE).half()
            close(compiled(x), _reference(model, x))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_see_changed_weights(mode):
    """Recorded addresses stay good: a changed weight is requantized into the buffers that the graph reads."""
    model, x = _model(torch.float16), torch.randn(1, DIM, device=DEVICE).half()
    compiled = torch.compile(model, backend="fp6", mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        close(compiled(x).clone(), _reference(model, x))
    model.down.weight.mul_(-2)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        close(compiled(x).clone(), _reference(model, x))
    assert counters["fp6"]["weights_refreshed"] == 1
    if DEVICE == "cuda":
        assert counters["inductor"]["cudagraph_skips"] == 0
        assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] <= 1  # x


def test_no_weight_sized_copy():
    """Beside the model and the planes, a call needs activations only."""
    model, x = _model(torch.float16), torch.randn(1, DIM, device=DEVICE).half()
    compiled = torch.compile(model, backend="fp6")
    compiled(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compiled(x)
    assert torch.cuda.max_memory_allocated() - before < DIM * HIDDEN


def test_second_device_is_honoured():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = _model(torch.float16).to("cuda:1")
    x = torch.randn(4, DIM, device="cuda:1").half()
    assert torch.compile(model, backend="fp6")(x).device == x.device
