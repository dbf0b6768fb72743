"""Formats of other widths than six bits from end to end, and format="auto"."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fp6_compile
from benchmarks.sass import budget as sass
from benchmarks.sass.cases import WIDE, Case
from fp6_compile import ops
from fp6_compile.checkpoint import load, save
from fp6_compile.cli import main
from fp6_compile.config import Options
from fp6_compile.formats import FORMATS
from fp6_compile.kernels.cpu.build import load as cpp
from fp6_compile.layouts.packing import PLANES, pack
from fp6_compile.packed.quantize_model import quantize_
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.quantize import choose_format, dequantize, quantize, squared_error
from tests.deviceless.codegen import generate_modules
from tests.support.codegen import check, interpret
from tests.support.graphs import without_codegen
from tests.support.models import SwiGLU
from tests.support.references import close, dequantized_

NAMED = ["e2m2", "e3m1", "e2m1", "e4m3"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.exponent_bits < 5])
def test_cpu_codes(name):
    """Every code at inputs of every alignment, one-hot: nothing is rounded. Both ways, few rows of x and many."""
    fmt = FORMATS[name]
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)[:, None].expand(-1, 43).contiguous()
    values = fmt.decode(codes[:, 0])
    x = torch.eye(43)
    for rows in (x[:3], x[40:], x):
        out = torch.ops.fp6.mm(rows, pack(codes, fmt, PLANES), torch.ones(1, len(codes)), name, PLANES, None)
        assert_close(out, values.expand(len(rows), -1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*NAMED, "e3m3", "e1m1"])
def test_cpu_products(name, dtype):
    """Against float64: float32 sums, one rounding of the result, and of the weights where there are many rows of x."""
    fmt = FORMATS[name]
    for group in (None, 7, 64):
        codes, scale = quantize(torch.randn(37, 301), fmt, group)
        exact = dequantize(codes, scale, fmt, group, torch.float64)
        for m in (1, 8, 20):
            x = torch.randn(m, 301).to(dtype)
            out = torch.ops.fp6.mm(x, pack(codes, fmt, PLANES), scale, name, PLANES, group)
            expected, magnitude = x.double() @ exact.T, x.double().abs() @ exact.T.abs()
            eps = torch.finfo(dtype).eps
            bound = eps * expected.abs() + 301 * 2.0**-24 * magnitude + (m > 8) * eps * magnitude
            assert ((out.double() - expected).abs() <= bound).all()
    assert cpp() == torch._C._dispatch_has_kernel_for_dispatch_key("fp6::mm", "CPU")


def test_cpu_planes_are_checked():
    fmt = FORMATS["e2m2"]
    w4, w1 = pack(torch.zeros(8, 64, dtype=torch.uint8), fmt, PLANES)
    x, scale = torch.randn(2, 64), torch.ones(1, 8)
    with pytest.raises((ValueError, RuntimeError), match="got 1 planes, e2m2 has 2"):
        torch.ops.fp6.mm(x, [w4], scale, "e2m2", PLANES, None)
    with pytest.raises((ValueError, RuntimeError), match=r"w1 is .* does not hold a weight \[8, 64\]"):
        torch.ops.fp6.mm(x, [w4, w1[:4]], scale, "e2m2", PLANES, None)
    with pytest.raises(ValueError, match="e2m2 has 2"):
        ops.dequantize([w4], scale, "e2m2", PLANES, None, 64, torch.float16)


@pytest.mark.parametrize("name", NAMED)
def test_compiled(name):
    model, x = SwiGLU(256, 384).half(), torch.randn(3, 256).half()
    with torch.no_grad(), without_codegen() as captured:
        out = torch.compile(model, backend="fp6", options={"format": name})(x)
    assert captured.targets().count("fp6.mm") == 2
    report = fp6_compile.last_report()
    assert {linear.format for linear in report.linears} == {name}
    assert report.bytes_after == report.bytes_before * FORMATS[name].bits // 16 + 4 * (384 + 384 + 256)
    close(out, dequantized_(model, ["gate.weight", "up.weight", "down.weight"], name)(x))


@pytest.mark.parametrize("name", ["e2m2", "e5m2"])
def test_through_inductor(name):
    model, x = nn.Linear(256, 128).half().requires_grad_(False), torch.randn(3, 256).half()
    close(torch.compile(model, backend="fp6", options={"format": name})(x), dequantized_(model, ["weight"], name)(x))


@pytest.mark.parametrize(
    ("name", "dtype", "group"),
    [
        pytest.param("e4m3", torch.bfloat16, 64, marks=pytest.mark.slow),
        pytest.param("e2m2", torch.float16, None, marks=pytest.mark.slow),
        pytest.param("e3m3", torch.float16, None, marks=pytest.mark.slow),
    ],
)
def test_gpu_code(name, dtype, group):
    """What Inductor generates for a GPU, for one, two and three planes, interpreted."""
    model, x = nn.Linear(256, 128).to(dtype).requires_grad_(False), torch.randn(4, 256).to(dtype)
    options = {"format": name, "group_size": group, "strict": True}
    (module,) = generate_modules(model, [x], backend="fp6", dynamic=False, options=options)
    assert len(module.kernels) == 1, module.code
    ((actual,),) = interpret([module])
    weight = dequantize(*quantize(model.weight, FORMATS[name], group), FORMATS[name], group, torch.float64)
    check(actual, x.double() @ weight.T + model.bias.double(), dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "bar"), [("e2m1", "fp16", 2.4), ("e2m2", "fp16", 2.9), ("e4m3", "bf16", 2.9)]
)
def test_machine_code(name, dtype, bar):
    """By PTX from the same tables: tensor cores, no spills, instructions a weight."""
    row = sass.measure(Case("sm_90", 8, WIDE, name, dtype))
    assert (row["mma_kind"], row["stack"], row["spill_bytes"]) == ("HMMA", 0, 0)
    assert row["per_weight"] <= bar


def _two_kinds() -> nn.Sequential:
    """A layer of ordinary weights, and one whose rows have an outlier each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).half().requires_grad_(False)
    model[1].weight[:, 7] *= 500
    return model


