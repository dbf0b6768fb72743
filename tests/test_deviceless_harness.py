"""The harness that lets the other tests see the GPU path without a GPU, tested with a toy op (deviceless/toy.py)."""

import json

import pytest
import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.config as inductor_config
import triton
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import FileCheck
from torch.utils._triton import has_triton

from benchmarks.sass.machine import TARGETS, compile_kernel
from tests.deviceless.codegen import generate_cuda_code, generate_modules
from tests.deviceless.fake_cuda import fake_cuda
from tests.deviceless.fake_tensors import place, value_of
from tests.deviceless.interpret import run_interpreted, run_interpreted_all, run_with_interpreter
from tests.deviceless.toy import UNIT, Gated, K, N
from tests.deviceless.toy_kernel import toy_mm

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def activations(m: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(m, K).to(dtype), torch.randn(m, N).to(dtype)]


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


@pytest.mark.slow
def test_the_epilogue_is_in_the_template_and_the_numbers_are_right(dtype: torch.dtype) -> None:
    model, (x, residual) = Gated(), activations(5, dtype)
    (module,) = generate_modules(model, [x, residual])

    assert len(module.kernels) == module.code.count(".run(") == 2, module.code
    assert module.code.count("@triton_heuristics.template(") == 2, module.code
    FileCheck().check("import weight_times_x").check("def triton_tem_fused").check("tl.store").run(module.code)
    last = list(module.kernels.values())[-1]  # whichever matmul comes second takes the rest of the model
    FileCheck().check("weight_times_x(").check("in_ptr").check("libdevice.exp(").check("tl.store").run(last)
    assert "BLOCK_N : tl.constexpr = 32" in last, "of two choices the first is taken"

    (output,) = run_interpreted(module.code, module.inputs)
    expected, bound = model.float64(x, residual)
    assert output.dtype == dtype
    assert ((output.double() - expected).abs() <= bound).all(), ((output.double() - expected).abs() / bound).max()
    assert bound.max() < 32 * UNIT[dtype] * expected.abs().max(), "the tolerance would not notice an error"


@pytest.mark.slow
def test_a_symbolic_batch_is_one_module_for_every_batch(dtype: torch.dtype) -> None:
    model, calls = Gated(), [activations(m, dtype) for m in (5, 3, 33)]
    for tensor in calls[0]:
        torch._dynamo.mark_dynamic(tensor, 0)
    (module,) = generate_modules(model, *calls)

    jobs = [(module.code, module.arguments(i)) for i in range(len(calls))]
    assert [next(a for a in arguments if isinstance(a, int)) for _, arguments in jobs] == [5, 3, 33]
    for (output,), (x, residual) in zip(run_interpreted_all(jobs), calls, strict=True):
        expected, bound = model.float64(x, residual)
        assert ((output.double() - expected).abs() <= bound).all()


class Norm(torch.nn.Module):
    """What Inductor generates itself around our kernels: an extern matmul, pointwise kernels and reductions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(K, N, dtype=torch.float16)
        self.norm = torch.nn.RMSNorm(N, dtype=torch.float16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm(self.linear(x))
        return torch.nn.functional.gelu(h) * torch.sigmoid(h).tanh(), torch.softmax(h, -1).float().sum(0)


@pytest.mark.slow
def test_inductors_own_kernels_are_interpreted_too() -> None:
    torch.manual_seed(0)
    model, x = Norm(), torch.randn(7, K, dtype=torch.float16)
    (module,) = generate_modules(model, [x])
    FileCheck().check("persistent_reduction").check("libdevice.rsqrt").check("extern_kernels.addmm").run(module.code)
    outputs = run_interpreted(module.code, module.inputs)
    # A handful of fp16 roundings of values of about 1 to 3; the sum of 7 rows of a softmax is at most 7.
    for output, expected in zip(outputs, model.double()(x.double()), strict=True):
        torch.testing.assert_close(output.double(), expected.double(), rtol=8 * 2.0**-11, atol=8 * 2.0**-11)


class ReluToSigmoid(CustomGraphPass):
    """A joint-graph pass that turns every relu into a sigmoid."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.sigmoid.default

    def uuid(self) -> str:
        return "relu to sigmoid"


def test_a_graph_pass_runs_in_its_place() -> None:
    config = {"joint_custom_pre_pass": ReluToSigmoid()}
    (module,) = generate_modules(torch.relu, [torch.randn(64)], config=config)
    (kernel,) = module.kernels.values()
    FileCheck().check("tl.load").check("sigmoid").check("tl.store").run(kernel)


