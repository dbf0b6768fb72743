"""`explain` works in a process of its own: what is sent to it, what comes back, and that nothing changes in this one."""

import copyreg
import ctypes
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import fp6_compile
from fp6_compile._compat.inductor import device_interfaces
from fp6_compile.backend import weights
from fp6_compile.explanation import request
from fp6_compile.explanation.request import Writer
from tests.support.graphs import without_codegen
from tests.support.models import SwiGLU
from tests.support.references import close, dequantized_

DIM = 128
ROOT = Path(__file__).parent.parent


def _block(dim=DIM):
    torch.manual_seed(0)
    return SwiGLU(dim, 256).bfloat16().requires_grad_(False).eval()


def _x(rows=1, dim=DIM):
    return torch.randn(rows, dim).bfloat16()


def _state():
    """What a fake GPU changes in its process, as this thread sees it."""
    cuda = [getattr(torch.cuda, name) for name in ("current_device", "device_count", "get_device_properties")]
    settings = [getattr(inductor_config, name) for name in ("shape_padding", "fx_graph_cache", "compile_threads")]
    settings += [torch._dynamo.config.suppress_errors, torch._functorch.config.enable_autograd_cache]
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    kernels = dict(torch.ops.aten.scaled_dot_product_attention.default.py_kernels)
    code = torch._inductor.graph.GraphLowering.compile_to_module
    return [cuda, settings, list(guards), dict(device_interfaces()), kernels, code, dict(copyreg.dispatch_table)]


@pytest.mark.slow
def test_other_threads_compile_meanwhile():
    """One thread compiles for the CPU again and again while this one explains for an H200: neither disturbs the other."""
    expected, seen, results, over = _state(), [], [], threading.Event()
    model, x, sizes = _block(), _x(), [DIM + 16 * i for i in range(8)]
    calls = [(_block(dim), _x(3, dim)) for dim in sizes]
    references = [dequantized_(_block(dim), ["gate.weight", "up.weight", "down.weight"]) for dim in sizes]

    def compile_on():
        while not over.is_set() or len(results) < 2:
            i = len(results) % len(calls)
            torch._dynamo.reset()
            results.append((i, torch.compile(calls[i][0], backend="fp6")(calls[i][1])))
            seen.append(_state())

    with without_codegen():
        thread = threading.Thread(target=compile_on)
        thread.start()
        found = fp6_compile.explain(model, x, device="H200", mode="reduce-overhead")
        over.set()
        thread.join()
    assert found.kinds["template matmul"] == 2
    assert all(state == expected for state in seen)
    for i, y in results:
        close(y, references[i](calls[i][1]))


def _packed(model):
    return [[id(planes.packing) for planes in weights.planes_of(p)] for p in model.parameters()]


@pytest.mark.slow
def test_it_leaves_no_trace():
    """The user's compiled code, weights, counters, reports and remembered shapes stay as they were."""
    model, x = _block(), _x()
    with without_codegen():
        compiled = torch.compile(model, backend="fp6")
        before = compiled(x)
        state = {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()}
        packed, counts, reports = _packed(model), {k: dict(v) for k, v in counters.items()}, fp6_compile.reports()
        fp6_compile.explain(compiled, _x(7), device="H200")
        assert state == {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()}
        assert _packed(model) == packed
        assert {k: dict(v) for k, v in counters.items()} == counts
        assert fp6_compile.reports() == reports
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(x), before)
    # Had the 7 rows been remembered, these would be a second shape, and the batch would become symbolic.
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(SwiGLU.forward)) == 1
    torch._dynamo.reset()
    graphs = []
    torch.compile(model, backend=lambda gm, inputs: graphs.append(gm) or gm.forward)(x)
    assert not any(
        isinstance(node.meta["example_value"], torch.SymInt) for node in graphs[0].graph.find_nodes(op="placeholder")
    )


@pytest.mark.slow
def test_without_triton(tmp_path, monkeypatch):
    """The linears, their bytes and the prediction of the bytes are still there."""
    (tmp_path / "triton.py").write_text("""raise ImportError("No module named 'triton'")""")
    monkeypatch.syspath_prepend(tmp_path)
    found = fp6_compile.explain(_block(), _x(), device="H200")
    assert len(found.quantized) == 3
    assert found.launches is None
    assert found.cuda_graphs.hold is None
    assert "kernels       unknown: no code for a GPU can be generated here: No module named 'triton'" in str(found)


SCRIPT = """
import torch
import fp6_compile

print("the script runs")

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(128, 128, bias=False)
        self.activation = lambda x: torch.relu(x)

    def forward(self, x):
        x = self.activation(self.fc(x))
        torch._dynamo.graph_break()
        return x + 1

model = Model().bfloat16().requires_grad_(False)
model.fc.weight.data[0, 0] = torch.inf
found = fp6_compile.explain(model, torch.ones(1, 128).bfloat16(), device="H200", options={"skip": ["nothing"]})
print(found.breaks[0].line, found.breaks[0].source)
print(found.linears[0].reason)
"""


