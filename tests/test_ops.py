"""fp6::mm and fp6::dequantize: exactness of every code, shapes, strides, fake kernels, gradients, errors."""

import pytest
import torch
from torch.library import opcheck

from fp6_compile import ops
from fp6_compile.formats import FORMATS
from fp6_compile.layouts.packing import LAYOUTS, PLANES, pack
from fp6_compile.quantize import dequantize, quantize
from tests.support.references import SIX_BITS

N, K = 40, 300
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _packed(fmt="e3m2", layout=PLANES, group_size=None, n=N, k=K):
    """(the arguments of an operator after x, the float64 weight that they stand for)."""
    f = FORMATS[fmt]
    codes, scale = quantize(torch.randn(n, k) / 16, f, group_size)
    return (pack(codes, f, layout), scale, fmt, layout, group_size), dequantize(
        codes, scale, f, group_size, torch.float64
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", SIX_BITS)
def test_all_codes_through_one_hot_activations(fmt, layout):
    """Row n of the weight is code n in every place; one-hot rows of x read the values out, with nothing rounded."""
    codes = torch.arange(64, dtype=torch.uint8)[:, None].expand(64, 256).contiguous()
    planes = pack(codes, FORMATS[fmt], layout)
    values = FORMATS[fmt].decode(codes[:, 0])
    for dtype in DTYPES:
        x = torch.eye(256, dtype=dtype)
        out = torch.ops.fp6.mm(x, planes, torch.ones(1, 64), fmt, layout, None)
        torch.testing.assert_close(out, values.to(dtype).expand(256, 64), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group_size", [None, 32, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mm_is_a_product_with_the_dequantized_weight(dtype, group_size, layout):
    """Against float64. Error: the weight's rounding to dtype, float32 sums over K, the result's rounding to dtype."""
    packed, weight = _packed(layout=layout, group_size=group_size)
    x = torch.randn(5, K).to(dtype)
    expected = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.T.abs()
    bound = torch.finfo(dtype).eps * (magnitude + expected.abs()) + K * 2.0**-24 * magnitude
    assert ((torch.ops.fp6.mm(x, *packed).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(dtype, layout):
    packed, weight = _packed("e2m3", layout, 64)
    actual = torch.ops.fp6.dequantize(*packed, K, dtype)
    torch.testing.assert_close(actual, weight.float().to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (2, 3, K), (2, 0, 4, K), (2, 1, 2, 2, K)])
def test_any_leading_dimensions(shape):
    packed, weight = _packed()
    x = torch.randn(shape)
    out = torch.ops.fp6.mm(x, *packed)
    assert out.shape == (*shape[:-1], N)
    torch.testing.assert_close(out, x @ weight.float().T)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.T.contiguous().T,
        lambda x: x[::3],
        lambda x: x[:1, 0].expand(4, -1),
        lambda x: x[:, 1:2],
    ],
    ids=["slices", "column major", "rows", "expanded", "narrow"],
)
def test_any_strides(view):
    packed, weight = _packed()
    x = view(torch.randn(9, 8, K))
    torch.testing.assert_close(torch.ops.fp6.mm(x, *packed), x @ weight.float().T)


def test_the_whole_weight_never_exists(monkeypatch):
    """Blocks of rows: no tensor of the size of a 16-bit copy is made."""
    monkeypatch.setattr(ops, "_BLOCK", 8 * K)
    packed, weight = _packed()
    largest = 0
    original = ops.dequantize

    def spy(*args):
        nonlocal largest
        out = original(*args)
        largest = max(largest, out.shape[0])
        return out

    monkeypatch.setattr(ops, "dequantize", spy)
    x = torch.randn(2, K)
    torch.testing.assert_close(ops.mm_by_rows(x, *packed), x @ weight.float().T)
    assert largest == 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    packed, _ = _packed(layout=layout, group_size=32)
    for x in (torch.randn(3, K, requires_grad=True), torch.randn(2, 3, K), torch.randn(0, K), torch.randn(K, 4).T):
        opcheck(torch.ops.fp6.mm.default, (x, *packed))
    opcheck(torch.ops.fp6.dequantize.default, (*packed, K, torch.bfloat16))


def test_fake_kernels_keep_symbolic_sizes():
    from torch.fx.experimental.proxy_tensor import make_fx

    packed, _ = _packed()
    gm = make_fx(lambda x, planes, scale: torch.ops.fp6.mm(x, planes, scale, *packed[2:]), tracing_mode="symbolic")(
        torch.randn(3, 5, K), *packed[:2]
    )
    (mm,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fp6.mm.default)
    batch, length, n = mm.meta["val"].shape
    assert batch.node.expr.is_Symbol
    assert length.node.expr.is_Symbol
    assert n == N


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_x(layout):
    packed, weight = _packed(layout=layout)
    x = torch.randn(2, 3, K, requires_grad=True)
    grad = torch.randn(2, 3, N)
    torch.ops.fp6.mm(x, *packed).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight.float())


