"""The backend as torch.compile sees it: registration, options, errors, modes."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile.config import Options
from tests.support.references import close, dequantized_

K, N = 256, 128


def _model():
    return nn.Linear(K, N).half().requires_grad_(False), torch.randn(3, K).half()


def test_found_by_name_without_an_import():
    """The entry point alone registers it; a fresh process that never imports fp6_compile can use it, and see its log."""
    code = """
import torch
assert "fp6" in torch._dynamo.list_backends()
model = torch.nn.Linear(256, 128, bias=False).half().requires_grad_(False)  # nothing to generate C++ for
assert torch.compile(model, backend="fp6")(torch.randn(3, 256).half()).shape == (3, 128)
"""
    environment = {**os.environ, "TORCH_LOGS": "+fp6_compile"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert "fp6: 1 of 1 linears in e2m3, weights 65.5 KB -> 25.1 KB" in done.stderr


def test_end_to_end_through_inductor():
    """With nothing replaced: real code generation, on the CPU."""
    model, x = _model()
    actual = torch.compile(model, backend="fp6")(x)
    close(actual, dequantized_(model, ["weight"])(x))


def test_without_grad_mode_the_graph_runs_below_autograd(monkeypatch):
    """There fp6::mm is a C++ call. What the graph writes in place still counts versions, and views know their base."""
    from fp6_compile.backend import compile as backend

    compile_fx, below = backend.compile_fx, []

    def spied(*args, **kwargs):
        compiled = compile_fx(*args, **kwargs)

        def run(*inputs):
            key = torch._C.DispatchKey.AutogradFunctionality
            below.append(torch._C._dispatch_tls_is_dispatch_key_excluded(key))
            return compiled(*inputs)

        return run

    monkeypatch.setattr(backend, "compile_fx", spied)
    model, x = _model()
    total = torch.zeros(3, N).half()

    def forward(x):
        total.add_(model(x))
        return total[0]

    step = torch.compile(forward, backend="fp6", fullgraph=True)
    with torch.no_grad():
        row = step(x)
    step(x)
    assert below == [True, False]
    assert total._version == 2
    assert row._base is total


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(mode, captured):
    model, x = _model()
    expected = torch.compile(model, backend="fp6")(x)
    for how in ({"mode": mode}, {"options": {"mode": mode}}):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="fp6", **how)(x), expected, rtol=0, atol=0)


def test_mode_reaches_inductor(monkeypatch):
    from fp6_compile.backend import compile as backend

    seen = {}

    def compile_fx(gm, inputs, config_patches):
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    model, x = _model()
    options = {"mode": "reduce-overhead", "inductor": {"epilogue_fusion": False}}
    torch.compile(model, backend="fp6", options=options)(x)
    assert seen["triton.cudagraphs"] is True
    assert seen["epilogue_fusion"] is False


KNOWN = r"\['format', 'group_size', 'scale_method', 'skip', 'filter_fn', .*, 'strict', 'mode', 'inductor'\]"
BAD_OPTIONS = {
    "unknown": ({"fromat": "e2m3"}, f"fp6: unknown option 'fromat', known options are {KNOWN}"),
    "format": ({"format": "e9m9"}, "fp6: option 'format' got 'e9m9', needs 'auto' or one of"),
    "format type": ({"format": 6}, r"fp6: option 'format' got 6, needs 'auto' or one of"),
    "group_size": ({"group_size": -64}, "fp6: option 'group_size' got -64, needs a positive integer or None"),
    "group_size bool": ({"group_size": True}, "fp6: option 'group_size' got True, needs a positive integer or None"),
    "scale_method": (
        {"scale_method": "max"},
        r"fp6: option 'scale_method' got 'max', needs one of \['absmax', 'mse'\]",
    ),
    "skip": ({"skip": "lm_head"}, "fp6: option 'skip' got 'lm_head', needs a list of module-name globs"),
    "skip items": ({"skip": [1]}, r"fp6: option 'skip' got \[1\], needs a list of module-name globs"),
    "min_features": ({"min_features": 0}, "fp6: option 'min_features' got 0, needs a positive integer"),
    "include_float32": ({"include_float32": 1}, "fp6: option 'include_float32' got 1, needs True or False"),
    "strict": ({"strict": "yes"}, "fp6: option 'strict' got 'yes', needs True or False"),
    "mode": ({"mode": "fast"}, "fp6: option 'mode': .*mode=fast, should be one of: default, .*reduce-overhead"),
    "mode beside inductor": (
        {"mode": "fast", "inductor": {"max_autotune": True}},
        "fp6: option 'mode': .*mode=fast, should be one of: default, .*reduce-overhead",
    ),
    "mode type": ({"mode": 1}, "fp6: option 'mode' got 1, needs the name of a torch.compile mode"),
    "mode lite": (
        {"mode": "lite"},
        "fp6: mode='lite' or use_joint_graph_passes=False turn off the pass that fp6 needs",
    ),
    "inductor": (
        {"inductor": 3},
        "fp6: option 'inductor' got 3, needs a dictionary of torch._inductor.config settings",
    ),
    "inductor key": (
        {"inductor": {"max_autotone": True}},
        "fp6: option 'inductor': Unexpected optimization option max_autotone, known options are .*'max_autotune'",
    ),
    "inductor type": (
        {"inductor": {"max_autotune": "yes"}},
        "fp6: option 'inductor': Unexpected type of attr max_autotune, got str should be bool",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name):
    options, message = BAD_OPTIONS[name]
    model, x = _model()
    with pytest.raises(Exception, match=message) as raised:
        torch.compile(model, backend="fp6", options=options)(x)
    assert "ValueError" in str(raised.value)  # torch wraps what a backend raises, and prints its type


def test_bad_options_raise_value_error():
    for options, message in BAD_OPTIONS.values():
        if options.get("mode") in ("fast", "lite") or isinstance(options.get("inductor"), dict):
            continue  # checked by torch, when the backend runs
        with pytest.raises(ValueError, match=message):
            Options.parse(None, options)


def test_mode_twice():
    assert Options.parse("max-autotune", {"mode": "max-autotune"}).mode == "max-autotune"
    with pytest.raises(ValueError, match="fp6: mode='default' and options\\['mode'\\]='max-autotune' disagree"):
        Options.parse("default", {"mode": "max-autotune"})


@pytest.mark.parametrize("options", [{"format": "e3m2"}, {"group_size": 64}, {"scale_method": "mse", "group_size": 32}])
def test_options_change_the_result(options, captured):
    from fp6_compile.formats import DEFAULT, FORMATS
    from fp6_compile.quantize import dequantize, quantize

    model, x = _model()
    actual = torch.compile(model, backend="fp6", options=options)(x)
    fmt, size = FORMATS[options.get("format", DEFAULT)], options.get("group_size")
    codes, scale = quantize(model.weight, fmt, size, options.get("scale_method", "absmax"))
    weight = dequantize(codes, scale, fmt, size, torch.float16)
    close(actual, nn.functional.linear(x, weight, model.bias))


def test_decode_steps_do_not_recompile(captured):
    model, x = _model()
    compiled = torch.compile(model, backend="fp6")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(64):
            compiled(torch.randn(3, K).half())
    assert len(captured.graphs) == 1


def test_packed_weights_are_static_inputs(captured):
    """Of bias, x, w4, w2 and scale, only x is copied into a CUDA graph's memory on each replay."""
    model, x = _model()
    torch.compile(model, backend="fp6")(x)
    inputs = [line.split(" ")[1] for line in captured.after[0].splitlines() if line.startswith("in")]
    assert [i for i, kind in enumerate(inputs) if kind.startswith("f16[3")] == [1]
    assert captured.static_inputs == [[0, 2, 3, 4]]


def test_float16_and_bfloat16_and_autocast(captured):
    for dtype in (torch.float16, torch.bfloat16):
        model, x = nn.Linear(K, N).to(dtype).requires_grad_(False), torch.randn(3, K, dtype=dtype)
        close(torch.compile(model, backend="fp6")(x), dequantized_(model, ["weight"])(x))
    model, x = nn.Linear(K, N).requires_grad_(False), torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.compile(model, backend="fp6", options={"include_float32": True})(x)
        assert actual.dtype == torch.bfloat16
        assert "fp6.mm" in captured.targets()
        close(actual, dequantized_(model, ["weight"])(x))


def test_group_size_that_the_gpu_kernel_cannot_take_works_on_the_cpu(captured):
    model, x = _model()
    actual = torch.compile(model, backend="fp6", options={"group_size": 48, "strict": True})(x)
    close(actual, dequantized_(model, ["weight"], group_size=48)(x))


def test_nothing_to_take_is_plain_inductor(captured):
    model, x = nn.LayerNorm(K).half().requires_grad_(False), torch.randn(3, K).half()
    torch.testing.assert_close(torch.compile(model, backend="fp6")(x), model(x), rtol=1e-2, atol=1e-2)
    assert fp6_compile.last_report().linears == ()
