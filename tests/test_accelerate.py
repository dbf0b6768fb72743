"""accelerate: packed weights are offloaded and brought back as other parameters are, and are the same afterwards."""

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import PackedTensor

accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module, remove_hook_from_module  # noqa: E402
from accelerate.utils import CustomDtype, set_module_tensor_to_device  # noqa: E402

CPU = torch.device("cpu")
X = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()


class Attention(nn.Module):
    """Three linears of one input, which the backend merges, and one of another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(128, 128, bias=False) for _ in range(4))

    def forward(self, x):
        return self.o(torch.relu(self.q(x)) + self.k(x) * self.v(x))


def _model(dtype=torch.bfloat16, **how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), Attention(), nn.Linear(128, 128)).to(dtype).eval()
    fp6_compile.quantize_(model.requires_grad_(False), **how)
    return model


def _with_offload_hook(model):
    return add_hook_to_module(model, CpuOffload(execution_device="cpu"))


def _with_user_hook(model):
    return accelerate.cpu_offload_with_hook(model, "cpu")[0]


def _offloaded(model):
    return accelerate.cpu_offload(model, execution_device=CPU)


def _offloaded_by_block(model):
    return accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=["Attention"])


def _dispatched(model):
    return accelerate.dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "cpu"}, force_hooks=True)


WAYS = [_with_offload_hook, _with_user_hook, _offloaded, _offloaded_by_block, _dispatched]


def _check(run, expected, times=3):
    with torch.no_grad():
        for _ in range(times):
            torch.testing.assert_close(run(X), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_models_give_the_same(way):
    model = _model(group_size=64)
    expected = model(X)
    _check(way(model), expected)


def test_weights_are_away_between_calls_and_back_when_the_hooks_go():
    model = _model()
    weight = model[0].weight
    _offloaded(model)(X)
    assert all(p.is_meta and isinstance(p, nn.Parameter) for p in model.parameters())
    remove_hook_from_module(model, recurse=True)
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_models_compile(way, captured):
    model = _model()
    expected = model(X)
    compiled = torch.compile(way(model), backend="fp6")
    _check(compiled, expected, 1)
    graphs = len(fp6_compile.reports())
    _check(compiled, expected)
    assert (
        len(fp6_compile.reports()) == graphs > 0
    )  # parameters that are others at every call are no reason to recompile
    lines = [line for report in fp6_compile.reports() for line in report.linears]
    assert {line.note.split(";")[0] for line in lines} == {"packed already"}


@pytest.mark.parametrize("way", [_offloaded, _offloaded_by_block])
def test_compiled_models_follow_what_is_offloaded(way, captured):
    """Bit planes that were merged at the first call are not those of the second."""
    model, other = _model(), _model()
    with torch.no_grad():
        for parameter in other.parameters():
            if isinstance(parameter, PackedTensor):
                parameter.copy_(PackedTensor.quantize(torch.randn(128, 128).bfloat16()))
    expected, then = model(X), other(X)
    compiled = torch.compile(way(model), backend="fp6")
    _check(compiled, expected)
    weights = model[0]._hf_hook.weights_map.dataset
    for name, value in other.state_dict().items():
        weights[name] = value
    _check(compiled, then)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "fp6"])
def test_offloaded_models_compile_to_code(backend):
    model = _model()
    expected = model(X)
    _check(torch.compile(_offloaded_by_block(model), backend=backend), expected)


def test_tied_weights_stay_tied_and_others_apart():
    """accelerate knows tied weights by their addresses."""
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4))).bfloat16().requires_grad_(False)
    model[2].weight = model[0].weight
    fp6_compile.quantize_(model)
    expected = model(X)
    dispatched = accelerate.dispatch_model(model, dict.fromkeys("0123", "cpu"), force_hooks=True)
    assert dispatched[0].weight is dispatched[2].weight
    assert len({linear.weight.data_ptr() for linear in dispatched}) == 3
    _check(dispatched, expected)


def test_a_parameter_takes_another_packed_weight():
    model = _model()
    weight, other = model[0].weight, PackedTensor.quantize(torch.randn(128, 128).bfloat16(), group_size=64)
    set_module_tensor_to_device(model, "0.weight", "meta")
    assert model[0].weight.is_meta
    set_module_tensor_to_device(model, "0.weight", "cpu", value=weight)
    assert torch.equal(model[0].weight, weight)
    set_module_tensor_to_device(model, "0.weight", "cpu", value=other, dtype=torch.float16)
    assert isinstance(model[0].weight, nn.Parameter)
    assert not model[0].weight.requires_grad
    assert torch.equal(model[0].weight, other.half())
    with pytest.raises(
        TypeError, match=r"cannot become a torch.float16 tensor; PackedTensor.quantize\(weight\) packs one"
    ):
        set_module_tensor_to_device(model, "0.weight", "cpu", value=torch.zeros(128, 128))
    assert torch.equal(model[0].weight, other.half())


def test_init_empty_weights_takes_packed_weights():
    weight = _model()[0].weight
    with accelerate.init_empty_weights():
        linear = nn.Linear(128, 128, bias=False)
        linear.weight = weight
    assert isinstance(linear.weight, nn.Parameter)
    assert linear.weight.is_meta
    assert linear.weight.spec == weight.spec
    set_module_tensor_to_device(linear, "weight", "cpu", value=weight)
    assert torch.equal(linear.weight, weight)


def test_a_packed_model_is_loaded_into_an_empty_one_and_dispatched():
    source = _model(format="e3m2")
    with accelerate.init_empty_weights():
        model = nn.Sequential(nn.Linear(128, 128), Attention(), nn.Linear(128, 128)).bfloat16().eval()
    model.load_state_dict(source.state_dict(), assign=True)
    _check(_offloaded(model), source(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (accelerate.disk_offload, {"execution_device": CPU}),
        (accelerate.dispatch_model, {"device_map": {"0": "cpu", "1": "cpu", "2": "disk"}}),
    ],
)
def test_disk_offload_says_what_to_do(dtype, function, arguments, tmp_path):
    model = _model(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((TypeError, NotImplementedError), match="disk offload need: offload it to the CPU .*dequantize"):
        function(model, **arguments, offload_dir=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sizes_with_and_without_a_hint():
    """accelerate counts the weight that a packed one stands for, unless it is told a smaller type."""
    model = _model()
    packed = {name: CustomDtype.FP8 for name, p in model.named_parameters() if isinstance(p, PackedTensor)}
    sixteen = accelerate.utils.compute_module_sizes(model)[""]
    eight = accelerate.utils.compute_module_sizes(model, special_dtypes=packed)[""]
    really = sum(p.packed_bytes if isinstance(p, PackedTensor) else p.nbytes for p in model.parameters())
    assert really < eight < sixteen
    # the CPU has room for nothing but the packed model
    devices = accelerate.infer_auto_device_map(model, {"cpu": eight + 2, "disk": 10**9}, special_dtypes=packed)
    assert set(devices.values()) == {"cpu"}
    assert "disk" in accelerate.infer_auto_device_map(model, {"cpu": eight + 2, "disk": 10**9}).values()


def test_hooks_move_weights_to_a_device_and_back():
    """Moves to meta, the one other device that every machine has."""
    model = _model()
    hook = AlignDevicesHook(execution_device="meta", io_same_device=False, place_submodules=True)
    add_hook_to_module(model, hook)
    assert all(p.is_meta for p in model.parameters())
    assert model(X).is_meta