def test_a_backend_makes_tensors_whose_values_are_known() -> None:
    """As backend="fp6" will: weights read and packed at compile time, and fed to the graph beside x."""

    def doubling(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> object:
        compiled, packed = None, {}

        def call(*args: torch.Tensor) -> object:
            nonlocal compiled
            for i, arg in enumerate(args):
                if i not in packed and isinstance(arg, torch.nn.Parameter):
                    packed[i] = arg.detach() * (2.0 if arg.amax().item() > 0 else 1.0)
            args = tuple(packed.get(i, arg) for i, arg in enumerate(args))
            compiled = compiled or torch._inductor.compile_fx.compile_fx(gm, list(args))
            return compiled(*args)

        return call

    linear, x = torch.nn.Linear(K, N, bias=False), torch.randn(4, K)
    (module,) = generate_modules(linear, [x], backend=doubling)
    assert [tensor.tolist() for tensor in module.inputs] == [(2 * linear.weight).tolist(), x.tolist()]


def test_a_traced_graph_needs_no_model() -> None:
    graph = make_fx(lambda x, y: torch.relu(x) * y)(torch.randn(8), torch.randn(8))
    FileCheck().check("triton_poi_fused").check("tl.store").run(generate_cuda_code(graph, [torch.randn(8)] * 2))


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_modes_that_time_and_record_generate_code_too(mode: str) -> None:
    linear, x = torch.nn.Linear(K, N, dtype=torch.float16), torch.randn(32, K, dtype=torch.float16)
    code = generate_cuda_code(linear, [x], mode=mode)
    assert "addmm(" in code, "ATen is the first of the choices that max-autotune would time"


def test_the_device_named_is_the_device_seen() -> None:
    def seen(sm: int) -> str:
        return generate_cuda_code(torch.relu, [torch.randn(8)], sm=sm)

    assert "cc=80" in seen(80)
    assert "cc=120" in seen(120)
    with pytest.raises(ValueError, match="no stand-in for sm_70; there is one for sm_80, sm_89"):
        seen(70)


def test_fake_tensors_remember_values_until_they_cannot() -> None:
    with fake_cuda() as mode:
        x = place(torch.arange(6.0).reshape(2, 3), mode)
        assert x.device == torch.device("cuda", 0)
        x[1:].copy_(torch.ones(3, device="cuda"))  # needs the device guard that a CPU build of torch lacks
        total = (x @ x.T).sum().item()
        unknown = torch.empty(3, device="cuda")
        unknown.cpu_value = NotImplementedError("no kernel")
        unknown = unknown + x[0]
    assert total == 5 + 3 + 3 + 3
    assert value_of(x).tolist() == [[0, 1, 2], [1, 1, 1]]
    with pytest.raises(LookupError, match="are unknown"):
        value_of(unknown)


def test_shared_parameters_stay_shared() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with fake_cuda() as mode:
        placed = place(model, mode)
    assert placed[0].weight is placed[1].weight
    assert placed[0].weight is not model[0].weight
    assert model[0].weight.device.type == "cpu"


def test_everything_is_put_back() -> None:
    def state() -> list[object]:
        return [
            dict(device_interface.device_interfaces),
            triton.runtime.driver._active,
            [getattr(torch.cuda, name) for name in ("current_device", "device_count", "get_device_properties")],
            [inductor_config.shape_padding, inductor_config.fx_graph_cache, inductor_config.compile_threads],
            torch._inductor.graph.GraphLowering.compile_to_module,
            has_triton(),
        ]

    device_interface.get_interface_for_device("cuda")
    before = state()
    generate_cuda_code(torch.relu, [torch.randn(8)])
    assert state() == before
    with fake_cuda():
        assert state() != before
    assert state() == before
    x = torch.randn(8)
    torch.testing.assert_close(torch.compile(torch.relu)(x), torch.relu(x))


@pytest.mark.slow
def test_why_the_interpreter_is_corrected_for_bf16() -> None:
    """Fails when a Triton gets bf16 right by itself: then the correction can go for that version."""
    before, after = json.loads(run_with_interpreter("tests.deviceless.bf16_probe"))
    assert before == {"dot": False, "add": False, "cast": False}
    assert after == {"dot": True, "add": True, "cast": True}


SIGNATURE = {"X": "*fp16", "W": "*i8", "SCALE": "*fp32", "Y": "*fp16", "M": "i32", "N": "i32", "K": "i32"}
ALIGNED = ("X", "W", "SCALE", "Y", "N", "K")
BLOCKS = {"BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 64}
MMA = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_for_every_target(target: str) -> None:
    compiled = compile_kernel(toy_mm, SIGNATURE, BLOCKS, target, divisible_by_16=ALIGNED)
    assert compiled.mma.startswith(MMA[target]), compiled.text
    assert 16 < compiled.registers <= 255
    assert compiled.spill_bytes == (0, 0)
    assert compiled.shared_bytes > 0
    assert "ttg.num-warps" in compiled.ttgir
    pipes = compiled.hot_loop.pipes()
    assert 0 < len(compiled.hot_loop) < len(compiled.code)
    assert sum(pipes.values()) == len(compiled.hot_loop)
    assert pipes["MMA"] > 0, "the dot is in the loop over K"
    assert pipes["OTHER"] < 0.2 * len(compiled.hot_loop), compiled.hot_loop.opcodes


def test_spills_are_seen() -> None:
    blocks = {**BLOCKS, "BLOCK_M": 128}
    compiled = compile_kernel(toy_mm, SIGNATURE, blocks, "sm_80", divisible_by_16=ALIGNED, maxnreg=64)
    stores, loads = compiled.spill_bytes
    assert compiled.registers <= 64
    assert min(stores, loads, compiled.stack_bytes) > 0


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="unknown target 'sm_70'; known: sm_80, sm_89"):
        compile_kernel(toy_mm, SIGNATURE, BLOCKS, "sm_70")
