"""The self-test of wgmma: it finds a wrong bit, is run once, and decides which tile is taken."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fp6_compile.backend import compile as backend
from fp6_compile.backend import planes
from fp6_compile.formats import FORMATS
from fp6_compile.kernels.selection import choices as device
from fp6_compile.kernels.selection import selftest
from fp6_compile.layouts.packing import gpu_layout, unpack
from fp6_compile.layouts.spec import PackingSpec

E3M2, F16 = FORMATS["e3m2"], torch.float16
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A stand-in for the kernel on a fake device, which counts its runs; `kernel.off_by` spoils one output."""

    class Kernel:
        runs = 0
        off_by = 0.0
        x = None

        def __call__(self, config, x, planes, scale, fmt, group_size):
            self.runs += 1
            if self.x is not x:
                codes = unpack(planes, fmt, gpu_layout(x.dtype), scale.shape[1], x.shape[1])
                self.x, self.product = x, x.double() @ fmt.decode(codes).double().T
            product = self.product.clone()
            product[3, 5] += self.off_by * (self.runs % selftest._REPETITIONS == 0)  # a race: seldom
            return product.to(x.dtype)

    kernel = Kernel()
    monkeypatch.setattr(selftest, "run", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a fake Hopper")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    selftest._answers.clear()
    yield kernel
    selftest._answers.clear()


@pytest.mark.parametrize("group_size", [None, 64])
def test_it_passes_once_and_is_remembered(kernel, group_size):
    assert selftest.passes(CPU, F16, E3M2, group_size)
    runs = kernel.runs
    assert runs == selftest._REPETITIONS
    assert selftest.passes(CPU, F16, E3M2, group_size)
    selftest._answers.clear()  # another process
    assert selftest.passes(CPU, F16, E3M2, group_size)
    assert kernel.runs == runs
    assert selftest.passes(CPU, torch.bfloat16, E3M2, group_size)  # another kernel
    assert kernel.runs == 2 * runs


def test_one_wrong_sum_in_many_runs_is_found_and_remembered(kernel, caplog):
    kernel.off_by = 1.0
    assert not selftest.passes(CPU, F16, E3M2, None)
    assert "wgmma gave wrong sums on a fake Hopper" in caplog.text
    kernel.off_by = 0.0
    selftest._answers.clear()
    assert not selftest.passes(CPU, F16, E3M2, None)


@pytest.mark.parametrize("passed", [True, False])
def test_it_decides(monkeypatch, passed):
    asked = []
    monkeypatch.setattr(selftest, "passes", lambda *problem, may_launch: asked.append(problem) or passed)
    monkeypatch.setattr(device, "describe", lambda _: device.Device("sm_90", 132))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    (tile, *_) = device.choices(CUDA, 128, 8192, 8192, None, F16, E3M2)
    assert (tile.JOIN > 1) == (tile.num_warps > 2) == passed
    assert asked == [(CUDA, F16, E3M2, None)]
    device.choices(CUDA, 64, 8192, 8192, None, F16, E3M2)
    device.choices(CUDA, 128, 8192, 8192, None, torch.float32, E3M2)
    assert len(asked) == 1


def test_nothing_is_launched_while_a_graph_is_recorded(kernel, monkeypatch):
    """The answer is no, until an earlier call has asked: a warm-up, or another process."""
    monkeypatch.setattr(device, "describe", lambda _: device.Device("sm_90", 132))
    problem = CUDA, 128, 8192, 8192, None, F16, E3M2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    (tile, *_) = device.choices(*problem)
    assert tile.JOIN == 1
    assert dataclasses.replace(tile, SPLIT_K=1).num_warps == 2
    assert kernel.runs == 0
    assert selftest.passes(CPU, F16, E3M2, None)  # eager, on the device that the fake kernel can run on
    monkeypatch.setattr(selftest, "_answers", {(CUDA, *known[1:]): yes for known, yes in selftest._answers.items()})
    (tile, *_) = device.choices(*problem)
    assert tile.JOIN > 1
    selftest._answers.clear()
    (tile, *_) = device.choices(*problem)
    assert tile.JOIN > 1, "another process"


def test_a_test_that_cannot_run_says_no_once(kernel, monkeypatch, caplog):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(selftest, "run", fail)
        assert not selftest.passes(CPU, F16, E3M2, None)
        assert not selftest.passes(CPU, F16, E3M2, None)
    assert caplog.text.count("could not run on a fake Hopper, so wgmma is not used") == 1
    selftest._answers.clear()  # another process asks again
    assert selftest.passes(CPU, F16, E3M2, None)


def _graph(key):
    return SimpleNamespace(weights=SimpleNamespace(keys=[key]), planes=list)


def test_the_verdict_is_part_of_the_cache_key(monkeypatch):
    """Another verdict is another kernel, which the key must tell apart."""
    hopper = dataclasses.replace(device.describe(CPU), arch="sm_90")
    monkeypatch.setattr(device, "describe", lambda _: hopper)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    spec = PackingSpec("e3m2", gpu_layout(F16), None, 128, F16)
    key = planes.PlanesKey(spec, "absmax", CUDA)
    keys = []
    for verdict in (True, False):
        monkeypatch.setattr(selftest, "passes", lambda *problem, verdict=verdict, **_: verdict)
        keys.append(str(backend._verdicts(_graph(key))))
    assert keys[0] != keys[1]
    assert backend._verdicts(_graph(key._replace(device=CPU, spec=spec._replace(layout="cpu.v1")))) == []


def test_another_assembler_is_another_test(kernel, monkeypatch, tmp_path):
    assert selftest.passes(CPU, F16, E3M2, None)
    selftest._answers.clear()
    runs = kernel.runs
    (tmp_path / "ptxas").symlink_to(selftest.triton.knobs.nvidia.ptxas.path)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "ptxas"))
    assert selftest.passes(CPU, F16, E3M2, None)
    assert kernel.runs == 2 * runs
