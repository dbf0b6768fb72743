"""The decode step of the 8b shape as a GPU would run it: launches, and that a CUDA graph of it holds."""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn
from torch._inductor import output_code

from benchmarks.decode.loop import Sampling, State, make_step
from benchmarks.decode.model.llama import SIZES, Llama
from examples.code_lm.model import KVCache
from fp6_compile import PackedTensor
from fp6_compile.explanation.trace.launches import launches
from fp6_compile.formats import get_format
from fp6_compile.layouts.gpu_tiles import BLOCK_K, GPU_LAYOUTS, ROWS
from fp6_compile.layouts.packing import pack
from fp6_compile.layouts.spec import PackingSpec
from tests.deviceless.codegen import capture_modules, inductor_config
from tests.deviceless.fake_cuda import fake_cuda
from tests.deviceless.fake_tensors import place

CONFIG = dataclasses.replace(SIZES["8b"], layers=2)
LENGTH = 128
BF16 = torch.bfloat16


def _packed(n, k, mode):
    """A weight [n, k] without values."""
    block = pack(torch.zeros(ROWS, BLOCK_K, dtype=torch.uint8), get_format("e3m2"), GPU_LAYOUTS[BF16])
    planes = [plane.new_empty(n // ROWS, k // BLOCK_K, *plane.shape[2:]) for plane in block]
    tensors = [place(tensor, mode) for tensor in (*planes, torch.empty(1, n))]
    return PackedTensor(tensors[:-1], tensors[-1], PackingSpec("e3m2", GPU_LAYOUTS[BF16], None, k, BF16))


def _model(mode):
    with torch.device("meta"):
        model = Llama(CONFIG)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(_packed(*module.weight.shape, mode), requires_grad=False)
        elif hasattr(module, "weight"):
            values = place(torch.empty(module.weight.shape, dtype=BF16), mode)
            module.weight = nn.Parameter(values, requires_grad=False)
    return model


@contextlib.contextmanager
def _recorded():
    """What Inductor would record into a CUDA graph: each compiled graph, and whether it is to be recorded."""
    seen = []

    def note(inputs, graph, cudagraphs, *_):
        seen.append((len(inputs), graph, bool(cudagraphs)))

    with (
        mock.patch.object(output_code, "cudagraph_post_compile", note),
        mock.patch.object(output_code, "cudagraph_partition_post_compile", note),
    ):
        yield seen


def _generate(sampling):
    cache = KVCache.allocate(CONFIG, 1, LENGTH, dtype=BF16)
    state = State(1, LENGTH + 1, sampling, "cpu")
    # Folding would compute constants on the device.
    patches = inductor_config.patch({"joint_graph_constant_folding": False})
    with fake_cuda(90) as mode, capture_modules(mode) as modules, _recorded() as recorded, torch.no_grad(), patches:
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            model = _model(mode)
        vars(state).update({name: place(t, mode) for name, t in vars(state).items() if isinstance(t, torch.Tensor)})
        cache = KVCache(*(tuple(place(t, mode) for t in tensors) for tensors in cache))
        step = make_step(lambda tokens, positions: model(tokens, positions, cache), state)
        torch.compile(step, backend="fp6", mode="reduce-overhead", fullgraph=True, dynamic=False)()
    return modules, recorded


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [pytest.param(Sampling(), id="greedy"), pytest.param(Sampling(0.8), id="sampled")],
)
def test_a_step_of_8b(sampling):
    (module,), ((inputs, graph, cudagraphs),) = _generate(sampling)
    names = launches(module.code)
    text = module.kernels
    matmuls = [name for name in names if "accumulate(" in text.get(name, "")]
    assert len(matmuls) == 4 * CONFIG.layers + 1
    choice = names[names.index(matmuls[-1]) + 1 :]
    # Nine a layer, and what the layers share: mask and locks, the last norm, the head.
    assert len(names) - len(choice) == 9 * CONFIG.layers + 3, names
    if sampling.temperature:
        assert sum("topk" in name for name in choice) == 1
        assert len(choice) <= 5, names
    else:
        assert len(choice) <= 2, names
    # In a CUDA graph: whatever the step writes has its place, and no input is copied before a replay.
    assert cudagraphs
    assert not graph.disabled_cudagraphs_reason
    assert not graph.cudagraph_info.cudagraph_fail_reasons
    assert sorted(graph.fx_kwargs["static_input_idxs"]) == list(range(inputs))
    assert set(graph.mutated_input_idxs) <= set(graph.fx_kwargs["static_input_idxs"])
    assert len(graph.mutated_input_idxs) == 3 + 2 * CONFIG.layers  # token, position, chosen; keys and values