def _run(script, **how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(script)], env=environment, text=True, **how)


@pytest.mark.slow
def test_a_script_without_a_main_guard(tmp_path):
    """It runs once; its classes and lambdas are known to the process, line numbers and warnings come back."""
    pytest.importorskip("cloudpickle", reason="the extra explain")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = _run(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    line = SCRIPT.splitlines().index("        torch._dynamo.graph_break()") + 1
    reason = "fp6: cannot quantize fc: weight: 1 of 16384 values are NaN or infinite"
    assert out.splitlines() == ["the script runs", f"{line} torch._dynamo.graph_break()", reason]
    assert "'nothing'" in err


INTERRUPTED = """
import os, signal, threading, torch, fp6_compile
from fp6_compile.explanation import process

started = process.subprocess.Popen

class Popen(started):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print(self.pid, flush=True)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

process.subprocess.Popen = Popen
fp6_compile.explain(torch.nn.Linear(128, 128), torch.ones(1, 128), device="H200")
"""


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_both_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    process = _run(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == -signal.SIGINT, err
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert not _is_running(int(out))


class Dies(nn.Module):
    def forward(self, x):
        return x

    def __setstate__(self, state):
        os._exit(3)


class NotThere(nn.Module):
    def __reduce__(self):
        return _elsewhere, (os.getpid(),)


def _elsewhere(pid):
    raise NotImplementedError(f"this is another process: {os.getpid() != pid}")


@pytest.mark.slow
def test_errors_come_back():
    with pytest.raises(RuntimeError, match="the process that explains ended with exit code 3"):
        fp6_compile.explain(Dies(), _x(), device="H200")
    with pytest.raises(ValueError, match="copying failed: this is another process: True") as error:
        fp6_compile.explain(NotThere(), _x(), device="H200")
    assert "_elsewhere" in str(error.value.__cause__)
    model = _block()
    model.up.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="cannot quantize up: weight: 1 of 32768 values are NaN or infinite"):
        fp6_compile.explain(model, _x(), device="H200", options={"strict": True})


def test_what_is_sent_has_no_values():
    """A model of 8 billion parameters, on the meta device or not, is some kilobytes; shared tensors stay one tensor."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1 << 14, 1 << 14, bias=False, dtype=torch.bfloat16) for _ in range(32)))
    model[1].weight = model[0].weight
    written = Writer((model, torch.ones(1 << 20)))
    assert sum(p.numel() for p in model.parameters()) > 8e9
    assert len(written.data) < 1 << 16
    assert len(written.tensors) == 31 + 1


def test_without_cloudpickle(monkeypatch):
    """Pickle would send the names of things in `__main__`, which is not the same in another process."""

    class Local(nn.Module):
        """Nothing that pickle knows by name."""

    class Plain(pickle.Pickler):
        persistent_id = Writer.persistent_id

        def __init__(self, value):
            super().__init__(io.BytesIO())
            self.dump(value)

    monkeypatch.setattr(request, "_BY_VALUE", False)
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        Plain(Local())
    monkeypatch.setattr(Local, "__module__", "__main__")
    with pytest.raises(pickle.PicklingError, match="Local is defined in __main__"):
        Plain(Local())
    assert "with the package cloudpickle installed" in str(request.cannot_copy(TypeError("no")))


@pytest.mark.slow
def test_settings_count():
    """Grad mode, autocast and changed configurations of the calling thread decide in the process, too."""
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU()).bfloat16()
    x = torch.randn(1, DIM)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = fp6_compile.explain(model, x, device="cpu")
    assert len(found.quantized) == 1  # while grad mode is on, it would be none
    with inductor_config.patch(epilogue_fusion=False):
        found = fp6_compile.explain(model.requires_grad_(False), x.bfloat16(), device="H200")
    assert found.launches[0].startswith("triton_tem_")
    assert len(found.launches) == 2  # the activation by itself


@pytest.mark.slow
def test_a_transformers_model():
    transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
    shape = {"hidden_size": DIM, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2, vocab_size=256, head_dim=DIM // 2)
    model = transformers.LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    cache = transformers.StaticCache(config=config, max_cache_len=64)
    cache.early_initialization(1, 2, DIM // 2, torch.bfloat16, "cpu")
    step = {"past_key_values": cache, "position_ids": torch.tensor([[8]])}
    found = fp6_compile.explain(model, torch.ones(1, 1, dtype=torch.long), device="H200", **step)
    assert len(found.quantized) == len(found.linears) == 8
    assert found.cuda_graphs.hold
    assert not cache.layers[0].keys.any()
