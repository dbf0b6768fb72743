"""torch.export, AOTInductor and saved programs of packed models, run in fresh processes that know less and less of us."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import ops
from fp6_compile._compat.inductor_build import get_cpp_compiler
from tests.support.caches import fresh_cache

# torch copies its own tree specs of exported graphs.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
ROOT = Path(__file__).parent.parent
needs_library = pytest.mark.skipif(not ops.load(), reason="no C++ compiler")


class Model(nn.Module):
    """Two linears, one with a bias; weights in rows and in groups."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(200, 136), nn.Linear(136, 128, bias=False)

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A program, packages of AOTInductor for one batch and for any, what they give, and the C++ library, in a folder."""
    folder, model, x = tmp_path_factory.mktemp("packages"), _packed(group_size=64), _x()
    shutil.copy(fp6_compile.operator_library(), folder / "fp6.so")
    with torch.no_grad():
        torch.save((x, model(x), x[:1], model(x[:1])), folder / "io.pt")
        torch.export.save(_exported(model, x), folder / "program.pt2")
        for name, dynamic in (("any", True), ("four", False)):
            path = str(folder / f"{name}.pt2")
            assert torch._inductor.aoti_compile_and_package(_exported(model, x, dynamic), package_path=path) == path
    return folder


_PYTHON = """
import json, sys, torch
x, want, one, want_one = torch.load("io.pt")
"""
_PACKAGES = """
atol = 0.01 if json.loads(sys.argv[1]) else 0  # hidden values are rounded to BF16
same = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=atol)
same(torch._inductor.aoti_load_package("four.pt2")(x), want)
package = torch._inductor.aoti_load_package("any.pt2")
same(package(x), want), same(package(one), want_one)
"""


def _run(code, folder, *arguments, **environment):
    """The process that ran `code` in `folder`; the package is there, and is not imported by torch itself."""
    env = {
        **fresh_cache(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        **environment,
    }
    command = [sys.executable, "-c", _PYTHON + code, *arguments]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)


def _runs(code, folder, *arguments, **environment):
    done = _run(code, folder, *arguments, **environment)
    assert done.returncode == 0, done.stderr


@needs_library
@pytest.mark.slow
def test_a_package_runs_where_only_the_library_is_loaded(folder):
    alone = "assert not any(name.startswith('fp6') for name in sys.modules)"
    _runs(f"torch.ops.load_library('fp6.so'){_PACKAGES}{alone}", folder, "false")


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    "load",
    [
        "import fp6_compile; fp6_compile.operator_library()",
        "import fp6_compile.ops",
        "import fp6_compile.ops; fp6_compile.operator_library(); torch.ops.load_library('fp6.so')",
        "torch.ops.load_library('fp6.so'); import fp6_compile.ops; fp6_compile.operator_library()",
    ],
)
def test_a_package_runs_beside_the_package(load, folder):
    """Also where the library is loaded twice, from two files, before and after the operators are defined in Python."""
    usable = "model = torch.nn.Linear(128, 128).half(); fp6_compile.quantize_(model); model(torch.randn(2, 128).half())"
    _runs(f"{load}{_PACKAGES}\n{usable}", folder, "false")


@needs_library
@pytest.mark.slow
def test_a_package_without_the_library(folder, tmp_path):
    """Nothing loaded is an error that names the operator; without a compiler Python's kernel is as good."""
    done = _run(_PACKAGES, folder, "false")
    assert done.returncode != 0
    assert "Could not find schema for fp6::mm" in done.stderr
    nothing = {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    _runs(f"import fp6_compile.ops{_PACKAGES}", folder, "true", **nothing)
    done = _run("import fp6_compile; fp6_compile.operator_library()", folder, **nothing)
    assert "RuntimeError: fp6: the C++ library could not be built" in done.stderr


@needs_library
@pytest.mark.slow
def test_a_package_runs_without_python(folder):
    root = Path(torch.__file__).parent
    flags = [
        f"-I{root / 'include'}",
        f"-L{root / 'lib'}",
        f"-Wl,-rpath,{root / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    program = folder / "run_package"
    subprocess.run(
        [get_cpp_compiler(), "-std=c++20", "-w", str(ROOT / "tests/run_package.cpp"), *flags, "-o", str(program)],
        check=True,
    )
    command = [program, folder / "fp6.so", folder / "any.pt2", "3", "200"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x = torch.linspace(-1, 1, 3 * 200).view(3, 200).bfloat16()
    expected = _packed(group_size=64)(x).float().flatten().tolist()
    assert [float(line) for line in done.stdout.split()] == expected


@needs_library
@pytest.mark.slow
def test_a_saved_program_is_loaded_and_compiled(folder):
    """Nothing of ours is imported by name: what is in the program asks for it."""
    _runs(
        """
model = torch.export.load("program.pt2").module()
assert torch.equal(model(x), want)
import fp6_compile
from fp6_compile.backend.compile import fp6
with torch.no_grad():
    compiled = torch.compile(model, backend=fp6)
    assert torch.equal(compiled(x), want) and torch.equal(compiled(one), want_one)
assert [line.note for line in fp6_compile.last_report().linears] == ["packed already"] * 2
""",
        folder,
    )
