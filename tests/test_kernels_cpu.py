"""The C++ kernel: every path this machine has, exact on all codes, against float64, threads."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.testing import FileCheck

from fp6_compile import ops
from fp6_compile.formats import FORMATS, Format
from fp6_compile.layouts.packing import CPU, PLANES, pack
from fp6_compile.quantize import dequantize, quantize
from tests.support.references import SIX_BITS, close, dequantized_

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SUPPORTED = torch.ops.fp6.cpu_paths() if ops.load() else []

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="no C++ compiler")


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def path(request):
    if request.param not in SUPPORTED:
        pytest.skip(f"this machine does not run {request.param}")
    return request.param


class Weight(NamedTuple):
    """A packed weight."""

    planes: tuple[Tensor, ...]
    scale: Tensor
    fmt: Format
    group_size: int | None

    def mm(self, x):
        return torch.ops.fp6.mm(x, *self[:2], self.fmt.name, CPU, self.group_size)

    def by(self, path, x, blocks=False):
        return torch.ops.fp6.cpu_mm(x, *self[:2], self.fmt.name, self.group_size, path, blocks)


def _weight(n, k, group_size=None, fmt="e3m2"):
    """(packed weight, the float64 matrix that it stands for)."""
    f = FORMATS[fmt]
    codes, scale = quantize(torch.randn(n, k) / 16, f, group_size)
    exact = dequantize(codes, scale, f, group_size, torch.float64)
    return Weight(pack(codes, f, CPU), scale, f, group_size), exact


# Elsewhere ATen's BF16 matmul is slower than its float one, and blocks of weights are decoded to floats.
MULTIPLIES_BF16 = "avx512_bf16" in SUPPORTED


def _check(out, x, exact, rounded_weights=False):
    """Error: float32 sums over K, the result's rounding, and the weights' rounding where they were decoded to x's dtype."""
    expected, magnitude = x.double() @ exact.T, x.double().abs() @ exact.T.abs()
    eps = torch.finfo(x.dtype).eps
    bound = eps * expected.abs() + x.shape[1] * 2.0**-24 * magnitude + rounded_weights * eps * magnitude
    assert out.dtype == x.dtype
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", SIX_BITS)
def test_all_codes_through_one_hot_activations(path, fmt, dtype):
    """Row n of the weight is code n in every place; one-hot rows of x read the values out, with nothing rounded."""
    codes = torch.arange(64, dtype=torch.uint8)[:, None].expand(64, 128).contiguous()
    weight = Weight(pack(codes, FORMATS[fmt], CPU), torch.ones(1, 64), FORMATS[fmt], None)
    values = FORMATS[fmt].decode(codes[:, 0])
    x = torch.eye(128, dtype=dtype)
    expected = values.to(dtype).expand(128, 64)
    torch.testing.assert_close(weight.by(path, x), expected, rtol=0, atol=0)
    torch.testing.assert_close(weight.by(path, x, blocks=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("m", [1, 2, 7, 17, 64, 131])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(41, 300, None), (130, 1000, 32), (37, 513, 64), (6, 769, 96), (3, 5, None)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_against_float64(path, dtype, n, k, group_size, m):
    weight, exact = _weight(n, k, group_size)
    x = torch.randn(m, k).to(dtype)
    folded = path == "amx" and dtype == torch.bfloat16 and group_size == 64
    _check(weight.by(path, x), x, exact, rounded_weights=folded)


@pytest.mark.parametrize(("n", "k", "group_size"), [(37, 640, 64), (130, 1000, 128), (6, 769, 192)])
@pytest.mark.parametrize("m", [4, 17, 131, 200])
def test_folded_scales_are_those_of_dequantize(n, k, group_size, m):
    """AMX scales BF16 weights in groups before it multiplies: the rounding is the one that fp6::dequantize defines."""
    if "amx" not in SUPPORTED:
        pytest.skip("this machine does not run amx")
    weight, _ = _weight(n, k, group_size)
    meant = torch.ops.fp6.dequantize(weight.planes, weight.scale, "e3m2", CPU, group_size, k, torch.bfloat16).double()
    x = torch.randn(m, k).bfloat16()
    _check(weight.by("amx", x), x, meant)


# More rows than are decoded at once.
@pytest.mark.parametrize(("n", "k", "group_size"), [(7000, 300, None), (4200, 513, 7), (2200, 1000, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_against_float64(path, dtype, n, k, group_size):
    weight, exact = _weight(n, k, group_size, "e2m3")
    x = torch.randn(9, k).to(dtype)
    _check(weight.by(path, x, blocks=True), x, exact, rounded_weights=dtype == torch.bfloat16 and MULTIPLIES_BF16)


def test_the_operator_uses_the_kernel():
    weight, exact = _weight(48, 320, 32)
    x = torch.randn(2, 3, 640)[..., ::2]
    out = torch.ops.fp6.mm(x, weight.planes, weight.scale, "e3m2", CPU, 32)
    torch.testing.assert_close(out, x @ exact.float().T)
    assert torch.equal(out, weight.by(SUPPORTED[-1], x))
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fp6::mm", "CPU")


@pytest.mark.parametrize("group_size", [None, 7, 64])
def test_other_dtypes_and_no_rows(group_size):
    weight, exact = _weight(8, 200, group_size)
    arguments = (weight.planes, weight.scale, "e3m2", CPU, group_size)
    x = torch.randn(3, 200, dtype=torch.float64)
    torch.testing.assert_close(torch.ops.fp6.mm(x, *arguments), x @ exact.T, rtol=1e-6, atol=1e-6)
    assert torch.ops.fp6.mm(x[:0].half(), *arguments).shape == (0, 8)


@pytest.mark.parametrize("layout", [CPU, PLANES])
@pytest.mark.parametrize("group_size", [None, 7, 32])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 8, 0), (3, 0, 64), (0, 8, 64), (0, 0, 0)])
def test_without_inputs_or_outputs(m, n, k, group_size, layout):
    fmt = FORMATS["e3m2"]
    codes, scale = torch.zeros(n, k, dtype=torch.uint8), torch.ones(-(-k // group_size) if group_size else 1, n)
    for dtype in DTYPES:
        out = torch.ops.fp6.mm(
            torch.ones(2, m, k).to(dtype), pack(codes, fmt, layout), scale, "e3m2", layout, group_size
        )
        torch.testing.assert_close(out, torch.zeros(2, m, n, dtype=dtype))


@pytest.mark.parametrize(("layout", "fmt"), [(CPU, "e3m2"), (PLANES, "e2m2")])
@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("group_size", [None, 7, 32])
def test_fp16_weights_beyond_fp16(group_size, m, layout, fmt):
    """Infinite in FP16, where the sum of a positive and a negative one is NaN; the exact results are infinite or 0."""
    f = FORMATS[fmt]
    codes = torch.full((4, 70), int(f.encode(torch.tensor(1.0))), dtype=torch.uint8)
    codes[2:, ::3] |= f.sign
    scale = torch.full((1 if group_size is None else -(-70 // group_size), 4), 1e30)
    x = torch.ones(m, 70).half()
    x[:, :10] = 0
    out = torch.ops.fp6.mm(x, pack(codes, f, layout), scale, fmt, layout, group_size)
    assert (out == math.inf).all()
    assert (torch.ops.fp6.mm(-x, pack(codes, f, layout), scale, fmt, layout, group_size) == -math.inf).all()
    assert (torch.ops.fp6.mm(x * 0, pack(codes, f, layout), scale, fmt, layout, group_size) == 0).all()


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_code_is_its_value(name, dtype, m):
    """Those of five exponent bits that are no numbers, too."""
    fmt = FORMATS[name]
    codes, scale = torch.arange(2**fmt.bits, dtype=torch.uint8)[:, None], torch.ones(1, 2**fmt.bits)
    for layout in (PLANES, CPU) if fmt.bits == 6 else (PLANES,):
        out = torch.ops.fp6.mm(torch.ones(m, 1, dtype=dtype), pack(codes, fmt, layout), scale, name, layout, None)
        expected = fmt.values().to(dtype).expand(m, -1)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("layout", "fmt"), [(CPU, "e3m2"), (PLANES, "e2m2")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 40])
def test_a_scale_that_is_nan_stays_nan(m, dtype, layout, fmt):
    """Whatever its bits: rounding to BF16 must not carry into the sign."""
    codes = torch.ones(4, 64, dtype=torch.uint8)
    scale = torch.full((1, 4), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    out = torch.ops.fp6.mm(torch.ones(m, 64, dtype=dtype), pack(codes, FORMATS[fmt], layout), scale, fmt, layout, None)
    assert out.isnan().all()


@pytest.mark.parametrize("layout", [CPU, PLANES])
@pytest.mark.parametrize("group_size", [0, -32])
def test_groups_without_inputs_are_refused(group_size, layout):
    weight, _ = _weight(8, 128)
    planes = pack(torch.zeros(8, 128, dtype=torch.uint8), weight.fmt, layout)
    with pytest.raises(ValueError, match=f"fp6: group_size: got {group_size}, need 1 or more"):
        torch.ops.fp6.mm(torch.randn(1, 128), planes, weight.scale, "e3m2", layout, group_size)


def test_formats_that_the_layout_has_not_are_refused():
    weight, _ = _weight(8, 128)
    for name in ("e2m2", "e4m3"):
        with pytest.raises(ValueError, match=f"fp6: format: got '{name}', layout cpu.v1 is of six bits"):
            torch.ops.fp6.mm(torch.randn(1, 128), weight.planes, weight.scale, name, CPU, None)
    with pytest.raises(ValueError, match="format: got 'e9m9', known formats are"):
        torch.ops.fp6.mm(torch.randn(1, 128), weight.planes, weight.scale, "e9m9", CPU, None)


def test_infinities_and_nan_reach_the_result(path):
    """An FP32 activation is multiplied in three parts; those of an infinity must not make it NaN."""
    codes = torch.ones(4, 64, dtype=torch.uint8)
    fmt = FORMATS["e3m2"]
    weight = Weight(pack(codes, fmt, CPU), torch.ones(1, 4), fmt, None)
    for dtype in DTYPES:
        x = torch.zeros(3, 64, dtype=dtype)
        x[0, 3], x[1, 3], x[2, 3] = math.inf, -math.inf, math.nan
        out = weight.by(path, x)
        assert out[0].eq(math.inf).all()
        assert out[1].eq(-math.inf).all()
        assert out[2].isnan().all()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("group_size", [None, 64])
def test_sums_beyond_the_largest_fp16_are_infinite(path, group_size, blocks):
    weight, exact = _weight(16, 256, group_size)
    x = torch.randn(5, 256).half()
    out = weight._replace(scale=weight.scale * 1e30).by(path, x, blocks)
    torch.testing.assert_close(out, (x.double() @ (exact * 1e30).T).half())
    assert out.isinf().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 9, 200])
def test_threads_do_not_change_a_bit(path, dtype, m):
    weight, _ = _weight(270, 1024, 64)
    x = torch.randn(m, 1024).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(weight.by(path, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_aten_matmuls_between_ours():
    """oneDNN keeps a tile configuration in the same threads."""
    weight, exact = _weight(64, 256)
    x, w = torch.randn(33, 256).bfloat16(), exact.bfloat16()
    theirs, ours = x @ w.T, weight.mm(x)
    for _ in range(2):
        assert torch.equal(x @ w.T, theirs)
        assert torch.equal(weight.mm(x), ours)


def test_planes_of_another_size_are_refused():
    weight, _ = _weight(8, 128)
    x = torch.randn(1, 128)
    with pytest.raises(ValueError, match=r"do not hold a weight \[8, 128\] in layout cpu.v1"):
        torch.ops.fp6.mm(x, [weight.planes[0][:1], weight.planes[1]], weight.scale, "e3m2", CPU, None)
    with pytest.raises(ValueError, match="need uint8, uint8 and float32"):
        torch.ops.fp6.mm(x, weight.planes, weight.scale.half(), "e3m2", CPU, None)


@pytest.mark.slow
@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_a_compiled_linear_is_one_call(cpp_wrapper):
    """In Inductor's Python wrapper one line; in its C++ wrapper a call of the dispatcher, without Python."""
    if cpp_wrapper and torch.__version__ < "2.13":
        pytest.skip("its C++ wrapper calls custom operators through Python")
    model = torch.nn.Linear(256, 128).bfloat16().requires_grad_(False)
    x = torch.randn(1, 256).bfloat16()
    compiled = torch.compile(model, backend="fp6", options={"inductor": {"cpp_wrapper": cpp_wrapper}})
    with torch.inference_mode():
        out, (code, *_) = run_and_get_code(compiled, x)
    call = 'findSchemaOrThrow("fp6::mm"' if cpp_wrapper else "= torch.ops.fp6.mm.default("
    FileCheck().check_count(call, 1, exactly=True).run(code)
    close(out, dequantized_(model, ["weight"])(x))
