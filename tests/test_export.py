"""torch.export, AOTInductor and saved programs of packed models, run in fresh processes that know less and less of us."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import ops
from tests.support.caches import fresh_cache

ROOT = Path(__file__).parent.parent
needs_library = pytest.mark.skipif(not ops.load(), reason="no C++ compiler")


class Model(nn.Module):
    """Two linears, one with a bias; weights in rows and in groups."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(200, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def _packed(dtype=torch.bfloat16, **how):
    torch.manual_seed(0)
    model = Model().to(dtype).eval().requires_grad_(False)
    fp6_compile.quantize_(model, **how)
    return model


def _exported(model, x, dynamic=True, strict=False):
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}} if dynamic else None
    return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)


def _x(rows=4, dtype=torch.bfloat16):
    return torch.randn(rows, 200, dtype=dtype)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("how", [{}, {"group_size": 64, "format": "e3m2"}, {"format": "e4m3"}])
def test_an_exported_program_multiplies_by_fp6_mm(how, strict):
    model, x = _packed(**how), _x()
    program = _exported(model, x, strict=strict)
    assert sum(node.target is torch.ops.fp6.mm.default for node in program.graph.nodes) == 2
    for rows in (1, 4, 33):
        x = _x(rows)
        assert torch.equal(program.module()(x), model(x))


def test_a_weight_that_is_dequantized_is_plain_torch_after_decompositions():
    class Dequantizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = _packed().up

        def forward(self, x):
            return x @ self.linear.weight.dequantize().t()

    model, x = Dequantizes(), _x()
    program = torch.export.export(model, (x,))
    assert "fp6.dequantize" in program.graph_module.code
    table = {**torch.export.default_decompositions(), torch.ops.fp6.dequantize.default: ops.dequantize}
    plain = program.run_decompositions(table)
    assert "fp6" not in plain.graph_module.code
    assert torch.equal(plain.module()(x), model(x))


_PYTHON = """
import json, sys, torch
folder = sys.argv[1]
x, want, one = torch.load(folder + "/io.pt")
"""


def _run(code, folder, **environment):
    """What a fresh process, in `folder`, prints last, as JSON; it finds the package only where PYTHONPATH is given."""
    env = {**fresh_cache(folder / "cache"), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", _PYTHON + code, str(folder)], env=env, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
