"""vmap, forward-mode AD and torch.func over packed weights: what an ordinary weight of the same values gives."""

import copy
import functools

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from fp6_compile import PackedTensor, quantize_
from fp6_compile.layouts.packing import CPU, LAYOUTS

N, K = 48, 128


def _linears(group_size=None, bias=True):
    """(a packed linear, an ordinary one of the same weight)."""
    torch.manual_seed(0)
    packed, plain = (nn.Linear(K, N, bias=bias).requires_grad_(False) for _ in range(2))
    packed.weight = nn.Parameter(PackedTensor.quantize(plain.weight, group_size=group_size), requires_grad=False)
    plain.weight = nn.Parameter(packed.weight.dequantize(), requires_grad=False)
    if bias:
        packed.bias = plain.bias
    return packed, plain


def _same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


VMAPS = {
    "linear": lambda m: vmap(m),
    "in_dims": lambda m: vmap(m, in_dims=1, out_dims=1),
    "the last dimension": lambda m: lambda x: vmap(m, in_dims=-1)(x.movedim(0, -1)),
    "nested": lambda m: vmap(vmap(m)),
    "chunks": lambda m: vmap(m, chunk_size=2),
    "x @ W.T": lambda m: vmap(lambda x: x @ m.weight.T),
    "x @ W": lambda m: vmap(lambda x: x[..., :N] @ m.weight),
    "addmm": lambda m: vmap(lambda x: torch.addmm(torch.ones(N), x, m.weight.t())),
    "weights": lambda m: vmap(F.linear, in_dims=(None, 0), out_dims=-1),
}


@pytest.mark.parametrize(("group_size", "bias"), [(None, False), (32, True)])
@pytest.mark.parametrize("how", VMAPS)
def test_vmap(how, group_size, bias):
    x = torch.randn(5, 3, K)
    arguments = [(x, m.weight) if how == "weights" else (x,) for m in _linears(group_size, bias)]
    packed, plain = _linears(group_size, bias)
    _same(VMAPS[how](packed)(*arguments[0]), VMAPS[how](plain)(*arguments[1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_of_the_operators_over_weights(layout):
    weights = [PackedTensor.quantize(torch.randn(N, K), group_size=32).repack(layout) for _ in range(3)]
    exact, how = torch.stack([w.dequantize() for w in weights]), ("e2m3", layout, 32)
    planes = [torch.stack(planes) for planes in zip(*(w.planes for w in weights), strict=True)]
    scale = torch.stack([w.scale for w in weights], 1)
    x = torch.randn(3, 2, K)
    mm = vmap(lambda x, planes, scale: torch.ops.fp6.mm(x, planes, scale, *how), in_dims=(0, 0, 1))
    _same(mm(x, planes, scale), x @ exact.mT)
    mm = vmap(lambda planes, scale: torch.ops.fp6.mm(x[0], planes, scale, *how), in_dims=(0, 1))
    _same(mm(planes, scale), x[0] @ exact.mT)
    dequantize = vmap(lambda p, s: torch.ops.fp6.dequantize(p, s, *how, K, torch.float32), in_dims=(0, 1))
    torch.testing.assert_close(dequantize(planes, scale), exact, rtol=0, atol=0)


def _cubed(m):
    return lambda x: (m(x) ** 3).sum()


def _along(f, x):
    return jvp(f, (x,), (x.flip(0),))[1]


DERIVATIVES = {
    "jvp": lambda m, x: _along(m, x),
    "jvp of jvp": lambda m, x: _along(lambda x: _along(_cubed(m), x), x),
    "grad": lambda m, x: grad(_cubed(m))(x),
    "vjp": lambda m, x: vjp(m, x)[1](torch.ones(N))[0],
    "grad of grad": lambda m, x: grad(lambda x: grad(_cubed(m))(x).sum())(x),
    "vmap of grad": lambda m, x: vmap(grad(_cubed(m)))(x.expand(3, -1)),
    "jacrev": lambda m, x: jacrev(m)(x),
    "jacfwd": lambda m, x: jacfwd(m)(x),
    "jacrev of jacfwd": lambda m, x: jacrev(jacfwd(_cubed(m)))(x),
    "hessian": lambda m, x: hessian(_cubed(m))(x),
    "linearize": lambda m, x: torch.func.linearize(m, x)[1](x),
    "of the weight": lambda m, x: grad(lambda w: F.linear(x, w).sum())(m.weight),
}


@pytest.mark.parametrize("what", DERIVATIVES)
def test_derivatives_of_torch_func(what):
    x = torch.randn(K) / 16
    actual, expected = (DERIVATIVES[what](m, x) for m in _linears(group_size=32))
    assert expected.any()
    _same(actual, expected)


def _tangent(f, x, t):
    with fw.dual_level():
        return fw.unpack_dual(f(fw.make_dual(x, t))).tangent


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_tangents(mode):
    packed, plain = _linears()
    x, t = torch.randn(3, K), torch.randn(3, K)
    with mode():
        for f in (lambda m: m, lambda m: lambda x: x @ m.weight.T, lambda m: lambda x: x[:, :N] @ m.weight):
            _same(_tangent(f(packed), x, t), _tangent(f(plain), x, t))
        with fw.dual_level():
            assert fw.unpack_dual(packed(x)).tangent is None


def test_a_packed_weight_has_no_tangent():
    packed, _ = _linears()
    with (
        fw.dual_level(),
        pytest.raises(NotImplementedError, match="is_same_size.default is not defined for PackedTensor"),
    ):
        fw.make_dual(packed.weight, packed.weight.dequantize())


def test_gradient_of_a_gradient():
    x = torch.randn(3, K)
    seconds = []
    for m in _linears():
        y = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(_cubed(m)(y), y, create_graph=True)
        seconds.append(torch.autograd.grad(first.sum(), y)[0])
    _same(*seconds)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_compiled_code_refuses_tangents(mode, packed, captured):
    """Inductor's kernels would drop them: None instead of a tangent."""
    model = nn.Sequential(nn.Linear(256, 128), nn.GELU()).half().requires_grad_(False)
    if packed:
        quantize_(model)
    compiled, x = torch.compile(model, backend="fp6"), torch.randn(3, 256).half()
    with mode():
        expected = compiled(x)
        with pytest.raises(NotImplementedError, match="compiled code has no forward-mode AD"):
            _tangent(compiled, x, x)
        with fw.dual_level():
            torch.testing.assert_close(compiled(x), expected)


def test_transforms_inside_compiled_code():
    packed, plain = _linears()
    x = torch.randn(4, 3, K)
    for f in (lambda m: lambda x: vmap(m)(x), lambda m: lambda x: grad(_cubed(m))(x)):
        torch._dynamo.reset()
        _same(torch.compile(f(packed), backend="aot_eager")(x), f(plain)(x))


def test_dynamo_leaves_the_operators_kernels_alone():
    """A frame that Dynamo leaves to Python calls them, and Dynamo would compile them by themselves."""
    packed, plain = _linears()
    x = torch.randn(3, K)
    compiled = torch.compile(copy.deepcopy(packed), backend="aot_eager")
    _same(vmap(compiled)(x), plain(x))  # run as it is
    _same(_tangent(compiled, x, x), _tangent(plain, x, x))


def test_gpu_layouts_have_derivatives_too():
    packed, plain = _linears()
    for layout in set(LAYOUTS) - {CPU}:
        linear = functools.partial(F.linear, weight=packed.weight.repack(layout))
        _same(jacfwd(linear)(torch.zeros(K)), plain.weight)
