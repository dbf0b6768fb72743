"""A packed weight as a tensor: what it computes, how it is copied, saved and cut, and what it refuses."""

import contextlib
import copy
import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.runtime.runtime_utils import cache_dir
from torch._subclasses import FakeTensorMode

import fp6_compile
from fp6_compile import PackedTensor
from fp6_compile.formats import FORMATS
from fp6_compile.layouts.packing import CPU, LAYOUTS, PLANES, layout_for
from fp6_compile.quantize import dequantize, quantize
from tests.support.caches import fresh_cache
from tests.support.references import SIX_BITS, close

N, K = 128, 256
VERSIONS_OF_A_COPY = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "clone": torch.clone,
    "detach": torch.detach,
    "to itself and back": lambda w: w.bfloat16().float().half(),
    "layouts": lambda w: w.repack(PLANES).repack("gpu_tiles_fp16.v1").repack(CPU),
}


def _weight(n: int = N, k: int = K, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)


def _packed(format: str = "e3m2", group_size: int | None = None, **kwargs) -> PackedTensor:
    return PackedTensor.quantize(_weight(**kwargs), format, group_size)


def _tensors(w: PackedTensor) -> tuple[torch.Tensor, ...]:
    return *w.planes, w.scale


def _models(group_size: int | None = 64) -> tuple[nn.Module, nn.Module]:
    """(packed, the same with ordinary weights of the same values)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K, bias=False)).half().requires_grad_(False)
    plain = copy.deepcopy(model)
    for i in (0, 2):
        model[i].weight = nn.Parameter(
            PackedTensor.quantize(model[i].weight, group_size=group_size), requires_grad=False
        )
        plain[i].weight = nn.Parameter(model[i].weight.dequantize(), requires_grad=False)
    return model, plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [None, 32, 100])
@pytest.mark.parametrize("fmt", SIX_BITS)
def test_dequantize_is_what_was_quantized(fmt, group_size, dtype):
    """By blocks of rows or at once: the same bits, also in a shape that no layout divides."""
    w = _weight(67, 1000, dtype)
    packed = PackedTensor.quantize(w, fmt, group_size)
    codes, scale = quantize(w, FORMATS[fmt], group_size)
    expected = dequantize(codes, scale, FORMATS[fmt], group_size, dtype)
    torch.testing.assert_close(packed.dequantize(), expected, rtol=0, atol=0)
    torch.testing.assert_close(packed.codes(), codes, rtol=0, atol=0)
    for layout in LAYOUTS:
        torch.testing.assert_close(packed.repack(layout).dequantize(), expected, rtol=0, atol=0)
    assert (packed.shape, packed.dtype, packed.stride()) == (w.shape, dtype, w.stride())


def test_from_canonical_planes():
    w = _packed(group_size=64)
    planes = w.repack(PLANES)
    again = PackedTensor.from_planes(planes.planes, w.scale, "e3m2", 64, K, torch.float16)
    assert again.spec == w.spec
    assert torch.equal(again, w)


def test_no_rows():
    for w in (_packed()[7:7], PackedTensor.quantize(torch.empty(0, K).half())):
        assert w.dequantize().shape == (0, K)
        assert w.bfloat16().repack(PLANES).shape == (0, K)
        assert F.linear(torch.randn(2, K).half(), w).shape == (2, 0)


def test_repr_and_bytes():
    w = _packed(group_size=64)
    assert repr(w) == "PackedTensor([128, 256], torch.float16, e3m2, group_size=64, cpu.v1, cpu)"
    assert (w.packed_bytes, w.nbytes) == (N * K * 6 // 8 + 4 * 4 * N, 2 * N * K)


WAYS = {
    "linear": lambda x, w, b: F.linear(x, w),
    "linear, bias": F.linear,
    "x @ W.T": lambda x, w, b: x @ w.T,
    "x @ W.mT": lambda x, w, b: x @ w.mT,
    "matmul, transpose": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "addmm, scaled": lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5, alpha=2),
    "permute twice": lambda x, w, b: F.linear(x, w.permute(1, 0).permute(-1, -2)),
    "a vector": lambda x, w, b: F.linear(x[0], w, b),
    "a vector, mv": lambda x, w, b: w @ x[0],
    "x @ W": lambda x, w, b: x[:, :N] @ w,
    "W @ x": lambda x, w, b: w @ x.T,
    "chunks": lambda x, w, b: F.linear(x, w.chunk(2)[1]),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("way", WAYS)
def test_multiplies(way, mode):
    x, w, b = torch.randn(3, K).half(), _packed(), torch.randn(N).half()
    with mode():
        close(WAYS[way](x, w, b), WAYS[way](x, w.dequantize(), b))


def test_three_dimensions_and_gradient_of_x():
    model, plain = _models()
    x = torch.randn(2, 3, K).half()
    grads = []
    for m in (model, plain):
        x = x.detach().requires_grad_()
        m(x).square().sum().backward()
        grads.append(x.grad)
    close(model(x), plain(x))
    close(grads[0], grads[1], roundings=8)
    y = x.detach().requires_grad_()
    (y @ model[0].weight.t()).sum().backward()
    close(y.grad, plain[0].weight.sum(0).expand_as(y))


@pytest.mark.parametrize("way", VERSIONS_OF_A_COPY)
def test_copies(way):
    for w in (_packed(group_size=64), nn.Parameter(_packed(), requires_grad=False)):
        again = VERSIONS_OF_A_COPY[way](w)
        assert torch.equal(again, w)
        assert again.spec == w.spec
        if way in ("deepcopy", "pickle"):
            assert isinstance(again, nn.Parameter) == isinstance(w, nn.Parameter)
            assert again.scale.data_ptr() != w.scale.data_ptr()


def test_equal_tells_weights_apart():
    w = _packed(group_size=64)
    other = PackedTensor.quantize(-_weight(), group_size=64)
    assert not any(torch.equal(w, o) for o in (other, _packed(), w.bfloat16(), w.dequantize(), w[:64]))


def test_state_dict_and_torch_save():
    model, _ = _models()
    x = torch.randn(3, K).half()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for assign in (False, True):
        other = copy.deepcopy(model)
        other[0].weight.scale.zero_()
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), model(x))
        assert isinstance(other[0].weight, nn.Parameter)


def _rename(file: Path, old: bytes, new: bytes) -> None:
    """Call a global of a torch.save file by another name."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("/data.pkl"))
    assert old in members[pickled]
    members[pickled] = members[pickled].replace(old, new)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("writer", ["fp6_compile.packed.tensor", "fp6_compile.tensor"], ids=["this version", "0.1"])