def test_auto_chooses_by_error():
    even, heavy = (layer.weight for layer in _two_kinds())
    formats = [FORMATS["e3m2"], FORMATS["e2m3"]]
    assert [choose_format([w], formats).name for w in (even, heavy)] == ["e2m3", "e3m2"]
    for w in (even[:16], heavy[:16]):
        chosen = choose_format([w], formats, 64, "mse")
        errors = {fmt: squared_error(w, fmt, 64, "mse") for fmt in formats}
        assert errors[chosen] == min(errors.values())
    assert PackedTensor.quantize(heavy, "auto").spec.format == "e3m2"


def test_auto_in_the_backend_and_in_checkpoints(tmp_path):
    model, x = _two_kinds(), torch.randn(2, 256).half()
    with without_codegen():
        compiled = torch.compile(model, backend="fp6", options={"format": "auto"})(x)
    report = fp6_compile.last_report()
    assert [linear.format for linear in report.linears] == ["e2m3", "e3m2"]
    assert "in auto (1 e2m3, 1 e3m2)" in report.summary()
    report = quantize_(model, format="auto")
    assert [linear.format for linear in report.linears] == ["e2m3", "e3m2"]
    close(model(x), compiled)
    save(model, tmp_path)
    other = _two_kinds()
    load(other, tmp_path)
    assert [layer.weight.spec.format for layer in other] == ["e2m3", "e3m2"]
    assert torch.equal(other(x), model(x))


def test_merged_weights_have_one_format():
    """Gate and up are packed side by side; the error that counts is that of both."""
    torch.manual_seed(0)
    model = SwiGLU(256, 384).half().requires_grad_(False)
    model.up.weight[:, 7] *= 500
    with without_codegen() as captured:
        torch.compile(model, backend="fp6", options={"format": "auto"})(torch.randn(2, 256).half())
    assert captured.targets().count("fp6.mm") == 2
    assert {linear.name.split(".")[0]: linear.format for linear in fp6_compile.last_report().linears} == {
        "gate": "e3m2",
        "up": "e3m2",
        "down": "e2m3",
    }


@pytest.mark.parametrize("name", ["e2m2", "e4m3"])
def test_checkpoints_and_slices(name, tmp_path, capsys):
    model, x = nn.Sequential(nn.Linear(256, 128)).half().requires_grad_(False), torch.randn(2, 256).half()
    quantize_(model, format=name)
    save(model, tmp_path)
    other = nn.Sequential(nn.Linear(256, 128)).half().requires_grad_(False)
    load(other, tmp_path)
    assert torch.equal(other(x), model(x))
    weight = other[0].weight
    assert torch.equal(weight[32:77].dequantize(), weight.dequantize()[32:77])
    for layout in ("gpu_tiles_fp16.v1", "gpu_tiles_bf16.v1"):
        assert torch.equal(weight.repack(layout).repack(PLANES), weight)
    assert main(["inspect", str(tmp_path)]) == 0
    assert name in capsys.readouterr().out


def test_unknown_formats():
    with pytest.raises(ValueError, match="option 'format' got 'e6m1', needs 'auto' or one of"):
        Options.parse(None, {"format": "e6m1"})
    with pytest.raises(ValueError, match="format: got 'e0m5', known formats are"):
        PackedTensor.quantize(torch.randn(4, 4), "e0m5")
