"""Counting the launches of a step in the module that Inductor generated."""

import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from fp6_compile.explanation.trace.launches import launches

GENERATED = """
aten = torch.ops.aten
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', '''
def triton_poi_fused_add_0(in_ptr0): tl.load(in_ptr0)
''', device_str='cuda')
async_compile.wait(globals())

def partition_0(args):
    raw_stream0 = get_raw_stream(0)
    triton_poi_fused_add_0.run(arg0_1, 4096, stream=raw_stream0)
    extern_kernels.bmm(reinterpret_tensor(buf0, (1, 4), (4, 1), 0), buf1, out=buf2)

class Runner:
    def call(self, args):
        buf0 = empty_strided_cuda((4096, ), (1, ), torch.float16)
        (buf3,) = self.partitions[0](partition0_args)
        triton_poi_fused_add_0.run(buf3, 4096, stream=raw_stream0)
        buf4 = torch.ops.aten._scaled_dot_product_efficient_attention.default(buf0, buf1, buf2, None, False)
        buf5 = buf4[0]; del buf4  # reuse
        arg0_1.copy_(buf5, False)
        return (buf3, )

def benchmark_compiled_module(args):
    triton_poi_fused_add_0.run(args)
"""


def test_what_is_a_launch():
    """Kernels, libraries, operators and copies; not allocations, not views, not what only a benchmark calls."""
    attention = "torch.ops.aten._scaled_dot_product_efficient_attention.default"
    add = "triton_poi_fused_add_0"
    assert launches(GENERATED) == [add, "extern_kernels.bmm", add, attention, "arg0_1.copy_"]


def test_a_cpu_graph():
    model = nn.Sequential(nn.Linear(128, 128), nn.Softmax(-1)).bfloat16().requires_grad_(False)
    _, (code,) = run_and_get_code(torch.compile(model, backend="fp6"), torch.randn(2, 128).bfloat16())
    matmul, softmax = launches(code)
    assert matmul == "torch.ops.fp6.mm.default"
    assert softmax.startswith("cpp_fused__softmax")