def test_torch_load_in_a_fresh_process(writer, tmp_path):
    """Importing the package is enough; pickles of version 0.1, which had its modules elsewhere, are read, too."""
    model, _ = _models()
    x = torch.randn(3, K).half()
    torch.save({"state": model.state_dict(), "x": x, "y": model(x)}, tmp_path / "file.pt")
    _rename(tmp_path / "file.pt", b"cfp6_compile.packed.tensor\n_rebuild\n", f"c{writer}\n_rebuild\n".encode())
    code = f"""
import torch, fp6_compile
found = torch.load({str(tmp_path / "file.pt")!r}, weights_only=True)
model = torch.nn.Sequential(torch.nn.Linear({K}, {N}), torch.nn.GELU(), torch.nn.Linear({N}, {K}, bias=False))
model.load_state_dict(found["state"], assign=True)
assert torch.equal(model(found["x"]), found["y"])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_module_conversions():
    model, _ = _models()
    codes, weight = model[0].weight.codes(), model[0].weight
    model.bfloat16()
    assert model[0].weight is weight, "the module keeps its parameter"
    assert weight.dtype == model[0].bias.dtype == torch.bfloat16
    assert torch.equal(model[0].weight.codes(), codes)
    assert model(torch.randn(2, K).bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(model).to("meta")[0].weight.is_meta


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(K, K, bias=False), nn.Linear(K, K, bias=False))
    model[0].weight = model[1].weight = nn.Parameter(_packed(n=K))
    for other in (model.bfloat16(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].weight is other[1].weight
        assert not other[0].weight.requires_grad


CUTS = {
    "rows": (lambda w: w[5:77], None),
    "rows from the end": (lambda w: w[-3:], None),
    "no rows": (lambda w: w[5:5], None),
    "narrow": (lambda w: w.narrow(0, 16, 32), 64),
    "chunk": (lambda w: w.chunk(3)[2], 64),
    "split": (lambda w: w.split([100, 28])[0], 64),
    "inputs": (lambda w: w[:, 17:201], None),
    "inputs, in groups": (lambda w: w[:, 64:256], 64),
    "chunk of inputs": (lambda w: w.chunk(2, 1)[1], 32),
    "transposed": (lambda w: w.t()[64:128].t(), 64),
    "both": (lambda w: w[32:64, 128:], 32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", CUTS)
def test_packing_and_slicing_commute(cut, layout):
    """A slice of the packed weight is the packed slice: its values, its scales and its planes."""
    function, group_size = CUTS[cut]
    w = _packed(group_size=group_size).repack(layout)
    part = function(w)
    torch.testing.assert_close(part.dequantize(), function(w.dequantize()), rtol=0, atol=0)
    if group_size is not None:
        again = PackedTensor.quantize(function(_weight()), "e3m2", group_size).repack(layout)
        torch.testing.assert_close((*part.planes, part.scale), (*again.planes, again.scale), rtol=0, atol=0)


def _trained(w):
    w.requires_grad = True
    return w


REFUSED = {
    "add": (lambda w: w + 1, NotImplementedError, r"aten\.add\.Tensor is not defined for PackedTensor.*dequantize\(\)"),
    "embedding": (lambda w: F.embedding(torch.tensor([1]), w), NotImplementedError, r"aten\.embedding\.default"),
    "row": (lambda w: w[3], NotImplementedError, r"aten\.select\.int is not defined"),
    "write": (lambda w: w.zero_(), NotImplementedError, r"aten\.zero_\.default is not defined"),
    "view": (lambda w: w.view(64, -1), NotImplementedError, r"cannot be viewed as \[64, -1\]; weight\.dequantize\(\)"),
    "step": (lambda w: w[::2], ValueError, "is sliced with step 2, only 1"),
    "group": (lambda w: w[:, 5:], ValueError, r"inputs 5 to 256 of .* cut a group: .* a multiple of group_size=64"),
    "sizes": (lambda w: w.split([5, 6]), ValueError, r"sizes \[5, 6\] do not add up to the 128"),
    "int": (lambda w: w.int(), TypeError, r"cannot become torch\.int32, only float16"),
    "dtype of x": (lambda w: F.linear(torch.randn(2, K), w), RuntimeError, r"x is torch\.float32 and the packed weight"),
    "copy_": (lambda w: w.copy_(torch.zeros(N, K)), ValueError, r"cannot copy a torch\.float32 tensor .* assign=True"),
    "copy_ of another": (lambda w: w.copy_(_packed()), ValueError, r"only packed weights of one shape, format, group_size"),
    "train": (lambda w: F.linear(torch.randn(2, K).half(), _trained(w)), RuntimeError, "cannot be trained"),
    "dtype": (lambda w: PackedTensor.quantize(_weight().double()), ValueError, r"got torch\.float64, needs one of"),
    "format": (lambda w: PackedTensor.quantize(_weight(), "e9m9"), ValueError, "format: got 'e9m9'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_way_out(what):
    function, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        function(_packed(group_size=64))


def test_others_that_write_storages_do_not_write_nothing(tmp_path):
    """There is no storage; a file of nothing, or of the 16-bit size, would be worse than an error with the way out."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")
    model, _ = _models()
    with pytest.raises(TypeError, match=r"fp6_compile.save\(model, folder\) write its bit planes"):
        safetensors.save_file(model.state_dict(), tmp_path / "file.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_activations(dtype):
    model, plain = _models()
    x = torch.randn(3, K)
    for m in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            actual, expected = m.to(dtype)(x), plain.to(dtype)(x)
        close(actual, expected)
        assert actual.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["fp6", "inductor", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(backend, dynamic, captured):
    model, _ = _models()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for m in (2, 7):
        x = torch.randn(m, K).half()
        with torch.no_grad():
            # Inductor's GELU is another; the matmuls are the same calls.
            close(compiled(x), model(x))


def test_backend_reports_it_as_packed_already(captured):
    model, _ = _models()
    model.append(nn.Linear(K, N).half().requires_grad_(False))
    torch.compile(model, backend="fp6", fullgraph=True)(torch.randn(3, K).half())
    report = fp6_compile.last_report()
    assert [(line.name, line.note) for line in report.linears] == [
        ("0", "packed already"),
        ("2", "packed already"),
        ("3", None),
    ]
    assert len(report.quantized) == 3
    assert captured.targets().count("fp6.mm") == 3


def test_gradient_of_x_when_compiled():
    model, plain = _models()
    grads = []
    for m in (torch.compile(model, backend="aot_eager", fullgraph=True), plain):
        x = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
        m(x).square().sum().backward()
        grads.append(x.grad)
    close(grads[0], grads[1], roundings=8)


@pytest.mark.slow
def test_our_lowering_and_a_second_process_that_hits_the_caches(tmp_path):
    """Under any backend that ends in Inductor; the lowering is registered once it is seen that someone compiles with it."""
    code = """
import json, torch, fp6_compile
from torch._dynamo.utils import counters
from torch._inductor.lowering import lowerings
torch.manual_seed(0)
model = torch.nn.Linear(256, 128, bias=False).half()  # a graph that Inductor need not generate C++ for
fp6_compile.quantize_(model)
before = torch.ops.fp6.mm.default in lowerings
torch.compile(model, backend="inductor")(torch.randn(3, 256).half())
after = torch.ops.fp6.mm.default in lowerings
print(json.dumps([before, after, counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]]))
"""
    (tmp_path / "fp6_compile").symlink_to(
        Path(cache_dir()) / "fp6_compile"
    )  # the C++ kernel, which takes half a minute
    environment = fresh_cache(tmp_path)
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True) for _ in range(2)
    ]
    found = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    assert found == [[False, True, 0, 0], [False, True, 1, 1]]