def test_wrong_features_are_named():
    packed, _ = _packed()
    message = "fp6: x has 296 features, but the weight was packed with 300 inputs, padding included"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fp6.mm(torch.randn(2, 296), *packed)
    mode = torch._subclasses.FakeTensorMode()
    packed = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, packed)
    with pytest.raises(RuntimeError, match=message), mode:
        torch.ops.fp6.mm(torch.randn(2, 296), *packed)


def test_wrong_groups_are_named():
    (planes, scale, *_), _ = _packed(group_size=32)
    with pytest.raises((RuntimeError, ValueError), match="fp6: scale has 10 groups, 300 inputs in groups of 64 need 5"):
        torch.ops.fp6.mm(torch.randn(2, K), planes, scale, "e3m2", PLANES, 64)


def test_unknown_format_and_layout_are_named():
    (planes, scale, *_), _ = _packed()
    with pytest.raises(ValueError, match="format: got 'e9m1', known formats are"):
        torch.ops.fp6.mm(torch.randn(2, K), planes, scale, "e9m1", PLANES, None)
    with pytest.raises(ValueError, match="layout: got 'rows', known layouts are"):
        torch.ops.fp6.mm(torch.randn(2, K), planes, scale, "e3m2", "rows", None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize(("n", "k"), [(0, 0), (0, 8), (8, 0)])
def test_weights_of_nothing(n, k, group_size, layout):
    packed, weight = _packed(layout=layout, group_size=group_size, n=n, k=k)
    assert packed[1].shape == (1 if group_size is None else -(-k // 64), n)
    for rows in (0, 2, 40):
        for dtype in (*DTYPES, torch.float64):
            x = torch.randn(rows, k, dtype=dtype, requires_grad=True)
            out = torch.ops.fp6.mm(x, *packed)
            assert (out.shape, out.dtype, bool(out.any())) == ((rows, n), dtype, False)
            out.sum().backward()
            assert x.grad.shape == x.shape
    meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), packed)
    assert torch.ops.fp6.mm(torch.empty(3, k, device="meta"), *meta).shape == (3, n)
    assert torch.ops.fp6.dequantize(*packed, k, torch.float16).shape == weight.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group_size", [None, 64, 7])
@pytest.mark.parametrize("m", [1, 9, 40])
def test_beyond_the_largest_fp16_is_infinite_and_not_nan(m, group_size, layout):
    """Weights that FP16 cannot hold: their products and sums still have a sign."""
    (planes, scale, *how), weight = _packed(layout=layout, group_size=group_size)
    x = torch.randn(m, K).half()
    x[0, :5] = 0
    out, expected = torch.ops.fp6.mm(x, planes, scale * 1e30, *how), (x.double() @ (weight * 1e30).T).half()
    assert expected.isinf().all()
    torch.testing.assert_close(out, expected)
