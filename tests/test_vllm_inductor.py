"""The plug-in's pass in vLLM's compilation: cache keys, and the code that Inductor would make for a GPU."""

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

import torch
import torch.nn.functional as F
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

from fp6_compile import PackedTensor, lowerings
from fp6_compile.integrations.vllm import inductor
from fp6_compile.integrations.vllm.compat import InductorPass
from fp6_compile.kernels.selection import selftest
from fp6_compile.layouts.gpu_tiles import GPU_LAYOUTS
from tests.deviceless.codegen import generate_modules

pytestmark = pytest.mark.filterwarnings("default")
KEY = "post_grad_custom_post_pass"


def _configured(**settings):
    config = VllmConfig(compilation_config=CompilationConfig(inductor_compile_config=settings))
    with set_current_vllm_config(config):
        inductor.install_pass()
        inductor.install_pass()
    return config


def test_the_pass_is_in_the_settings_once():
    assert current_platform.pass_key == KEY
    settings = _configured().compilation_config.inductor_compile_config
    assert type(settings[KEY]) is inductor.Fp6Pass
    assert settings[KEY].before is None


def test_a_users_pass_runs_first():
    class Users(InductorPass):
        def __call__(self, graph):
            self.seen = graph

        def uuid(self):
            return "mine"

    users = Users()
    found = _configured(**{KEY: users}).compilation_config.inductor_compile_config[KEY]
    graph = torch.fx.Graph()
    found(graph)
    assert users.seen is graph
    assert found.uuid() != inductor.Fp6Pass().uuid()


@pytest.mark.parametrize("change", ["sources", "verdict"])
def test_vllms_cache_key_has_our_sources_and_what_the_self_tests_said(monkeypatch, change):
    config, without = _configured(), VllmConfig()
    before = config.compute_hash()
    assert before == _configured().compute_hash() != without.compute_hash()
    if change == "sources":
        monkeypatch.setattr(inductor, "source_hash", lambda: b"edited")
    else:
        monkeypatch.setattr(inductor, "_verdicts", {"e2m3 True"})
    assert config.compute_hash() != before


@pytest.mark.parametrize("dynamic", [False, True])
def test_on_a_gpu_epilogues_fuse_where_m_is_known(monkeypatch, dynamic):
    """As vLLM compiles it: fp6::mm is in the graph from the start, and the pass is all that vLLM is told."""
    monkeypatch.setattr(selftest, "passes", lambda *problem, **_: False)
    weight = PackedTensor.quantize(torch.randn(256, 512, dtype=torch.bfloat16))
    weight = weight.repack(GPU_LAYOUTS[torch.bfloat16])
    x, residual = torch.randn(16, 512, dtype=torch.bfloat16), torch.randn(16, 256, dtype=torch.bfloat16)

    def layer(x, residual, *tensors):
        spec = weight.spec
        out = torch.ops.fp6.mm(x, tensors[:-1], tensors[-1], spec.format, spec.layout, spec.group_size)
        return residual + F.silu(out)

    registered = []
    monkeypatch.setattr(inductor, "register", lambda: registered.append(lowerings.register()))
    config = {KEY: inductor.Fp6Pass()}
    (module,) = generate_modules(layer, [x, residual, *weight.tensors], config=config, dynamic=dynamic)
    assert registered
    if dynamic:
        assert "torch.ops.fp6.mm.default(" in module.code
    else:
        assert list(module.kernels) == ["triton_tem_fused_add_mm_silu_0"]
        assert "torch.ops.fp6.mm.default(" not in module.code


def test_on_a_cpu_nothing_is_registered(monkeypatch):
    monkeypatch.setattr(inductor, "register", lambda: pytest.fail("Triton is imported on a CPU"))
    weight = PackedTensor.quantize(torch.randn(128, 128, dtype=torch.bfloat16))
    compiled = torch.compile(weight.mm, options={KEY: inductor.Fp6Pass()})
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(compiled(x), weight.mm(x))