def test_export():
    model, _ = _models()
    x = torch.randn(3, K).half()
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    assert sum(node.target is torch.ops.fp6.mm.default for node in program.graph.nodes) == 2


def test_counters_are_not_touched_by_eager_calls():
    model, _ = _models()
    model(torch.randn(3, K).half())
    assert counters["fp6"] == {}


def test_layout_follows_the_device():
    w = _packed()
    assert w.spec.layout == layout_for(torch.device("cpu"), torch.float16, FORMATS["e3m2"]) == CPU
    assert w.to("meta").device.type == "meta"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", [1, 129, 192, 193, 255, 257, 512])
def test_other_features_than_the_weights_are_refused(features, layout):
    """Also those that the layout's padding would hide."""
    w = PackedTensor.quantize(_weight(64, 250)).repack(layout)
    for x in (torch.randn(3, features).half(), torch.randn(2, 3, features).half(), torch.randn(features).half()):
        with pytest.raises(RuntimeError, match=rf"fp6: x has {features} features, the weight \[64, 250\] takes 250"):
            F.linear(x, w)
    with pytest.raises(RuntimeError, match="x has no features"):
        F.linear(torch.tensor(1.0).half(), w)


@pytest.mark.parametrize("dynamic", [None, True])
def test_other_features_are_refused_when_compiled(dynamic, captured):
    model = nn.Linear(250, 128).half().requires_grad_(False)
    fp6_compile.quantize_(model)
    compiled = torch.compile(model, backend="fp6", dynamic=dynamic)
    compiled(torch.randn(3, 250).half())
    for features in (249, 256, 192):
        with pytest.raises(Exception, match=rf"x has {features} features, the weight \[128, 250\] takes 250"):
            compiled(torch.randn(3, features).half())
    assert compiled(torch.randn(5, 250).half()).shape == (5, 128)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize(
    "how", [{}, {"group_size": 64}, {"scale": "mse"}, {"format": "e4m3"}, {"dtype": torch.float32}]
)
def test_weights_without_values(kind, how):
    """Planes of the right shapes; nothing reads memory that is not there."""
    mode = FakeTensorMode() if kind == "fake" else contextlib.nullcontext()
    real = PackedTensor.quantize(_weight(67, 200), **how)
    layouts = set(LAYOUTS) - ({CPU} if how.get("format") == "e4m3" else set())
    shapes = {layout: [t.shape for t in _tensors(real.repack(layout))] for layout in layouts}
    with mode:
        weight = torch.empty(67, 200, dtype=torch.float16, device="meta" if kind == "meta" else "cpu")
        for w in (PackedTensor.quantize(weight, **how), copy.deepcopy(PackedTensor.quantize(weight, **how))):
            x = torch.empty(3, 200, dtype=w.dtype, device=w.device)
            assert (w.shape, w.dtype, F.linear(x, w).shape, w[:5].shape) == (real.shape, real.dtype, (3, 67), (5, 200))
            for layout in layouts:
                assert [t.shape for t in _tensors(w.repack(layout))] == shapes[layout]
        with pytest.raises(
            ValueError, match='format: "auto" chooses by the values of weights, which tensors on the meta'
        ):
            PackedTensor.quantize(weight, "auto")


@pytest.mark.parametrize("fmt", ["e2m3", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_views_with_the_negative_bit(dtype, fmt):
    w, x = _weight(dtype=dtype), torch.randn(3, K).to(dtype)
    assert torch.equal(PackedTensor.quantize(torch._neg_view(w), fmt), PackedTensor.quantize(-w, fmt))
    packed = PackedTensor.quantize(w, fmt)
    assert torch.equal(F.linear(torch._neg_view(x), packed), F.linear(-x, packed))
    conjugate = torch.complex(w.float(), -w.float()).conj().imag
    assert torch.equal(PackedTensor.quantize(conjugate, dtype=dtype), PackedTensor.quantize(w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_and_device_do_not_matter(dtype):
    w, before = _weight(), torch.get_default_dtype()
    expected = PackedTensor.quantize(w, group_size=32)
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            actual = PackedTensor.quantize(w, group_size=32)
            again = actual.repack(PLANES).repack(CPU)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close((*actual.planes, actual.scale), (*expected.planes, expected.scale), rtol=0, atol=0)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("swap", [False, True])
def test_conversions_of_modules(swap):
    """Also in the way that torch will have them by default: by swapping tensors."""
    model, _ = _models()
    state, weight = copy.deepcopy(model.state_dict()), model[0].weight
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for convert in (nn.Module.bfloat16, nn.Module.half, nn.Module.cpu, nn.Module.share_memory):
            convert(model)
            assert model[0].weight is weight
            assert torch.equal(weight.to(torch.float16), state["0.weight"])
        empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
        assert (empty[0].weight.spec, empty[0].weight.device.type) == (weight.spec, "cpu")
        for assign in (False, True):
            empty.load_state_dict(state, assign=assign)
            assert torch.equal(empty[0].weight, weight)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _in_a_child(model, x, queue, seen):
    with FakeTensorMode(allow_non_fake_inputs=True):  # what is loaded under the mode must not stay fake
        PackedTensor.quantize(x)
        model[0].weight.repack(PLANES)
    shared = model[0].weight.is_shared()
    queue.put((model(x), shared, torch.equal(PackedTensor.quantize(x), PackedTensor.quantize(x.clone()))))
    model[0].weight.copy_(model[0].weight.map(torch.zeros_like))
    queue.put(model)
    seen.wait(300)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_shared_with_a_fresh_process(method):
    """A module goes to a process and comes back; its planes are the same memory, as a tensor's would be."""
    model, _ = _models()
    assert not model[0].weight.is_shared()
    assert model.share_memory()[0].weight.is_shared()
    x = torch.randn(3, K).half()
    expected = model(x)
    context = torch.multiprocessing.get_context(method)
    queue, seen = context.Queue(), context.Event()
    child = context.Process(target=_in_a_child, args=(model, x, queue, seen))
    child.start()
    actual, *facts = queue.get(timeout=300)
    assert torch.equal(actual, expected)
    assert facts == [True, True]
    again = queue.get(timeout=300)
    seen.set()
    child.join()
    assert child.exitcode == 0
    assert isinstance(again[0].weight, nn.Parameter)
    assert torch.equal(again[0].weight, model[0].weight)
    assert not model[0].weight.dequantize().any()


@pytest.mark.parametrize("size", [0, -4])
def test_group_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=f"group_size: got {size}, needs a positive number or None"):
        PackedTensor.quantize(_weight(), group_size=size)


@pytest.mark.parametrize(("n", "k"), [(0, 0), (0, K), (N, 0)])
@pytest.mark.parametrize("fmt", ["e2m3", "e2m1", "e5m2"])
@pytest.mark.parametrize("group_size", [None, 64])
def test_weights_of_nothing(n, k, fmt, group_size):
    w = PackedTensor.quantize(torch.empty(n, k).half(), fmt, group_size)
    for v in (w, w.clone(), w.repack(PLANES), w.float().half(), pickle.loads(pickle.dumps(w))):
        assert v.dequantize().shape == (n, k)
        assert torch.equal(v, w)
    for x in (torch.randn(3, k).half(), torch.randn(0, k).half(), torch.randn(k).half(), torch.randn(40, k).half()):
        out = F.linear(x, w)
        assert (out.shape, bool(out.any())) == ((*x.shape[:-1], n), False)
